"""`internlm2_jax.open(folder)`: any trained model as one object to look at, call and export.

model = internlm2_jax.open("runs/demo/sft")
print(model.summary())
model.generate("def fibonacci(n):", max_new_tokens=64)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.infer import engine
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models import convert
from internlm2_jax.models.build import Model, Params, build, head_of

if TYPE_CHECKING:
    from internlm2_jax.data.tokenizer import Tokenizer
    from internlm2_jax.models.hf_config import Layout

_logits = jax.jit(Model.logits, static_argnums=0)
_scores = jax.jit(Model.scores, static_argnums=0)


class Opened:
    """A model with its parameters and, where the folder has one, its tokenizer.

    Attributes: `folder`, `model`, `params`, `cfg`, `tokenizer` (None without tokenizer.model).
    """

    def __init__(
        self, folder: Path, model: Model, params: Params, tokenizer: Path | None = None
    ) -> None:
        self.folder = folder
        self.model = model
        self.params = params
        self._tokenizer_path = tokenizer
        self._tokenizer: Tokenizer | None = None

    @property
    def cfg(self) -> Any:
        return self.model.cfg

    @property
    def tokenizer(self) -> Tokenizer | None:
        if self._tokenizer is None and self._tokenizer_path is not None:
            from internlm2_jax.data.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.load(self._tokenizer_path)
        return self._tokenizer

    def logits(self, ids: Sequence[int] | np.ndarray) -> Float[np.ndarray, "B T V"]:
        """Next-token logits, float32, of ids [T] or [B, T]; a single row is a batch of one."""
        return np.asarray(_logits(self.model, self.params, self._ids(ids)))

    def scores(self, ids: Sequence[int] | np.ndarray) -> Float[np.ndarray, "B T"]:
        """Reward-model scores, float32, at every position of ids [T] or [B, T]."""
        return np.asarray(_scores(self.model, self.params, self._ids(ids)))

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        weights: str = "auto",
    ) -> str | list[int]:
        """Continues a text, a list of ids, or a conversation (messages as in data/chat.py).

        Stops at the end-of-text or end-of-turn token.

        Args:
          weights: "auto" (as they are), "int8" or "int4" (models/quantise.py).

        Returns:
          Text for a text or a conversation; for ids the new ids, the stop id included.
        """
        stops: tuple[int, ...] = ()
        if self.tokenizer is not None:
            stops = (self.tokenizer.eos_id, self.tokenizer.im_end_id)
        as_ids = not isinstance(prompt, str) and all(
            isinstance(item, int | np.integer) for item in prompt
        )
        out = engine.generate(
            self.model,
            self.params,
            [list(prompt) if as_ids else self._encode(prompt)],  # type: ignore[arg-type]
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, top_p=top_p),
            seed=seed,
            stop_ids=stops,
            weights=weights,
        ).tokens[0]
        if as_ids or self.tokenizer is None:
            return out
        return self.tokenizer.decode(token for token in out if token not in stops)

    def summary(self) -> str:
        """A table of the parameters: path, shape, logical axes, count and bytes."""
        rows = [("parameter", "shape", "axes", "count", "bytes")]
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        axes = jax.tree.leaves(self.model.axes, is_leaf=lambda node: isinstance(node, tuple))
        total = total_bytes = 0
        for (path, leaf), names in zip(leaves, axes, strict=True):
            total, total_bytes = total + leaf.size, total_bytes + leaf.nbytes
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            shape = " x ".join(map(str, leaf.shape))
            shown = ", ".join(axis or "-" for axis in names)
            rows.append((name, shape, shown, f"{leaf.size:,}", f"{leaf.nbytes:,}"))
        rows.append(("total", "", "", f"{total:,}", f"{total_bytes:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                c.rjust(w) if i > 2 else c.ljust(w)
                for i, (c, w) in enumerate(zip(r, widths, strict=True))
            )
            for r in rows
        ]
        rule = "-" * len(lines[0])
        cfg = self.cfg
        title = (
            f"{self.folder}: InternLM2, {self.model.head} head, {cfg.num_layers} layers, "
            f"{cfg.num_heads} query and {cfg.num_kv_heads} key/value heads of {cfg.head_dim}, "
            f"{cfg.max_position_embeddings} positions, {cfg.dtype}"
        )
        return "\n".join([title, lines[0], rule, *lines[1:-1], rule, lines[-1]])

    def save_hf(
        self, folder: str | os.PathLike, dtype: str = "bfloat16", layout: Layout = "internlm2"
    ) -> None:
        """Writes a Hugging Face folder (models/convert.py), tokenizer.model included."""
        path = self._tokenizer_path
        convert.save_hf(folder, self.cfg, self.params, dtype, layout=layout, tokenizer=path)

    def save_stage(self, folder: str | os.PathLike) -> None:
        """Writes a new stage folder, which a stage takes as its `base`; whole or not at all."""
        from internlm2_jax.train.checkpoint import Checkpoints, save_model_json

        folder = Path(folder)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; choose a new one")
        with files.whole_folder(folder) as temporary:
            checkpoints = Checkpoints(temporary)
            checkpoints.save(0, {"params": self.params})
            checkpoints.close()
            save_model_json(temporary, self.cfg, self.model.head)
            if self._tokenizer_path is not None:
                shutil.copyfile(self._tokenizer_path, temporary / "tokenizer.model")

    def __repr__(self) -> str:
        size = self.cfg.num_params(self.model.head)
        return f"<{self.model.head} model of {size:,} parameters in {self.folder}>"

    def _ids(self, ids: Sequence[int] | np.ndarray) -> jax.Array:
        array = np.atleast_2d(np.asarray(ids))
        vocab = self.cfg.vocab_size
        if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
            raise UserError(f"ids must be integers [T] or [B, T]; got {array.dtype} {array.shape}")
        if array.min() < 0 or array.max() >= vocab:
            raise UserError(
                f"ids run from {array.min()} to {array.max()}; the vocabulary has {vocab}"
            )
        return jnp.asarray(array, jnp.int32)

    def _encode(self, prompt: Any) -> list[int]:
        if self.tokenizer is None:
            raise UserError(
                f"{self.folder} has no tokenizer.model, so text cannot be read; put one there or "
                "give a list of ids"
            )
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        from internlm2_jax.data import chat

        return chat.render(prompt, self.tokenizer, add_generation_prompt=True).ids


def open(folder: str | os.PathLike) -> Opened:
    """Opens a Hugging Face InternLM2 folder, a stage folder of a run, or a run folder.

    A run folder opens as the last of its finished stages that has a language model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a model folder or a run's stage folder")
    if (folder / "config.json").exists() and (
        any(folder.glob("*.safetensors")) or (folder / convert.INDEX).exists()
    ):
        cfg, params = convert.load_hf(folder)
        return Opened(folder, build(cfg, head_of(params)), params, _tokenizer_of(folder))
    stage = next((path for path in _stages(folder) if path == folder or _speaks(path)), folder)
    if not (stage / "model.json").exists():
        raise UserError(
            f"{folder} holds no model: expected config.json with *.safetensors, or model.json with "
            "checkpoints (a stage of a run)"
        )
    from internlm2_jax.train.checkpoint import load_model

    model, params = load_model(stage)
    return Opened(stage, model, params, _tokenizer_of(stage))


def _stages(folder: Path) -> list[Path]:
    """The stages of a run, the last first; of another folder, itself."""
    if not (folder / "pipeline.json").exists():
        return [folder]
    return [folder / name for name in reversed(files.read_json(folder / "pipeline.json")["stages"])]


def _speaks(stage: Path) -> bool:
    """Whether the stage has left a language model; a reward model does not count."""
    path = stage / "model.json"
    return path.exists() and files.read_json(path)["head"] == "lm"


def _tokenizer_of(folder: Path) -> Path | None:
    places = (folder, folder.absolute().parent / "tokenizer")
    return next((p / "tokenizer.model" for p in places if (p / "tokenizer.model").exists()), None)
