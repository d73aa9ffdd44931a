"""Deterministic output: ArrayRecord shards and compressed JSON lines.

A shard is written by one worker from one group, under a temporary name, and renamed: a retried or
doubled bundle writes the same bytes to the same name.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard
from array_record.python import array_record_module

from internlm2_jax.errors import UserError
from internlm2_jax.files import whole_file

DOCUMENTS_OPTIONS = "group_size:64,zstd:3"


def shard_name(split: str, source: str, shard: int, shards: int) -> str:
    return f"{split}-{source}-{shard:05d}-of-{shards:05d}.arrayrecord"


@contextlib.contextmanager
def array_record_writer(path: Path, options: str) -> Iterator[Any]:
    """An ArrayRecord writer on `path`: `.write(record)`."""
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    try:
        yield writer
    finally:
        writer.close()


def write_array_record(path: Path, records: Iterable[bytes], options: str) -> None:
    """Writes one ArrayRecord file, whole or not at all; an empty one is valid."""
    with whole_file(path) as temporary, array_record_writer(temporary, options) as writer:
        for record in records:
            writer.write(record)


def read_array_record(path: Path, start: int = 0, end: int | None = None) -> Sequence[bytes]:
    """Records [start, end) of a file we wrote. A damaged one is a UserError."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the job that writes this folder again")
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        if not reader.ok():
            raise UserError(f"{path} is not a whole ArrayRecord file; delete its folder, run again")
        count = reader.num_records() if end is None else end
        return reader.read(list(range(start, count))) if count > start else []
    except (RuntimeError, IndexError, ValueError) as error:
        raise UserError(f"{path} is damaged; delete its folder and run the job again") from error
    finally:
        with contextlib.suppress(RuntimeError):  # a damaged file reports itself again
            reader.close()


def iter_array_record(path: Path, batch: int = 64) -> Iterator[bytes]:
    """All records of a file we wrote, `batch` in memory at a time. A damaged one is a UserError."""
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        if not reader.ok():
            raise UserError(f"{path} is not a whole ArrayRecord file; delete its folder, run again")
        count = reader.num_records()
        for start in range(0, count, batch):
            yield from reader.read(list(range(start, min(start + batch, count))))
    except (RuntimeError, IndexError, ValueError) as error:
        raise UserError(f"{path} is damaged; delete its folder and run the job again") from error
    finally:
        with contextlib.suppress(RuntimeError):  # a damaged file reports itself again
            reader.close()


def write_lines_zst(path: Path, lines: Iterable[bytes]) -> None:
    """Zstandard-compressed lines, a newline after each."""
    compressor = zstandard.ZstdCompressor(level=3)
    with (
        whole_file(path) as temporary,
        open(temporary, "wb") as handle,
        compressor.stream_writer(handle, closefd=False) as stream,
    ):
        for line in lines:
            stream.write(line + b"\n")


def read_lines_zst(path: Path) -> Iterator[bytes]:
    """The lines of a compressed file, a block in memory at a time. A file that is cut off or
    damaged is a UserError (zstandard's own `stream_reader` would end in silence)."""
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    rest = b""
    with open(path, "rb") as handle:
        try:
            while block := handle.read(1 << 16):
                *lines, rest = (rest + decompressor.decompress(block)).split(b"\n")
                yield from lines
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is damaged; delete it and run the job again") from error
    if rest or not decompressor.eof:
        raise UserError(f"{path} is damaged; delete it and run the job again")


def file_digest(path: Path) -> str:
    """BLAKE2b-128 of a file, in hexadecimal, for the manifest."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
