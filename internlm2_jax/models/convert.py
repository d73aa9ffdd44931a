"""Hugging Face InternLM2 checkpoints, both ways.

A public layer has one `wqkv` matrix [(N + 2 K) H, D]. Its rows are K groups, each the G query
heads of the group, then the group's key head, then its value head (arXiv 2403.17297, section 2.2:
tensor-parallel resizing is then a plain cut). Only this file knows that; the model has q, k and v.
Public matrices are [out, in], ours are [in, out].
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.models.build import Params, build, head_of
from internlm2_jax.models.config import ModelConfig, from_hf, to_hf

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 2**30
_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# our path below a layer -> public name below model.layers.N
_LAYER: dict[tuple[str, ...], str] = {
    ("attention_norm", "weight"): "attention_norm.weight",
    ("attention", "o", "weight"): "attention.wo.weight",
    ("attention", "o", "bias"): "attention.wo.bias",
    ("mlp_norm", "weight"): "ffn_norm.weight",
    ("mlp", "gate", "weight"): "feed_forward.w1.weight",
    ("mlp", "up", "weight"): "feed_forward.w3.weight",
    ("mlp", "down", "weight"): "feed_forward.w2.weight",
}
_TOP: dict[tuple[str, ...], str] = {
    ("embed", "weight"): "model.tok_embeddings.weight",
    ("norm", "weight"): "model.norm.weight",
}
_HEADS = {"lm": "output.weight", "scalar": "v_head.weight"}


def load_hf(folder: str | os.PathLike) -> tuple[ModelConfig, Params]:
    """Reads a folder with config.json and safetensors (one file, or shards with an index).

    Returns:
      The configuration and float32 parameters; `build.head_of(params)` tells the head.

    Raises:
      UserError: naming the file and the mend, when something is missing, damaged or of another
        architecture.
    """
    folder = Path(folder)
    cfg, head = from_hf(files.read_json(folder / "config.json"), str(folder / "config.json"))
    abstract = build(cfg, head).abstract
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        loaded: dict[tuple[str, ...], np.ndarray] = {}
        for path, leaf in _flat(abstract):
            if path[0] != "layers":
                name = _TOP.get(path, _HEADS[head])
                loaded[path] = _to_ours(tensors.take(name), leaf.shape, name, tensors)
            elif path[1:] in _LAYER:
                loaded[path] = np.empty(leaf.shape, np.float32)
                for layer, out in enumerate(loaded[path]):
                    name = f"model.layers.{layer}.{_LAYER[path[1:]]}"
                    out[...] = _to_ours(tensors.take(name), out.shape, name, tensors)
            else:  # q, k, v
                loaded[path] = np.empty(leaf.shape, np.float32)
        for layer in range(cfg.num_layers):
            for kind in ("weight", "bias") if cfg.bias else ("weight",):
                name = f"model.layers.{layer}.attention.wqkv.{kind}"
                parts = _split_wqkv(tensors.take(name), cfg, kind, name, tensors)
                for part, value in zip("qkv", parts, strict=True):
                    loaded["layers", "attention", part, kind][layer] = value
        tensors.expect_all_taken()
    return cfg, _nest({path: jax.numpy.asarray(value) for path, value in loaded.items()})


def save_hf(
    folder: str | os.PathLike,
    cfg: ModelConfig,
    params: Params,
    dtype: str = "bfloat16",
    *,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Writes a new folder that Hugging Face's InternLM2 code reads; whole or not at all.

    Args:
      dtype: of the tensors, float32, bfloat16 or float16.
      tokenizer: a tokenizer.model to copy beside the weights.
    """
    folder = Path(folder)
    if dtype not in _DTYPES:
        raise UserError(f"no tensor dtype {dtype!r}; there are {', '.join(_DTYPES)}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose a new one")
    head = head_of(params)
    config = to_hf(cfg, head, dtype)
    sizes = {name: size * _DTYPES[dtype].itemsize for name, size, _ in public(cfg, params)}
    shards = _shards(sizes)
    with files.whole_folder(folder) as temporary:
        pending: dict[str, np.ndarray] = {}
        for name, _, value in public(cfg, params):
            pending[name] = np.ascontiguousarray(value().astype(_DTYPES[dtype]))
            shard = shards[name]
            if sum(file == shard for file in shards.values()) == len(pending):
                save_file(pending, temporary / shard, metadata={"format": "pt"})
                pending = {}
        if len(set(shards.values())) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": shards}
            files.write_json(temporary / INDEX, index)
        files.write_json(temporary / "config.json", config)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / "tokenizer.model")


