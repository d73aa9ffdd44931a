"""Shuffles of numpy records: one Beam element is a piece of an array, not a record.

A Beam element costs microseconds and, in memory, hundreds of bytes; a duplicate search moves
hundreds of records per document. So every worker sorts what it has by destination and sends pieces
of megabytes. A destination is a shard or one of the partitions of a key space.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_beam import runners
from data_beam.io import storage
from data_beam.kernels.tokens import mix64
from internlm2_jax.files import explain_disk_errors

beam = runners.beam
# Runners limit an element (Flink's sort buffer, gRPC messages).
PIECE_BYTES = 4 << 20
TYPE = beam.typehints.KV[int, bytes]
Blob = tuple[int, bytes]


def route(table: np.ndarray, destinations: np.ndarray) -> Iterator[Blob]:
    """The records of `table`, in pieces, each to its destination."""
    if not len(table):
        return
    order = np.argsort(destinations, kind="stable")
    table, destinations = table[order], destinations[order]
    bounds = np.flatnonzero(np.append(True, destinations[1:] != destinations[:-1]))
    step = max(1, PIECE_BYTES // table.itemsize)
    for begin, end in zip(bounds, np.append(bounds[1:], len(table)), strict=True):
        for start in range(begin, end, step):
            yield int(destinations[begin]), table[start : min(start + step, end)].tobytes()


def gather(pieces: Iterable[bytes], dtype: np.dtype, kept: bool = False) -> np.ndarray:
    """The records of a group, in no particular order. `kept`: the pieces come from `Keep`."""
    return np.frombuffer(b"".join(map(_read, pieces) if kept else pieces), dtype)


def keep_folder(
    folder: str, num_bytes: int, max_memory: int, beam_options: Sequence[str]
) -> str | None:
    """Where `Keep` should put what a job shuffles, None = nowhere: the runner can do it."""
    in_memory = runners.is_local(beam_options) and not storage.is_remote(folder)
    return os.path.join(folder, "shuffle") if in_memory and num_bytes > max_memory else None


class Keep(beam.DoFn):
    """Pieces -> the same, with the content in a file below `folder` and the file's name in its
    place: the runner of this process keeps all that it shuffles in memory."""

    def __init__(self, folder: str):
        super().__init__()
        self.folder = Path(folder)

    def process(self, blob):
        destination, piece = blob
        # Named by content, so that a bundle that is run again writes the same file.
        name = hashlib.blake2b(piece, digest_size=16).hexdigest()
        path = self.folder / f"{destination:06d}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with explain_disk_errors(path):
            temporary = path.with_name(f"{name}.{os.getpid()}.{threading.get_ident()}")
            temporary.write_bytes(piece)
            os.replace(temporary, path)
        yield destination, os.fsencode(path)


def _read(name: bytes) -> bytes:
    return Path(os.fsdecode(name)).read_bytes()


def partition_of(keys: np.ndarray, partitions: int) -> np.ndarray:
    """[n] int64. The keys need not be random."""
    return (mix64(keys.astype(np.uint64)) % np.uint64(partitions)).astype(np.int64)


def partitions_for(records: int, record_bytes: int, partition_bytes: int) -> int:
    return max(1, -(-records * record_bytes // partition_bytes))


def par_do(fn: beam.DoFn, main: str = "", **tags: Any) -> Any:
    """A ParDo from whatever to pieces, with tagged outputs of the given types. Declared types give
    the shuffle its fast coders, and save Beam from inferring them from bytecode."""
    step = beam.ParDo(fn).with_output_types(TYPE, **tags)
    return step.with_outputs(*tags, main=main) if tags else step


def tagged(tag: str, blobs: Iterable[Blob], kind: bytes = b"") -> Iterator[Any]:
    """Pieces for a tagged output; `kind` goes before each."""
    for destination, piece in blobs:
        yield beam.pvalue.TaggedOutput(tag, (destination, kind + piece))


def tally(name: str, value: int) -> Any:
    """A number for the job's totals, on the output "tally"."""
    return beam.pvalue.TaggedOutput("tally", (0, orjson.dumps((name, int(value)))))
