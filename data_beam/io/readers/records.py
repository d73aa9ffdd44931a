"""Files of records, one JSON object each: JSON lines (plain, .gz, .zst) and ArrayRecord.

A line of an uncompressed file is named by the byte where it begins ("#byte=512"), so that the name
does not depend on how the file was divided; a line of a compressed one by its number, from 1.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import orjson
from array_record.python import array_record_module

from data_beam.io import storage
from data_beam.io.encodings import NotText, decode
from data_beam.io.file_ref import FileRef
from data_beam.io.options import DOCUMENT_FIELDS, TEXT_FIELDS, ReadOptions
from data_beam.io.readers.base import (
    Item,
    Unreadable,
    dead_letter,
    document,
    opened,
    source_name,
    whole_text,
)
from data_beam.io.readers.decompress import Damaged, format_of, open_stream

_CHUNK = 1 << 20
_HEAD = 800
_BATCH = 64
_FIRST_LINES = 8
_BOM = b"\xef\xbb\xbf"


def read(file: FileRef, options: ReadOptions) -> Iterator[Item]:
    if file.path.lower().endswith(".arrayrecord"):
        yield from _array_record(file, options)
    else:
        yield from _json_lines(file, options)


# --- JSON lines -------------------------------------------------------------------------------


class Line(NamedTuple):
    """`data` is cut to its head when the line is longer than the limit: `size` tells."""

    offset: int
    number: int
    size: int
    data: bytes


def lines(stream: BinaryIO, limit: int, start: int = 0, end: int = 0) -> Iterator[Line]:
    """The lines that begin in [`start`, `end`) (end 0 = the rest), in memory no larger than
    `limit`. `stream` stands at its beginning."""
    offset, number = start, 0
    skipping = start > 0
    if skipping:  # to the end of the line that another piece has
        stream.seek(start - 1)
        offset = start - 1
    parts: list[bytes] = []
    size = held = 0
    while chunk := stream.read(_CHUNK):
        position = 0
        while True:
            stop = chunk.find(b"\n", position)
            piece = chunk[position : stop if stop >= 0 else len(chunk)]
            size += len(piece)
            if not skipping and held <= limit:
                parts.append(piece)
                held += len(piece)
                if held > limit:
                    parts = [b"".join(parts)[:_HEAD]]
            if stop < 0:
                break
            if not skipping:
                number += 1
                yield Line(offset, number, size, b"".join(parts))
            offset += size + 1
            if end and offset >= end:
                return
            parts, size, held, skipping, position = [], 0, 0, False, stop + 1
    if size and not skipping:
        yield Line(offset, number + 1, size, b"".join(parts))


def _json_lines(file: FileRef, options: ReadOptions) -> Iterator[Item]:
    limit = options.max_document_bytes
    compressed = bool(format_of(file.path))
    last = 0
    with opened(file) as handle:
        try:
            found = lines(open_stream(handle, file.path), limit, file.start, file.end)
            for line in _of_many_values(file, found):
                last = line.number
                at = f"#line={line.number}" if compressed else f"#byte={line.offset}"
                data = line.data
                if line.offset == 0:
                    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise Unreadable(
                            "bad_encoding", "records must be UTF-8, this is UTF-16",
                            num_bytes=file.size,
                        )  # fmt: skip
                    data = data.removeprefix(_BOM)
                if line.size > limit:
                    detail = f"a line of {line.size:,} bytes, more than {limit:,}"
                    yield dead_letter(file, "too_large", detail, at, line.size, data)
                elif data.strip():
                    yield from_json(file, options, data, at)
        except Damaged as damage:
            raise Unreadable(damage.reason, damage, f"#line={last + 1}") from damage


def _of_many_values(file: FileRef, found: Iterator[Line]) -> Iterator[Line]:
    """The lines. A file that holds one JSON value on many lines is one thing that cannot be read:
    its lines would be as many dead letters."""
    first = next(found, None)
    if first is None:
        return
    head = [first]
    if first.offset == 0 and first.data.removeprefix(_BOM).strip() in (b"{", b"["):
        while len(head) < _FIRST_LINES and not head[-1].data.strip(b" \t\r[{"):
            if (line := next(found, None)) is None:
                break
            head.append(line)
        if not _is_object(head[-1].data):  # else only the first is damaged
            raise Unreadable(
                "not_json_lines", "this is one JSON value on many lines; one object a line is "
                "needed", num_bytes=file.size, head=first.data,
            )  # fmt: skip
    yield from itertools.chain(head, found)


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(_parse(data)[0], dict)
    except (ValueError, RecursionError):
        return False


def from_json(file: FileRef, options: ReadOptions, data: bytes, at: str) -> Item:
    """The document of a JSON object."""
    try:
        fields, notes = _parse(data)
    except (ValueError, RecursionError) as error:
        return dead_letter(file, "bad_json", error, at, len(data), data[:_HEAD])
    if not isinstance(fields, dict):
        detail = f"an object is needed, this is {type(fields).__name__}"
        return dead_letter(file, "bad_record", detail, at, len(data), data[:_HEAD])
    return from_fields(file, options, fields, at, len(data), notes)


def _parse(data: bytes) -> tuple[Any, dict[str, str]]:
    """The value, and notes for `meta` when it took more than strict UTF-8 JSON to read it: other
    encodings, NaN, raw control characters and lone surrogates are what other programs write."""
    try:
        return orjson.loads(data), {}
    except orjson.JSONDecodeError as error:
        strict = error
    try:
        text, encoding = decode(data)
    except NotText:
        raise strict from None
    notes = {"json": "lenient"} | ({} if encoding == "utf-8" else {"encoding": encoding})
    try:
        return json.loads(text, strict=False), notes
    except (ValueError, RecursionError):
        raise strict from None


# --- fields -----------------------------------------------------------------------------------


def from_fields(
    file: FileRef,
    options: ReadOptions,
    fields: Mapping[str, Any],
    at: str,
    num_bytes: int = 0,
    notes: Mapping[str, str] | None = None,
) -> Item:
    """The document of a record's fields.

    What a record calls itself is its origin: its id, else its URL, else its path. It does not
    depend on the file, so that records may be divided into files in another way.
    """
    names = (options.text_field,) if options.text_field else TEXT_FIELDS
    text = next((fields[name] for name in names if isinstance(fields.get(name), str)), None)
    if text is None:
        detail = f"no text field {' or '.join(names)} among {', '.join(sorted(fields)[:20])}"
        head = str(dict(fields))[:200] if num_bytes < 1 << 20 else ""
        return dead_letter(file, "no_text", detail, at, num_bytes, head)
    text = whole_text(text)
    known = _known_fields(fields, options.renamed())
    name = known.pop("id", "")
    if options.require_id and not name:
        return dead_letter(file, "no_id", "", at, num_bytes, text[:200])
    known["source"] = options.source or source_name(known.get("source", file.source))
    meta: dict[str, Any] = dict(notes or {})
    if isinstance(given := fields.get("meta"), dict):
        meta = {whole_text(str(key)): _scalar(value) for key, value in given.items()} | meta
    if name:
        meta["original_id"] = name
    if options.dump:
        known["dump"] = options.dump
    known.setdefault("lang", file.lang)
    origin = name or known.get("url", "") or known.get("path", "")
    return document(file, options, text, origin=origin, at=at, meta=meta, **known)


def _known_fields(fields: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, spellings in DOCUMENT_FIELDS.items():
        for name in (renamed[field],) if field in renamed else spellings:
            value = fields.get(name)
            if value is None or value == "":
                continue
            if field == "timestamp":
                value = timestamp(value)
            elif isinstance(value, list) and value:  # of licences, mostly
                value = value[0]
            if field == "timestamp" or isinstance(value, (str, int, float)):
                found[field] = value if field == "timestamp" else whole_text(str(value))
                break
    return found


def _scalar(value: Any) -> str | int | float | bool:
    """A value as `meta` holds it; lists and objects as JSON text."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else str(value)
    return whole_text(json.dumps(value, ensure_ascii=False, default=str))


def timestamp(value: Any) -> int:
    """Seconds since 1970 from a number, a date or an ISO 8601 text; 0 when it is none of them."""
    try:
        if not isinstance(value, datetime.datetime):
            if isinstance(value, (int, float)) or str(value).lstrip("-").isdigit():
                number = int(value)
                return number if abs(number) < 1 << 40 else 0
            value = datetime.datetime.fromisoformat(str(value))
        return int(value.replace(tzinfo=value.tzinfo or datetime.UTC).timestamp())
    except (TypeError, ValueError, OverflowError):
        return 0


# --- ArrayRecord ------------------------------------------------------------------------------


def _array_record(file: FileRef, options: ReadOptions) -> Iterator[Item]:
    """A damaged group of records gives a dead letter for each of them. A file without its end is
    lost: that is where ArrayRecord keeps the places of its records."""
    with storage.local_copy(file.location) as path:
        with open(path, "rb"):  # the library says nothing of a file that cannot be opened
            pass
        reader = array_record_module.ArrayRecordReader(str(path))
        try:
            count = reader.num_records()
            if count == 0 and not reader.ok():
                raise Unreadable("corrupt_arrayrecord", "no index", num_bytes=file.size)
            for start in range(0, count, _BATCH):
                for number, record in _records(reader, start, min(start + _BATCH, count)):
                    at = f"#record={number}"
                    if isinstance(record, RuntimeError):
                        yield dead_letter(file, "corrupt_arrayrecord", record, at)
                    elif len(record) > options.max_document_bytes:
                        yield dead_letter(
                            file, "too_large", f"more than {options.max_document_bytes:,} bytes",
                            at, len(record), record[:_HEAD],
                        )  # fmt: skip
                    else:
                        yield from_json(file, options, record, at)
        finally:
            with contextlib.suppress(RuntimeError):  # a damaged file reports itself again
                reader.close()


def _records(reader: Any, start: int, end: int) -> Iterator[tuple[int, bytes | RuntimeError]]:
    """Records [start, end); one by one when they cannot be read together."""
    try:
        yield from enumerate(reader.read(list(range(start, end))), start)
        return
    except RuntimeError:
        pass
    for number in range(start, end):
        try:
            yield number, reader.read([number])[0]
        except (RuntimeError, IndexError) as error:
            yield number, RuntimeError(str(error))
