"""Parquet: one document a row, read batch by batch and column by column.

Only the columns that make a document are read. Text columns are taken as bytes, since Parquet
promises UTF-8 and checks nothing. A damaged row group costs its own rows, from the damaged page on.
Memory is that of one page (a megabyte, or 1,024 documents where a writer kept Arrow's default) and
one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_beam.io.encodings import NotText, decode
from data_beam.io.file_ref import FileRef
from data_beam.io.options import DOCUMENT_FIELDS, TEXT_FIELDS, ReadOptions
from data_beam.io.readers.base import Item, Unreadable, Watched, dead_letter, opened
from data_beam.io.readers.records import from_fields

_BATCH_BYTES = 2 << 20
_MAX_BATCH = 1024
_BUFFER = 1 << 20  # pages are read through it, not a whole column chunk at once
_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError, NotImplementedError)


def read(file: FileRef, options: ReadOptions) -> Iterator[Item]:
    with opened(file) as handle:
        watched = Watched(handle)
        try:
            # a checksum that is there is compared: nothing else notices a flipped bit in text
            table = pq.ParquetFile(
                pa.PythonFile(watched, mode="r"), buffer_size=_BUFFER, pre_buffer=False,
                page_checksum_verification=True,
            )  # fmt: skip
        except _ERRORS as error:
            watched.raise_transport_error()
            raise Unreadable("corrupt_parquet", error, num_bytes=file.size) from error
        names = table.schema_arrow.names
        text = _text_column(names, options)
        if text is None:
            wanted = options.text_field or " or ".join(TEXT_FIELDS)
            detail = f"no column {wanted} among {', '.join(names[:20])}"
            raise Unreadable("no_text", detail, num_bytes=file.size)
        columns = _columns(names, text, options)
        row = sum(table.metadata.row_group(i).num_rows for i in range(file.start))
        for group in range(file.start, file.end or table.metadata.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            yield from _row_group(file, options, table, group, row, columns, text, watched)
            row += rows


def _text_column(names: list[str], options: ReadOptions) -> str | None:
    wanted = (options.text_field,) if options.text_field else TEXT_FIELDS
    return next((name for name in wanted if name in names), None)


def _columns(names: list[str], text: str, options: ReadOptions) -> list[str]:
    renamed = options.renamed()
    known = {text, "meta"}
    for field, spellings in DOCUMENT_FIELDS.items():
        known.update((renamed[field],) if field in renamed else spellings)
    return [name for name in dict.fromkeys(names) if name in known]


def _row_group(
    file: FileRef, options: ReadOptions, table: pq.ParquetFile, group: int, row: int,
    columns: list[str], text: str, watched: Watched,
) -> Iterator[Item]:  # fmt: skip
    metadata = table.metadata.row_group(group)
    done, rows = 0, metadata.num_rows
    average = max(1, metadata.total_byte_size // max(1, rows))
    size = max(1, min(_MAX_BATCH, _BATCH_BYTES // average))
    batches = table.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                break
            found = [_plain(batch.column(name)) for name in batch.schema.names]
        except _ERRORS as error:
            watched.raise_transport_error()
            detail = f"row group {group}: {rows - done:,} rows lost: {error}"
            yield dead_letter(file, "corrupt_parquet", detail, f"#row={row + done}")
            return
        for number in range(batch.num_rows):
            at = f"#row={row + done + number}"
            yield _row(file, options, batch.schema.names, found, number, text, at)
        done += batch.num_rows
    if done < rows:
        detail = f"row group {group}: {rows - done:,} rows lost"
        yield dead_letter(file, "corrupt_parquet", detail, f"#row={row + done}")


def _plain(column: pa.Array) -> pa.Array:
    """Strings as bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
        return column.cast(pa.binary())
    return column.cast(pa.large_binary()) if pa.types.is_large_string(column.type) else column


def _row(
    file: FileRef, options: ReadOptions, names: list[str], columns: list[Any], number: int,
    text: str, at: str,
) -> Item:  # fmt: skip
    fields: dict[str, Any] = {}
    notes: dict[str, str] = {}
    size = 0
    for name, column in zip(names, columns, strict=True):
        scalar = column[number]
        if isinstance(scalar, (pa.BinaryScalar, pa.LargeBinaryScalar)) and scalar.is_valid:
            size = scalar.as_buffer().size
            if size > options.max_document_bytes:
                detail = f"{size:,} bytes, more than {options.max_document_bytes:,}"
                head = scalar.as_buffer()[:800].to_pybytes()
                return dead_letter(file, "too_large", detail, at, size, head)
        try:
            value = scalar.as_py()
        except (ValueError, OverflowError):  # a date that Python has not, a string in a list
            continue
        if isinstance(value, bytes):
            try:
                value, encoding = decode(value)
            except NotText as error:
                if name != text:
                    continue
                return dead_letter(file, "binary", error, at, size, value[:800])
            if name == text and encoding != "utf-8":
                notes["encoding"] = encoding
        fields[name] = value
    return from_fields(file, options, fields, at, size, notes)