class _Tensors:
    """The tensors of a folder by name; each is read when it is taken."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        if (folder / INDEX).exists():
            index = files.read_json(folder / INDEX)
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict):
                raise UserError(f"{folder / INDEX} has no weight_map; download it again")
            names = sorted(set(weight_map.values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
            if not names:
                raise UserError(f"{folder} has no *.safetensors file; download the weights")
        self._files: dict[str, tuple[Path, Any]] = {}
        for name in names:
            path = folder / name
            try:
                handle = stack.enter_context(safe_open(path, "np"))
            except FileNotFoundError as error:
                raise UserError(
                    f"{path} is missing; download the shard that {INDEX} names"
                ) from error
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged ({error}); download it again") from error
            self._files |= dict.fromkeys(handle.keys(), (path, handle))
        self._left = {name for name in self._files if not name.endswith("rotary_emb.inv_freq")}

    def where(self, name: str) -> Path:
        return self._files[name][0] if name in self._files else self.folder

    def take(self, name: str) -> np.ndarray:
        if name not in self._files:
            raise UserError(
                f"{self.folder} has no tensor {name}; are all shards there, and config.json theirs?"
            )
        path, handle = self._files[name]
        self._left.discard(name)
        value = handle.get_tensor(name)
        if value.dtype not in _DTYPES.values():
            raise UserError(
                f"{path}: tensor {name} is {value.dtype}; only {', '.join(_DTYPES)} are read"
            )
        return value

    def expect_all_taken(self) -> None:
        if self._left:
            name = min(self._left)
            raise UserError(
                f"{self.where(name)} has tensor {name}, which this InternLM2 has no place for; "
                "does config.json belong to these weights?"
            )


def _to_ours(value: np.ndarray, shape: tuple[int, ...], name: str, tensors: _Tensors) -> np.ndarray:
    """A public tensor as ours: matrices are transposed, [N H] rows or columns become [N, H]."""
    is_table = name == _TOP["embed", "weight"]
    kept = is_table or len(shape) == 1
    expected = shape if kept else (shape[-1], int(np.prod(shape[:-1])))
    if value.shape != expected:
        _wrong_shape(tensors, name, value.shape, expected)
    ours = value if kept else value.T
    return ours.astype(np.float32).reshape(shape)


def _split_wqkv(
    value: np.ndarray, cfg: ModelConfig, kind: str, name: str, tensors: _Tensors
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [D, N, H], k [D, K, H], v [D, K, H] (biases without D) of a fused matrix."""
    k, h, group = cfg.num_kv_heads, cfg.head_dim, cfg.num_heads // cfg.num_kv_heads
    rest = (cfg.embed_dim,) if kind == "weight" else ()
    expected = (k * (group + 2) * h, *rest)
    if value.shape != expected:
        _wrong_shape(tensors, name, value.shape, expected)
    slots = value.astype(np.float32).reshape(k, group + 2, h, *rest)
    parts = slots[:, :group].reshape(k * group, h, *rest), slots[:, -2], slots[:, -1]
    q, k_, v = (np.moveaxis(part, -1, 0) if rest else part for part in parts)
    return q, k_, v


def _fuse_wqkv(attention: dict[str, Any], layer: int, kind: str, cfg: ModelConfig) -> np.ndarray:
    parts = (np.asarray(attention[part][kind][layer]) for part in "qkv")
    q, k, v = (np.moveaxis(part, 0, -1) if kind == "weight" else part for part in parts)
    groups, rest = cfg.num_kv_heads, q.shape[1:]
    slots = [q.reshape(groups, -1, *rest), k[:, None], v[:, None]]
    return np.concatenate(slots, axis=1).reshape(-1, *rest[1:])


def public(cfg: ModelConfig, params: Params) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
    """(public name, number of entries, value) of every tensor, in the order of the public model."""

    def ours(leaf: Any, name: str) -> Callable[[], np.ndarray]:
        def value() -> np.ndarray:
            array = np.asarray(leaf)
            if array.ndim == 1 or name == _TOP["embed", "weight"]:
                return array
            return array.reshape(-1, array.shape[-1]).T

        return value

    flat = dict(_flat(params))
    yield (
        (n := _TOP["embed", "weight"]),
        flat["embed", "weight"].size,
        ours(params["embed"]["weight"], n),
    )
    attention = params["layers"]["attention"]
    for layer in range(cfg.num_layers):
        prefix = f"model.layers.{layer}."
        for kind in attention["q"]:
            size = sum(attention[part][kind][layer].size for part in "qkv")
            fuse = lambda layer=layer, kind=kind: _fuse_wqkv(attention, layer, kind, cfg)  # noqa: E731
            yield f"{prefix}attention.wqkv.{kind}", size, fuse
        for path, name in _LAYER.items():
            leaf = flat.get(("layers", *path))
            if leaf is not None:
                yield prefix + name, leaf[layer].size, ours(leaf[layer], name)
    yield (
        (n := _TOP["norm", "weight"]),
        flat["norm", "weight"].size,
        ours(flat["norm", "weight"], n),
    )
    if "head" in params:
        name = _HEADS[head_of(params)]
        yield name, flat["head", "weight"].size, ours(flat["head", "weight"], name)


def _shards(sizes: dict[str, int]) -> dict[str, str]:
    """File of every tensor: filled in order up to SHARD_BYTES each."""
    number, used, numbers = 0, 0, {}
    for name, size in sizes.items():
        if used and used + size > SHARD_BYTES:
            number, used = number + 1, 0
        numbers[name], used = number, used + size
    if number == 0:
        return dict.fromkeys(sizes, SINGLE)
    return {n: f"model-{i + 1:05d}-of-{number + 1:05d}.safetensors" for n, i in numbers.items()}


def _wrong_shape(tensors: _Tensors, name: str, found: tuple, expected: tuple) -> None:
    raise UserError(
        f"{tensors.where(name)}: tensor {name} is {list(found)}, but config.json makes it "
        f"{list(expected)}; the two belong to different models"
    )


def _flat(tree: Params) -> list[tuple[tuple[str, ...], Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(key.key for key in path), leaf) for path, leaf in leaves]


def _nest(flat: dict[tuple[str, ...], Any]) -> Params:
    tree: Params = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree
