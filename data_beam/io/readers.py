"""Documents out of files. Nothing a file contains stops the job: what cannot be read becomes a
`Drop` of stage "read" that names the reason.

Record files: JSON lines (plain, .gz, .zst) and ArrayRecord, one object a record with "text" or
"content" and any other field of `Document`. A damaged compressed file gives the records before the
damage and one drop; an ArrayRecord loses the damaged group of records.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import zstandard
from array_record.python import array_record_module

from data_beam.io import extract
from data_beam.io.listing import FileRef
from data_beam.schema import Document, Drop, document_id
from data_beam.transforms.normalize import NotText, decode

# A document larger than this travels badly through a shuffle.
MAX_DOCUMENT_BYTES = 32 << 20
_ARRAY_RECORD_BATCH = 64
_FIELDS = frozenset(Document._fields) - {"id", "text", "meta"}


class Unreadable(Exception):
    """Carries the reason of a drop."""


def read(file: FileRef) -> Iterator[Document | Drop]:
    """The documents of one file, and a drop for each that could not be read."""
    number = 0  # of the next document, which damage would have hit
    try:
        if file.kind == "records":
            for record in _records(file.location):
                yield _from_record(record, file, number)
                number += 1
        else:
            yield _from_file(file)
    except Unreadable as reason:
        yield Drop(document_id(file.root, file.path, number), "read", str(reason))
    except OSError:
        yield Drop(document_id(file.root, file.path, number), "read", "unreadable")


# --- whole files ------------------------------------------------------------------------------


class _ZlibReader(io.RawIOBase):
    """Decompresses gzip like gzip.GzipFile, but gives what stands before damage, then raises."""

    def __init__(self, handle: BinaryIO):
        self._handle, self._inflate, self._pending = handle, zlib.decompressobj(31), b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._handle.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            if self._inflate.eof:
                rest = self._inflate.unused_data or self._handle.read(1 << 16)
                if not rest.strip(b"\0"):
                    return 0
                self._inflate = zlib.decompressobj(31)
            else:
                rest = self._handle.read(1 << 16)
                if not rest:
                    raise Unreadable("corrupt_gzip")
            try:
                self._pending = self._inflate.decompress(rest)
            except zlib.error as error:
                raise Unreadable("corrupt_gzip") from error
        size = min(len(buffer), len(self._pending))
        buffer[:size], self._pending = self._pending[:size], self._pending[size:]
        return size


class _ZstdReader(io.RawIOBase):
    """The same for Zstandard: an unfinished frame is damage."""

    def __init__(self, handle: BinaryIO):
        self._handle, self._pending = handle, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._handle.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            rest = self._frame.unused_data if self._frame.eof else b""
            rest = rest or self._handle.read(1 << 16)
            if self._frame.eof:
                if not rest:
                    return 0
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            elif not rest:
                raise Unreadable("corrupt_zstd")
            try:
                self._pending = self._frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise Unreadable("corrupt_zstd") from error
        size = min(len(buffer), len(self._pending))
        buffer[:size], self._pending = self._pending[:size], self._pending[size:]
        return size


def _open(path: Path) -> BinaryIO:
    handle = open(path, "rb")  # noqa: SIM115  the caller closes what it gets
    if path.suffix == ".gz":
        return io.BufferedReader(_ZlibReader(handle), 1 << 16)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(handle), 1 << 16)
    return handle


def _read_text(path: Path) -> tuple[str, str]:
    with _open(path) as handle:
        # Binary files can be huge; their head is enough to know them.
        data = handle.read(1 << 16)
        if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise Unreadable("binary")
        data += handle.read(MAX_DOCUMENT_BYTES + 1 - len(data))
    if len(data) > MAX_DOCUMENT_BYTES:
        raise Unreadable("too_large")
    try:
        return decode(data)
    except NotText as error:
        raise Unreadable("binary") from error


def _module_name(path: str) -> str:
    return re.sub(r"/__init__$", "", path.removesuffix(".py")).replace("/", ".")


def _from_file(file: FileRef) -> Document:
    text, encoding = _read_text(file.location)
    if file.kind == "man":
        text = extract.man_page(text)
    elif file.kind == "metadata":
        text = extract.package_description(text)
    elif file.kind == "docstrings":
        try:
            text = extract.docstrings(text, _module_name(file.path))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Unreadable("syntax_error") from error
    if not text.strip():
        raise Unreadable("empty")
    repo = f"{file.root}/{file.path.partition('/')[0]}" if "/" in file.path else file.root
    meta = {"kind": file.kind} | ({} if encoding == "utf-8" else {"encoding": encoding})
    return Document(
        document_id(file.root, file.path), text, file.source, lang=file.lang, repo=repo,
        path=f"{file.root}/{file.path}", meta=meta,
    )  # fmt: skip


# --- record files -----------------------------------------------------------------------------


def _records(path: Path) -> Iterator[bytes]:
    if path.suffix == ".arrayrecord":
        yield from _array_records(path)
        return
    with _open(path) as handle:
        while line := handle.readline(MAX_DOCUMENT_BYTES):
            if line.strip():
                yield line


def _array_records(path: Path) -> Iterator[bytes]:
    """A damaged group of records gives empty records, which become drops; so does a file that is no
    ArrayRecord at all."""
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        count = reader.num_records()
        if count == 0 and not reader.ok():
            raise Unreadable("corrupt_arrayrecord")
        for start in range(0, count, _ARRAY_RECORD_BATCH):
            indices = list(range(start, min(start + _ARRAY_RECORD_BATCH, count)))
            try:
                yield from reader.read(indices)
            except RuntimeError:
                yield from [b""] * len(indices)
    finally:
        with contextlib.suppress(RuntimeError):  # a damaged file reports itself again
            reader.close()


def _timestamp(value: Any) -> int:
    """Seconds since 1970 from a number or an ISO 8601 text; 0 when it is neither."""
    try:
        return int(value)
    except (TypeError, ValueError):
        pass
    try:
        when = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        return 0
    return int(when.replace(tzinfo=when.tzinfo or datetime.UTC).timestamp())


def _from_record(record: bytes, file: FileRef, number: int) -> Document | Drop:
    identity = document_id(file.root, file.path, number)
    if not record:
        return Drop(identity, "read", "corrupt_arrayrecord")
    try:
        fields = orjson.loads(record)
    except orjson.JSONDecodeError:
        return Drop(identity, "read", "bad_json")
    if not isinstance(fields, dict):
        return Drop(identity, "read", "bad_record")
    text = fields.get("text", fields.get("content"))
    if not isinstance(text, str):
        return Drop(identity, "read", "no_text")
    if not text.strip():
        return Drop(identity, "read", "empty")
    known: dict[str, Any] = {
        name: str(value) for name, value in fields.items() if name in _FIELDS and value is not None
    }
    known["timestamp"] = _timestamp(fields.get("timestamp"))
    known["source"] = re.sub(r"[^a-z0-9_]+", "_", known.get("source", file.source).lower())
    known.setdefault("path", f"{file.root}/{file.path}#{number}")
    meta = fields["meta"] if isinstance(fields.get("meta"), dict) else {}
    if "id" in fields:
        meta = {**meta, "original_id": str(fields["id"])}
    return Document(identity, text, meta=meta, **known)
