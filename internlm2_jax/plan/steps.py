"""The compiled steps of a pipeline, with stand-ins for their arguments.

`PLANNERS` says, for a stage's function, what its loop compiles: the very functions that the stage
calls, on the shapes that it would give them. A stage of your own joins by an entry there.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from internlm2_jax import files, sharding
from internlm2_jax.errors import UserError
from internlm2_jax.infer import cache as kv
from internlm2_jax.infer import engine
from internlm2_jax.models.build import Model, build
from internlm2_jax.models.config import ModelConfig, from_json
from internlm2_jax.models.hf_config import from_hf
from internlm2_jax.plan import analytic
from internlm2_jax.rlhf.ppo import Updates
from internlm2_jax.sharding import Layout
from internlm2_jax.stages.pipeline import Output, Pipeline
from internlm2_jax.stages.ppo import ppo
from internlm2_jax.stages.pretrain import pretrain
from internlm2_jax.stages.reward_model import reward_model
from internlm2_jax.stages.reward_patch import reward_patch
from internlm2_jax.stages.sft import sft
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.objectives import language_model_loss, reward_model_loss
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


class Context:
    """A pipeline on a mesh: what planners ask."""

    def __init__(self, pipeline: Pipeline, devices: list[Any], choice: Choice):
        self.pipeline, self.devices, self.choice = pipeline, devices, choice

    def settings(self, name: str) -> dict[str, Any]:
        """Keywords of a stage with its defaults."""
        stage = self.pipeline.stages[name]
        defaults = inspect.signature(stage.func).parameters.values()
        given = {p.name: p.default for p in defaults if p.default is not p.empty}
        return {**given, **stage.keywords}

    def layout(self, settings: Mapping[str, Any]) -> Layout:
        """The layout asked for, else the stage's own, else `fsdp` over all devices."""
        text = self.choice.layout or settings.get("layout") or ""
        return Layout.parse(text or f"fsdp={len(self.devices)}")

    def mesh(self, layout: Layout) -> Mesh:
        return mesh_of(layout, tuple(self.devices))

    def remat(self, settings: Mapping[str, Any]) -> Any:
        return self.choice.remat or settings.get("remat") or "full"

    def config(self, value: Any) -> ModelConfig:
        """Model sizes of a stage's input: another stage, or a folder with a model in it."""
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


Planner = Callable[[Context, str, dict[str, Any]], Iterator[PlannedStep]]


def planned(
    pipeline: Pipeline, devices: list[Any], choice: Choice = Choice(), only: tuple[str, ...] = ()
) -> list[PlannedStep]:
    """Every step that the pipeline compiles.

    Args:
      only: names of stages or of steps ("pretrain" or "pretrain/long").
    Errors: UserError when nothing can be planned, a name is unknown, or a layout divides neither
      the devices nor the model nor the batch.
    """
    context = Context(pipeline, devices, choice)
    able = {n: PLANNERS[s.func] for n, s in pipeline.stages.items() if s.func in PLANNERS}
    if not able:
        known = ", ".join(sorted(function.__name__ for function in PLANNERS))
        raise UserError(
            f"no stage of this experiment can be planned (it has {', '.join(pipeline.stages)}); "
            f"those that can be are made with {known}"
        )
    stages_asked = {name.partition("/")[0] for name in only}
    for name in stages_asked - set(able):
        raise UserError(f"--only {name}: no such stage to plan; there are {', '.join(able)}")
    found = [
        step
        for name, planner in able.items()
        if not only or name in stages_asked
        for step in planner(context, name, context.settings(name))
    ]
    unknown = [n for n in only if "/" in n and n not in {step.name for step in found}]
    if unknown:
        names = ", ".join(step.name for step in found)
        raise UserError(f"--only {unknown[0]}: no such step; there are {names}")
    return [s for s in found if not only or s.name in only or s.name.partition("/")[0] in only]


# -------------------------------------------------------------------------- stand-ins


