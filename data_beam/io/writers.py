"""Deterministic output: ArrayRecord shards and compressed JSON lines.

A shard is written by one worker from one group, under a temporary name, and renamed: a retried or
doubled bundle writes the same bytes to the same name.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import zstandard
from array_record.python import array_record_module

from internlm2_jax.errors import UserError
from internlm2_jax.files import whole_file

DOCUMENTS_OPTIONS = "group_size:64,zstd:3"


def shard_name(split: str, source: str, shard: int, shards: int) -> str:
    return f"{split}-{source}-{shard:05d}-of-{shards:05d}.arrayrecord"


def write_array_record(path: Path, records: Iterable[bytes], options: str) -> None:
    """Writes one ArrayRecord file; an empty one is valid."""
    with whole_file(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), options)
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()


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


def read_lines_zst(path: Path) -> list[bytes]:
    with open(path, "rb") as handle:
        return zstandard.ZstdDecompressor().stream_reader(handle).read().splitlines()


def file_digest(path: Path) -> str:
    """BLAKE2b-128 of a file, in hexadecimal, for the manifest."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
