"""The documents of a corpus folder that `data_beam` wrote."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from array_record.python import array_record_module

from internlm2_jax import files
from internlm2_jax.errors import UserError

_BATCH = 64


class TextDocument(NamedTuple):
    """What training needs of a document: where it came from and what it says."""

    source: str
    path: str
    text: str


def read(folder: str | os.PathLike, split: str) -> Iterator[TextDocument]:
    """Documents of `split` ("train", "validation") in the order of the shards.

    Errors: UserError when the folder holds no corpus or a shard is damaged.
    """
    manifest = files.read_json(Path(folder) / "manifest.json")
    for shard in manifest["shards"]:
        if shard["name"].startswith(f"{split}-"):
            yield from _shard(Path(folder) / shard["name"], shard["documents"])


def _shard(path: Path, expected: int) -> Iterator[TextDocument]:
    damaged = UserError(f"{path} is damaged; make the corpus again (--only corpus --redo in a run)")
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
    except RuntimeError as error:
        raise damaged from error
    try:
        if not reader.ok() or reader.num_records() != expected:
            raise damaged
        for start in range(0, expected, _BATCH):
            for record in reader.read(list(range(start, min(start + _BATCH, expected)))):
                row = files.parse_json(record, f"{path}: record after {start}")
                yield TextDocument(row["source"], row["path"], row["text"])
    except (RuntimeError, KeyError) as error:
        raise damaged from error
    finally:
        with contextlib.suppress(RuntimeError):  # a damaged file reports itself again
            reader.close()