def abstract_params(model: Model, mesh: Mesh) -> Any:
    """Parameters as they rest on the mesh."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        model.abstract,
        sharding.shardings(model.axes, mesh),
    )


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


def _everywhere(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))


def _lower(mesh: Mesh, function: Any, *arguments: Callable[[], Any] | Any) -> Callable[[], Any]:
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
    return _lower(mesh, step, _state(model, mesh), packed_rows(mesh, rows, length))


def _state(model: Model, mesh: Mesh) -> Callable[[], Any]:
    params = abstract_params(model, mesh)
    optimizer = optimizers.adamw(1e-4)
    return lambda: jax.eval_shape(lambda p: init_state(p, optimizer), params)


# --------------------------------------------------------------------------- planners


def _plan_pretrain(context: Context, name: str, s: dict[str, Any]) -> Iterator[PlannedStep]:
    layout, remat = context.layout(s), context.remat(s)
    cfg = context.with_vocabulary(s["model"], s.get("tokenizer"))
    for i, phase in enumerate(s["phases"]):
        of_phase = dataclasses.replace(
            cfg, rope_theta=phase.rope_theta, max_position_embeddings=phase.sequence_length
        )
        yield _training(
            context,
            f"{name}/{phase.name}",
            of_phase,
            layout,
            remat,
            rows=phase.batch_size,
            length=phase.sequence_length,
            calls=phase.steps,
            accumulate=getattr(phase, "accumulate", 1),
            z_loss=phase.z_loss,
            overrides={
                "layout": f"{name}.layout",
                "remat": f"{name}.remat",
                "batch": f"{name}.phases.{i}.batch_size",
                "accumulate": f"{name}.phases.{i}.accumulate",
            },
        )


def _plan_sft(context: Context, name: str, s: dict[str, Any]) -> Iterator[PlannedStep]:
    yield _training(
        context,
        f"{name}/train",
        context.config(s["base"]),
        context.layout(s),
        context.remat(s),
        rows=s["batch_size"],
        length=s["row_length"],
        calls=s["steps"],
        overrides={
            "layout": f"{name}.layout",
            "remat": f"{name}.remat",
            "batch": f"{name}.batch_size",
        },
    )


def _check(name: str, layout: Layout, model: Model, batch: int, length: int | None = None) -> None:
    try:
        layout.check(model.axes, model.abstract, batch=batch, length=length)
    except UserError as error:
        raise UserError(f"{name} on {layout}: {error}") from error


def _training(
    context: Context,
    name: str,
    cfg: ModelConfig,
    layout: Layout,
    remat: Any,
    *,
    rows: int,
    length: int,
    calls: int,
    accumulate: int = 1,
    z_loss: float = 0.0,
    overrides: Mapping[str, str],
) -> PlannedStep:
    choice = context.choice
    rows = choice.batch or rows
    accumulate = choice.accumulate or (1 if choice.batch else accumulate)
    mesh, model = context.mesh(layout), build(cfg)
    if rows % accumulate:
        raise UserError(f"{name}: accumulate {accumulate} does not divide a batch of {rows} rows")
    _check(name, layout, model, rows // accumulate, length)
    return PlannedStep(
        name=name,
        layout=layout,
        remat=remat,
        rows=rows,
        length=length,
        lower=train_step(
            cfg, mesh, rows, length, remat=remat, accumulate=accumulate, z_loss=z_loss
        ),
        tokens=rows * length,
        calls=calls,
        model_flops=rows * length * analytic.train_flops(cfg, length),
        cfg=cfg,
        accumulate=accumulate,
        held=analytic.train_state(cfg, layout).total,
        overrides=overrides,
    )


def _plan_reward(context: Context, name: str, s: dict[str, Any]) -> Iterator[PlannedStep]:
    training = s["training"]
    cfg = context.config(s["base"] if "base" in s else s["reward"])
    layout = context.layout(s)
    mesh, model = context.mesh(layout), build(cfg, head="scalar")
    length = training.row_length
    pairs = context.choice.batch or max(1, training.tokens_per_batch // (2 * length))
    _check(name, layout, model, pairs, length)
    step = make_train_step(reward_model_loss(model), optimizers.adamw(1e-4, b2=0.999))
    batch = {
        **abstract_rows(mesh, (pairs, length), chosen=jnp.int32, rejected=jnp.int32),
        **abstract_rows(mesh, (pairs,), chosen_length=jnp.int32, rejected_length=jnp.int32),
    }
    tokens = 2 * pairs * length
    yield PlannedStep(
        name=f"{name}/train",
        layout=layout,
        remat="full",
        rows=2 * pairs,
        length=length,
        lower=_lower(mesh, step, _state(model, mesh), batch),
        tokens=tokens,
        calls=training.steps,
        model_flops=tokens * analytic.train_flops(cfg, length, "scalar"),
        cfg=cfg,
        held=analytic.train_state(cfg, layout, "scalar").total,
        overrides={"batch": f"{name}.training.tokens_per_batch"},
    )


def _plan_ppo(context: Context, name: str, s: dict[str, Any]) -> Iterator[PlannedStep]:
    """Actor and critic updates, then the rollout; four models stay on the devices throughout."""
    cfg, layout, config = context.config(s["actor"]), context.layout(s), s["config"]
    mesh = context.mesh(layout)
    actor, critic = build(cfg), build(cfg, head="scalar")
    rows = context.choice.batch or s["batch_size"]
    part, width = rows // config.minibatches, s["prompt_length"] + s["max_new_tokens"]
    _check(name, layout, actor, part)
    updates = Updates(actor, critic, config)
    params = abstract_params(actor, mesh), abstract_params(critic, mesh)

    def state() -> Any:
        return jax.eval_shape(updates.init, *params)

    batch = {
        **abstract_rows(mesh, (part, width), tokens=jnp.int32),
        **abstract_rows(
            mesh,
            (part, width - 1),
            mask=jnp.bool_,
            logprobs=jnp.float32,
            advantages=jnp.float32,
            returns=jnp.float32,
        ),
    }
    # Pre-training rows make up half as many tokens as the rollouts.
    extra_length = s["pretrain_row_length"]
    extra = max(1, rows * width // (2 * extra_length))
    extra = math.ceil(extra / layout.batch_ways) * layout.batch_ways
    kept_rows = packed_rows(mesh, extra, extra_length)
    trained, frozen = (3 * analytic.FP32, analytic.FP32)
    cut = layout.fsdp * layout.tensor
    sizes = cfg.num_params("lm"), cfg.num_params("scalar")
    held = (trained + frozen) * sum(sizes) / cut
    common: dict[str, Any] = {
        "layout": layout,
        "remat": "full",
        "cfg": cfg,
        "held": held,
        "overrides": {"batch": f"{name}.batch_size"},
    }
    calls = s["iterations"] * config.epochs * config.minibatches
    tokens = part * width
    kept = extra * extra_length * analytic.train_flops(cfg, extra_length)
    yield PlannedStep(
        name=f"{name}/actor",
        rows=part,
        length=width,
        lower=_lower(mesh, Updates.update_actor, lambda: updates, state, batch, kept_rows),
        tokens=tokens,
        calls=calls,
        model_flops=tokens * analytic.train_flops(cfg, width) + kept,
        **common,
    )
    yield PlannedStep(
        name=f"{name}/critic",
        rows=part,
        length=width,
        lower=_lower(mesh, Updates.update_critic, lambda: updates, state, batch),
        tokens=tokens,
        calls=calls,
        model_flops=tokens * analytic.train_flops(cfg, width, "scalar"),
        **common,
    )
    yield _rollout(context, f"{name}/rollout", actor, params[0], mesh, rows, s, common)


def _rollout(
    context: Context,
    name: str,
    model: Model,
    params: Any,
    mesh: Mesh,
    rows: int,
    s: dict[str, Any],
    common: dict[str, Any],
) -> PlannedStep:
    """The engine's one program: prefill, then a loop of one-token steps."""
    cfg = model.cfg
    prompt, new = s["prompt_length"], s["max_new_tokens"]
    width, size, batch = kv.bucket(prompt), kv.bucket(new), 1 << (rows - 1).bit_length()
    scalar = functools.partial(_everywhere, mesh, ())
    lower = _lower(
        mesh,
        engine._generate,
        model,
        size,
        "nucleus" if s["top_p"] < 1 else "all",
        0,
        params,
        _everywhere(mesh, (batch, width), jnp.int32),
        _everywhere(mesh, (batch,), jnp.int32),
        scalar(jnp.int32),
        scalar(jnp.float32),
        scalar(jnp.float32),
        scalar(jnp.uint32),
        _everywhere(mesh, (batch,), jnp.int32),
        _everywhere(mesh, (4,), jnp.int32),
    )
    head = 2.0 * cfg.vocab_size * cfg.embed_dim
    matrices = analytic.forward_flops(cfg, 1)
    attention = 4.0 * cfg.num_layers * cfg.num_heads * cfg.head_dim
    seen = prompt + new / 2
    prefill = rows * (prompt * (analytic.forward_flops(cfg, prompt) - head) + head)
    decode = rows * (matrices + attention * (seen - 1))
    return PlannedStep(
        name=name,
        rows=rows,
        length=prompt + new,
        lower=lower,
        tokens=rows * (prompt + new),
        calls=s["iterations"],
        model_flops=prefill + (new - 1) * decode,
        parts=(
            Part("prefill", False, rows * prompt, 1, prefill),
            Part("decode", True, rows, new - 1, decode),
        ),
        trains=False,
        **common,
    )


PLANNERS: dict[Callable[..., Any], Planner] = {
    pretrain: _plan_pretrain,
    sft: _plan_sft,
    reward_model: _plan_reward,
    reward_patch: _plan_reward,
    ppo: _plan_ppo,
}
