"""A step that a loop compiles, what planners ask of a pipeline, and stand-ins for arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from internlm2_jax import files, sharding
from internlm2_jax.errors import UserError
from internlm2_jax.models.build import Model, build
from internlm2_jax.models.config import PRESETS, ModelConfig, from_json, preset
from internlm2_jax.models.hf_config import from_hf
from internlm2_jax.sharding import Layout
from internlm2_jax.stages.pipeline import Output, Pipeline
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.objectives import language_model_loss
from internlm2_jax.train.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """One compiled function of a stage's loop.

    Attributes:
        name: "stage/part".
        layout: mesh axes it runs on.
        remat: what a block keeps for its gradient.
        rows, length: of a batch, over all devices; `accumulate` parts of it are taken in turn.
        lower: traces it; to be called with the mesh set.
        tokens: in one call. `calls` of it make the stage (None: one is open-ended).
        model_flops: useful operations of one call, over all devices.
        held: bytes on one device of everything that the loop keeps between calls, arguments of
            this function or not.
        parts: ("prefill", "decode") when one program holds both; else (name,).
        overrides: field of the experiment that sets "layout", "remat", "batch", "accumulate".
    """

    name: str
    layout: Layout
    remat: str
    rows: int
    length: int
    lower: Callable[[], Any]
    tokens: int
    calls: int | None
    model_flops: float
    cfg: ModelConfig
    accumulate: int = 1
    held: float = 0.0
    parts: tuple[Part, ...] = ()
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trains: bool = True


@dataclasses.dataclass(frozen=True)
class Part:
    """A share of a program with figures of its own: `inside` the loop that data end, or not."""

    name: str
    inside: bool
    tokens: int
    repeats: int
    model_flops: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the command line puts in place of an experiment's own settings."""

    layout: str | None = None
    remat: str | None = None
    batch: int | None = None
    accumulate: int | None = None


class Settings(dict[str, Any]):
    """Keywords of a stage. Errors: UserError for one that the stage needs and was not given."""

    def __init__(self, stage: str, values: Mapping[str, Any]):
        super().__init__(values)
        self._stage = stage

    def __missing__(self, key: str) -> Any:
        raise UserError(f"stage {self._stage!r} is given no {key!r}, which its plan needs; set it")


class Context:
    """A pipeline on a mesh: what planners ask."""

    def __init__(self, pipeline: Pipeline, devices: list[Any], choice: Choice):
        self.pipeline, self.devices, self.choice = pipeline, devices, choice

    def settings(self, name: str) -> Settings:
        """Keywords of a stage with its defaults."""
        stage = self.pipeline.stages[name]
        defaults = inspect.signature(stage.func).parameters.values()
        given = {p.name: p.default for p in defaults if p.default is not p.empty}
        return Settings(name, {**given, **stage.keywords})

    def layout(self, settings: Mapping[str, Any]) -> Layout:
        """The layout asked for, else the stage's own, else `fsdp` over all devices."""
        text = self.choice.layout or settings.get("layout") or ""
        return Layout.parse(text or f"fsdp={len(self.devices)}")

    def mesh(self, layout: Layout) -> Mesh:
        return mesh_of(layout, tuple(self.devices))

    def remat(self, settings: Mapping[str, Any]) -> Any:
        return self.choice.remat or settings.get("remat") or "full"

    def config(self, value: Any) -> ModelConfig:
        """Model sizes of a stage's input: another stage, a folder with a model, or a preset's name.

        A plan needs no weights, so it can come before them.
        """
        if isinstance(value, Output):
            settings = self.settings(value.stage)
            if isinstance(settings.get("model"), ModelConfig):
                return self.with_vocabulary(settings["model"], settings.get("tokenizer"))
            for key in ("base", "actor", "reward"):
                if key in settings:
                    return self.config(settings[key])
            raise UserError(f"stage {value.stage!r} has no model; its settings name none")
        folder = Path(value)
        if (folder / "config.json").is_file():
            return from_hf(files.read_json(folder / "config.json"), str(folder / "config.json"))[0]
        if not folder.exists() and str(value) in PRESETS:
            return preset(str(value))
        if not (folder / "model.json").is_file():
            raise UserError(
                f"{folder} has no model.json and no config.json; check the path, or plan before "
                f"there is a model by a preset's name in its place: {', '.join(PRESETS)}"
            )
        return from_json(files.read_json(folder / "model.json")["config"], str(folder))

    def with_vocabulary(self, cfg: ModelConfig, tokenizer: Any) -> ModelConfig:
        """A tokenizer that the pipeline trains sets the vocabulary."""
        if isinstance(tokenizer, Output):
            size = self.settings(tokenizer.stage)["vocab_size"]
            return dataclasses.replace(cfg, vocab_size=size)
        return cfg


@functools.cache
def mesh_of(layout: Layout, devices: tuple[Any, ...]) -> Mesh:
    return layout.mesh(devices)


# -------------------------------------------------------------------------- stand-ins


def abstract_params(model: Model, mesh: Mesh) -> Any:
    """Parameters as they rest on the mesh."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        model.abstract,
        sharding.shardings(model.axes, mesh),
    )


def in_type(params: Any, dtype: str) -> Any:
    """The same stand-ins of another type."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), params)


def platform_of(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def abstract_rows(mesh: Mesh, shape: tuple[int, ...], **dtypes: Any) -> dict[str, Any]:
    """A batch: the first axis is rows; the second, if it divides, tokens."""
    spec = list(sharding.rows(mesh).spec)[: len(shape)]
    if len(shape) > 1 and shape[1] % mesh.shape["context"]:
        spec[1] = None
    at = NamedSharding(mesh, P(*spec))
    return {name: jax.ShapeDtypeStruct(shape, d, sharding=at) for name, d in dtypes.items()}


def packed_rows(mesh: Mesh, rows: int, length: int) -> dict[str, Any]:
    """A batch of data/pipeline.py."""
    whole = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32)
    return abstract_rows(mesh, (rows, length), **whole, loss_mask=jnp.bool_)


def everywhere(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of which every device holds all."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))


def lowering(mesh: Mesh, function: Any, *arguments: Callable[[], Any] | Any) -> Callable[[], Any]:
    """Lowers under the mesh; an argument that is a function is called there for its value."""

    def lower() -> Any:
        with jax.set_mesh(mesh):
            values = (a() if callable(a) else a for a in arguments)
            return function.lower(*values)

    return lower


def train_step(
    cfg: ModelConfig,
    mesh: Mesh,
    rows: int,
    length: int,
    *,
    remat: Any = "full",
    accumulate: int = 1,
    z_loss: float = 0.0,
) -> Callable[[], Any]:
    """A step of language-model training, ready to be lowered."""
    model = build(cfg)
    step = make_train_step(
        language_model_loss(model, z_loss, remat), optimizers.adamw(1e-4), accumulate=accumulate
    )
    return lowering(mesh, step, train_state(model, mesh), packed_rows(mesh, rows, length))


def train_state(model: Model, mesh: Mesh) -> Callable[[], Any]:
    """The state of a training loop; call it with the mesh set."""
    params = abstract_params(model, mesh)
    optimizer = optimizers.adamw(1e-4)
    return lambda: jax.eval_shape(lambda p: init_state(p, optimizer), params)
