"""Hugging Face checkpoints, both ways, straight between the files and the mesh.

In the "internlm2" layout a layer has one `wqkv` matrix [(N + 2 K) H, D]. Its rows are K groups,
each the G query heads of the group, then the group's key head, then its value head (arXiv
2403.17297, section 2.2: tensor-parallel resizing is then a plain cut). Only this file knows that;
the model has q, k and v. The "llama" layout has them too. Public matrices are [out, in], ours are
[in, out].

Neither way holds a model in host memory: import reads of every tensor the slices that this host's
devices keep, a layer at a time; export fetches a tensor, writes it and forgets it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.models import host
from internlm2_jax.models.build import STACKED, Params, build, head_of
from internlm2_jax.models.config import Head, ModelConfig
from internlm2_jax.models.hf_config import Layout, architecture, from_hf, to_hf
from internlm2_jax.models.tensor_files import DTYPES, INDEX, Reader, Writer

__all__ = ["INDEX", "load_hf", "public", "save_hf"]

Path_ = tuple[str, ...]
Axes = tuple[int, ...]

# our path in a block -> public name in a layer; q, k, v of "internlm2" are in wqkv
_BLOCK: dict[Layout, dict[Path_, str]] = {
    "internlm2": {
        ("attention", "o"): "attention.wo",
        ("mlp", "gate"): "feed_forward.w1",
        ("mlp", "up"): "feed_forward.w3",
        ("mlp", "down"): "feed_forward.w2",
        ("attention_norm",): "attention_norm",
        ("mlp_norm",): "ffn_norm",
    },
    "llama": {
        ("attention", "q"): "self_attn.q_proj",
        ("attention", "k"): "self_attn.k_proj",
        ("attention", "v"): "self_attn.v_proj",
        ("attention", "o"): "self_attn.o_proj",
        ("mlp", "gate"): "mlp.gate_proj",
        ("mlp", "up"): "mlp.up_proj",
        ("mlp", "down"): "mlp.down_proj",
        ("attention_norm",): "input_layernorm",
        ("mlp_norm",): "post_attention_layernorm",
    },
}
_PREDICTION: dict[Path_, str] = {  # MiMo's, beside the names of a block
    ("token_norm",): "token_layernorm",
    ("hidden_norm",): "hidden_layernorm",
    ("project",): "input_proj",
    ("norm",): "final_layernorm",
}
_EMBED: dict[Layout, str] = {"internlm2": "model.tok_embeddings", "llama": "model.embed_tokens"}
_HEAD: dict[tuple[Layout, Head], str] = {
    ("internlm2", "lm"): "output",
    ("internlm2", "scalar"): "v_head",
    ("llama", "lm"): "lm_head",
}


def load_hf(
    folder: str | os.PathLike, shardings: Any = None, dtype: str = "float32"
) -> tuple[ModelConfig, Params]:
    """Reads a folder with config.json and safetensors (one file, or shards with an index).

    Args:
      shardings: tree of NamedSharding like the parameters (`sharding.shardings`); by default they
        lie on the default device. On several hosts every one calls this and reads its own slices.
      dtype: of the parameters, float32 or bfloat16, whatever the files hold.

    Returns:
      The configuration and the parameters; `build.head_of(params)` tells the head.

    Raises:
      UserError: naming the file, what is wrong and the mend: something is missing, damaged, of
        another shape or type, or of an architecture that hf_config.py does not know.
    """
    folder = Path(folder)
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"no parameter dtype {dtype!r}; there are float32, bfloat16")
    config = files.read_json(folder / "config.json")
    cfg, head = from_hf(config, str(folder / "config.json"))
    tensors = list(_tensors(cfg, head, architecture(config).layout))
    reader = Reader(folder)
    reader.check({tensor.name: tensor.shape for tensor in tensors})
    places = {} if shardings is None else dict(_flat(shardings))
    shapes = {path: leaf.shape for path, leaf in _flat(build(cfg, head).abstract)}
    loaded: dict[Path_, jax.Array] = {}
    with host.on_mesh(places):
        for tensor in tensors:
            for part in tensor.parts:
                place = places.get(part.path)
                read = partial(part.read, reader, tensor.name, np.dtype(DTYPES[dtype]))
                if tensor.layer is None:
                    loaded[part.path] = host.place(part.shape, place, read)
                    continue
                if part.path not in loaded:
                    loaded[part.path] = host.zeros(shapes[part.path], DTYPES[dtype], place)
                piece = host.place(part.shape, place and host.without_layer(part.path, place), read)
                whole = host.put(loaded[part.path], piece, tensor.layer)
                # One piece at a time: transfers that wait would hold their host buffers.
                loaded[part.path] = whole.block_until_ready()
    return cfg, _nest(loaded)


def save_hf(
    folder: str | os.PathLike,
    cfg: ModelConfig,
    params: Params,
    dtype: str = "bfloat16",
    *,
    layout: Layout = "internlm2",
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Writes a new folder that public code reads; whole or not at all.

    On several hosts every one calls this, and the first writes.

    Args:
      dtype: of the tensors, float32, bfloat16 or float16.
      layout: "internlm2" for InternLM2's own code, "llama" for anything that runs Llama.
      tokenizer: a tokenizer.model to copy beside the weights.

    Raises:
      UserError: the folder is not new, or the layout has no place for a part of the model.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise UserError(f"no tensor dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if layout not in _BLOCK:
        raise UserError(f"no layout {layout!r}; there are {', '.join(_BLOCK)}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose a new one")
    head = head_of(params)
    config = to_hf(cfg, head, dtype, layout)
    shapes = {tensor.name: tensor.shape for tensor in _tensors(cfg, head, layout)}
    with contextlib.ExitStack() as stack:
        writer = None
        if jax.process_index() == 0:
            temporary = stack.enter_context(files.whole_folder(folder))
            writer = stack.enter_context(contextlib.closing(Writer(temporary, shapes, dtype)))
        for name, value in public(cfg, params, layout):
            fetched = value()  # on every host: a sharded array takes all of them
            if writer is not None:
                writer.write(name, fetched)
        if writer is not None:
            writer.write_index()
            files.write_json(writer.folder / "config.json", config)
            if tokenizer is not None:
                shutil.copyfile(tokenizer, writer.folder / "tokenizer.model")
    host.wait_for_all("save_hf")  # only now may any of them read the folder


def public(
    cfg: ModelConfig, params: Params, layout: Layout = "internlm2"
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """(public name, value on the host) of every tensor, in the order of the public model."""
    flat = dict(_flat(params))
    for tensor in _tensors(cfg, head_of(params), layout):

        def value(tensor: Tensor = tensor) -> np.ndarray:
            out = np.empty(0)
            for part in tensor.parts:
                ours = part.rows_of(host.fetch(flat[part.path], tensor.layer))
                if len(tensor.parts) == 1:
                    return ours.reshape(tensor.shape)
                out = out if out.size else np.empty(tensor.shape, ours.dtype)
                for start, block in zip(part.starts, ours, strict=True):
                    out[start : start + part.rows] = block.reshape(part.rows, *out.shape[1:])
            return out

        yield tensor.name, value


# ------------------------------------------------------------- which array is where in which tensor


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our arrays, without the layer axis, as rows and columns of a public tensor.

    path, shape: ours.
    outs, ins: our axes that make the rows, and the columns, of the public tensor.
    starts: public row at which each entry of the axis outs[0] begins.
    """

    path: Path_
    shape: tuple[int, ...]
    outs: tuple[int, ...]
    ins: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Public rows of one entry of outs[0]."""
        return math.prod(self.shape[axis] for axis in self.outs[1:])

    @property
    def public_shape(self) -> tuple[int, ...]:
        """Shape of a public tensor that holds nothing else."""
        columns = math.prod(self.shape[axis] for axis in self.ins)
        return (self.rows * self.shape[self.outs[0]], *((columns,) if self.ins else ()))

    def rows_of(self, value: np.ndarray) -> np.ndarray:
        """Our array with the axes in the public order."""
        return value.transpose(*self.outs, *self.ins)

    def read(
        self, reader: Reader, name: str, dtype: np.dtype, index: tuple[slice, ...]
    ) -> np.ndarray:
        """Ours[index] from the files, in `dtype`; no rows or columns but its own are read."""
        bounds = [s.indices(size)[:2] for s, size in zip(index, self.shape, strict=True)]
        columns = []
        if self.ins:
            each = math.prod(self.shape[axis] for axis in self.ins[1:])
            first, last = bounds[self.ins[0]]
            columns = [slice(first * each, last * each)]
        first, last = bounds[self.outs[0]]
        blocks: list[list[int]] = []  # neighbouring rows are read at once
        for start in self.starts[first:last]:
            if blocks and blocks[-1][1] == start:
                blocks[-1][1] = start + self.rows
            else:
                blocks.append([start, start + self.rows])
        found = [reader.read(name, slice(*rows), *columns).astype(dtype) for rows in blocks]
        joined = found[0] if len(found) == 1 else np.concatenate(found)
        order = (*self.outs, *self.ins)
        cut = {self.outs[0], *self.ins[:1]}  # by the reading above
        sizes = [bounds[a][1] - bounds[a][0] if a in cut else self.shape[a] for a in order]
        ours = joined.reshape(sizes).transpose(np.argsort(order))
        return ours[tuple(slice(None) if a in cut else index[a] for a in range(len(bounds)))]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A public tensor: its name, its shape, the layer of ours it belongs to, what it holds."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    parts: tuple[Part, ...]


def _tensors(cfg: ModelConfig, head: Head, layout: Layout) -> Iterator[Tensor]:
    """Every public tensor of a model, in the order of the public model."""
    shapes = {path: leaf.shape for path, leaf in _flat(build(cfg, head).abstract)}

    def plain(name: str, path: Path_, layer: int | None = None) -> Iterator[Tensor]:
        for kind in ("weight", "bias"):
            if (*path, kind) in shapes:
                part = _part((*path, kind), shapes[*path, kind])
                yield Tensor(f"{name}.{kind}", part.public_shape, layer, (part,))

    def block(prefix: str, path: Path_, layer: int) -> Iterator[Tensor]:
        if layout == "internlm2":
            yield from _wqkv(prefix, path, layer, cfg, shapes)
        for ours, theirs in _BLOCK[layout].items():
            yield from plain(prefix + theirs, (*path, *ours), layer)

    yield from plain(_EMBED[layout], ("embed",))
    for layer in range(cfg.num_layers):
        yield from block(f"model.layers.{layer}.", ("layers",), layer)
    yield from plain("model.norm", ("norm",))
    for layer in range(cfg.num_mtp_layers):
        prefix = f"model.mtp_layers.{layer}."
        for ours, theirs in _PREDICTION.items():
            yield from plain(prefix + theirs, ("mtp", *ours), layer)
        yield from block(prefix, ("mtp", "block"), layer)
    if ("head", "weight") in shapes:
        yield from plain(_HEAD[layout, head], ("head",))


def _part(path: Path_, shape: tuple[int, ...]) -> Part:
    """How an array that has a public tensor for itself lies in it."""
    if path[0] in STACKED:
        shape = shape[1:]
    axes = tuple(range(len(shape)))
    outs: Axes
    ins: Axes
    if path[-1] == "bias" or len(shape) == 1:
        outs, ins = axes, ()
    elif path[0] == "embed":  # a table of rows, in both worlds
        outs, ins = axes[:1], axes[1:]
    else:
        inputs = 2 if path[-2] == "o" else 1
        outs, ins = axes[inputs:], axes[:inputs]
    rows = math.prod(shape[axis] for axis in outs[1:])
    return Part(path, shape, outs, ins, tuple(range(0, shape[outs[0]] * rows, rows)))


def _wqkv(
    prefix: str, path: Path_, layer: int, cfg: ModelConfig, shapes: dict[Path_, tuple[int, ...]]
) -> Iterator[Tensor]:
    """The fused tensors of a layer. In group g, slot s begins at row (g (G + 2) + s) H."""
    group, h = cfg.num_heads // cfg.num_kv_heads, cfg.head_dim
    begin = lambda g, slot: (g * (group + 2) + slot) * h  # noqa: E731
    groups = range(cfg.num_kv_heads)
    starts = {
        "q": tuple(begin(g, slot) for g in groups for slot in range(group)),
        "k": tuple(begin(g, group) for g in groups),
        "v": tuple(begin(g, group + 1) for g in groups),
    }
    for kind in ("weight", "bias"):
        if (*path, "attention", "q", kind) not in shapes:
            continue
        parts = []
        for name, rows in starts.items():
            ours = (*path, "attention", name, kind)
            parts.append(dataclasses.replace(_part(ours, shapes[ours]), starts=rows))
        size = sum(part.public_shape[0] for part in parts)
        shape = (size, *parts[0].public_shape[1:])
        yield Tensor(f"{prefix}attention.wqkv.{kind}", shape, layer, tuple(parts))


def _flat(tree: Params) -> list[tuple[Path_, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(key.key for key in path), leaf) for path, leaf in leaves]


def _nest(flat: dict[Path_, Any]) -> Params:
    tree: Params = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree
