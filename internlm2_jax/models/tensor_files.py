"""Folders of safetensors files, read a slice at a time and written a tensor at a time.

A file is: 8 bytes, the length of the header; the header, JSON of {name: {"dtype", "shape",
"data_offsets"}}; the tensors. Several files come with an index that maps every name to its file.
The format is read here, not by its library, because its numpy reader holds a file open as a whole
and its writer wants all tensors of a file in memory, twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from internlm2_jax import files
from internlm2_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 2**30
MAX_HEADER = 100 * 2**20  # as the public reader has it

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BY_TAG = {_TAGS[name]: dtype for name, dtype in DTYPES.items()}


class Reader:
    """The tensors of a folder. Nothing but headers is read before `read`.

    One file is mapped at a time, so pages of at most one shard are resident.

    Raises:
      UserError: on opening, for a file that is missing, truncated or damaged, and an index that
        does not agree with the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        self._mapped: tuple[Path, np.ndarray] | None = None
        index = self._index()
        names = sorted(set(index.values())) or sorted(p.name for p in folder.glob("*.safetensors"))
        if not names:
            raise UserError(f"{folder} has no *.safetensors file; download the weights")
        for name in names:
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing; download the shard that {INDEX} names")
            for tensor, entry in _header(path).items():
                if tensor in self._entries:
                    other = self._entries[tensor][0].name
                    raise UserError(f"{path} and {other} both have tensor {tensor}; remove one")
                self._entries[tensor] = (path, *entry)
        for tensor, name in index.items():
            found = self._entries.get(tensor)
            if found is None or found[0].name != name:
                where = "no file has it" if found is None else f"{found[0].name} has it"
                raise UserError(
                    f"{folder / INDEX} puts tensor {tensor} into {name}, but {where}; "
                    "download the folder again"
                )

    def _index(self) -> dict[str, str]:
        if not (self.folder / INDEX).exists():
            return {}
        index = files.read_json(self.folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{self.folder / INDEX} has no weight_map; download it again")
        return names

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compares with the names and shapes that config.json makes, before any weight is read.

        Raises:
          UserError: a tensor is missing, has no place, or has another shape or type.
        """
        missing = [name for name in expected if name not in self._entries]
        if missing:
            raise UserError(
                f"{self.folder} has no tensor {missing[0]}"
                + (f" nor {len(missing) - 1} others" if len(missing) > 1 else "")
                + "; are all shards there, and is config.json theirs?"
            )
        for name, (path, tag, shape, _) in self._entries.items():
            if name not in expected:
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # old files store what rope.py computes
                raise UserError(
                    f"{path} has tensor {name} {list(shape)}, which the model of config.json has "
                    "no place for; do the two belong together?"
                )
            if shape != tuple(expected[name]):
                raise UserError(
                    f"{path}: tensor {name} is {list(shape)}, but config.json makes it "
                    f"{list(expected[name])}; the two belong to different models"
                )
            if tag not in _BY_TAG:
                raise UserError(
                    f"{path}: tensor {name} is {tag}; only {', '.join(_BY_TAG)} are read, so "
                    "convert it first"
                )

    def read(self, name: str, *index: slice) -> np.ndarray:
        """A copy of a part of one tensor, in its own dtype."""
        path, tag, shape, start = self._entries[name]
        if self._mapped is None or self._mapped[0] != path:
            self._mapped = None  # unmaps the file before
            self._mapped = path, np.memmap(path, np.uint8, "r")
        dtype = _BY_TAG[tag]
        data = self._mapped[1][start : start + math.prod(shape) * dtype.itemsize]
        return np.array(data.view(dtype).reshape(shape)[index])


class Writer:
    """Writes the tensors of a model into a folder, shard by shard; each goes to the disk at once.

    The bytes are those of the public writer: in a file, tensors lie in the order of their names.

    Args:
      shapes: name -> shape, in the order in which they will be written.
      dtype: of all tensors; a name in `DTYPES`.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        self.folder, self.dtype, self.shapes = folder, dtype, shapes
        item = DTYPES[dtype].itemsize
        self.sizes = {name: math.prod(shape) * item for name, shape in shapes.items()}
        self.shards = _assign(self.sizes)
        self._left = list(shapes)
        self._file: BinaryIO | None = None
        self._starts: dict[str, int] = {}

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes the next tensor, in any float dtype; names come in the order of `shapes`."""
        if name != self._left[0] or value.shape != tuple(self.shapes[name]):
            raise ValueError(f"{name} {value.shape} is not next: {self._left[:1]} {self.shapes}")
        if self._file is None:
            self._open(self.shards[name])
        assert self._file is not None
        self._left.pop(0)
        self._file.seek(self._starts[name])
        whole = np.ascontiguousarray(value, DTYPES[self.dtype]).reshape(-1)
        self._file.write(whole.view(np.uint8).data)
        if not self._left or self.shards[self._left[0]] != self.shards[name]:
            self.close()

    def write_index(self) -> None:
        """The index, when there are several shards."""
        if len(set(self.shards.values())) > 1:
            total = {"total_size": sum(self.sizes.values())}
            index = {"metadata": total, "weight_map": self.shards}
            files.write_json(self.folder / INDEX, index)

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _open(self, shard: str) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in sorted(name for name, file in self.shards.items() if file == shard):
            offsets = [at, at := at + self.sizes[name]]
            shape = list(self.shapes[name])
            header[name] = {"dtype": _TAGS[self.dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        entries = {name: entry for name, entry in header.items() if name in self.shapes}
        self._starts = {n: 8 + len(text) + e["data_offsets"][0] for n, e in entries.items()}
        self._file = open(self.folder / shard, "wb")  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """name -> (dtype tag, shape, first byte) of a file whose size fits its header."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise UserError(
                f"{path} is damaged: it has {size:,} bytes and its header would take {length:,}; "
                "download it again"
            )
        data = file.read(length)
    try:
        header = json.loads(data)
        header.pop("__metadata__", None)
        entries, end = {}, 0
        for name, entry in header.items():
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            tag = entry["dtype"]
            dtype = _BY_TAG.get(tag)
            if dtype is not None and last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name} has {last - first} bytes for {list(shape)} {tag}")
            if not 0 <= first <= last:
                raise ValueError(f"tensor {name} lies at {first} to {last}")
            entries[name] = (tag, shape, 8 + length + first)
            end = max(end, last)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is damaged: its header is not readable ({reason}); download it again"
        ) from error
    if size != 8 + length + end:
        raise UserError(
            f"{path} is damaged: it has {size:,} bytes, its header describes {8 + length + end:,}; "
            "download it again"
        )
    return entries


def _assign(sizes: Mapping[str, int]) -> dict[str, str]:
    """File of every tensor: filled in order up to SHARD_BYTES each."""
    number, used, numbers = 0, 0, {}
    for name, size in sizes.items():
        if used and used + size > SHARD_BYTES:
            number, used = number + 1, 0
        numbers[name], used = number, used + size
    if number == 0:
        return dict.fromkeys(sizes, SINGLE)
    return {n: f"model-{i + 1:05d}-of-{number + 1:05d}.safetensors" for n, i in numbers.items()}
