"""Web archives: WARC (HTTP responses, whose main text is extracted) and WET (text already).

A damaged part costs the records in it. Of a file with one gzip member per record, as crawlers write
them, reading goes on with the next whole member; of an uncompressed file, with the next record
header. Records are named by their number ("#record=12"), after a damaged part counted from there
("#byte=91823+record=0").
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from data_beam.io.encodings import NotText, decode
from data_beam.io.file_ref import FileRef
from data_beam.io.options import ReadOptions
from data_beam.io.readers.base import (
    Item,
    Unreadable,
    Watched,
    dead_letter,
    document,
    opened,
)
from data_beam.io.readers.decompress import Damaged, Decompressed, format_of
from data_beam.io.readers.html import page
from data_beam.io.readers.records import timestamp
from internlm2_jax.errors import UserError

# CC-MAIN-2023-50, CC-MAIN-2008-2009, CC-MAIN-2012; not the time in the name of a file.
_DUMP = re.compile(r"(?<![\w-])CC-(?:MAIN|NEWS)-\d{4}(?:-\d{4}|-\d{2})?(?!\w|-\d)")
_NEWS = re.compile(r"(?<![\w-])CC-NEWS[-/](\d{4})/?(\d{2})")
_RECORD = re.compile(rb"\n\r?\n(?=WARC/\d\.\d\r?\n)")
_GZIP_MAGIC = b"\x1f\x8b\x08"
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_SCAN = 1 << 20
_MAX_HTTP_HEADER = 64 << 10


class _Record(NamedTuple):
    """A record whose content was read; `start` is where it begins in the uncompressed stream."""

    start: int
    at: str
    kind: str
    headers: dict[str, str]
    length: int
    content: bytes
    whole: bool


def dump_of(path: str) -> str:
    """The crawl that a path names, "" for none."""
    if found := _DUMP.search(path):
        return found[0]
    news = _NEWS.search(path)
    return f"CC-NEWS-{news[1]}-{news[2]}" if news else ""


def read(file: FileRef, options: ReadOptions) -> Iterator[Item]:
    dump = options.dump or dump_of(file.location)
    with opened(file) as handle:
        watched = Watched(handle)
        for found in _records(file, watched, options.max_document_bytes + _MAX_HTTP_HEADER):
            if isinstance(found, Unreadable):
                watched.raise_transport_error()
                yield dead_letter(file, found.reason, found.detail, found.at, found.num_bytes)
            elif found.kind == "warcinfo":
                if not dump and (name := re.search(rb"isPartOf:[ \t]*([\w.-]+)", found.content)):
                    dump = dump_of(name[1].decode()) or name[1].decode()
            else:
                yield from _item(file, options, found, dump)


# --- records ----------------------------------------------------------------------------------


def _records(file: FileRef, handle: Watched, limit: int) -> Iterator[_Record | Unreadable]:
    """Records of all parts that can be read, and one Unreadable for each damaged part."""
    kind = format_of(file.path)
    offset, prefix = 0, "#"
    while True:
        if offset:
            handle.seek(offset)
        source: Any = Decompressed(handle, kind, offset) if kind else _Uncompressed(handle, offset)
        last: _Record | None = None
        number = 0
        error: Exception | None = None
        iterator = _iterate(source, prefix, limit)
        while True:
            try:
                found = next(iterator, None)
            except (OSError, Damaged, ValueError, OverflowError) as failure:
                handle.raise_transport_error()
                found, error = None, failure
            # A record is believed when something whole follows it, or the file ends there.
            if last is not None and _believed(last, error):
                yield last
                number += 1
            elif last is not None:
                error = error or OSError(f"the record ends after {len(last.content):,} bytes of "
                                         f"{last.length:,}")  # fmt: skip
                break
            if found is None:
                break
            last = found
        if error is None:
            return
        failed, again = _resume(handle, kind, source, last, error)
        lost = "to the end" if again is None else f"to byte {again:,}"
        yield Unreadable(
            f"corrupt_{kind}" if isinstance(error, Damaged) else "corrupt_warc",
            f"bytes {failed:,} {lost} lost: {error}", f"{prefix}record={number}",
            (again or handle.seek(0, 2)) - failed,
        )  # fmt: skip
        if again is None:
            return
        offset, prefix = again, f"#byte={again}+"


def _believed(record: _Record, error: Exception | None) -> bool:
    """Whether a record is what its header says. One with a wrong length holds the headers of others
    and is followed by nothing that can be read."""
    if not record.whole:
        return False
    return error is None or not _RECORD.search(record.content)


def _iterate(source: Any, prefix: str, limit: int) -> Iterator[_Record]:
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError as error:
        raise UserError(
            f"cannot read web archives: {error}; pip install 'internlm2-jax[data]'"
        ) from error
    wanted = {
        int(getattr(WarcRecordType, name)): name
        for name in ("warcinfo", "response", "resource", "conversion")
    }
    for number, record in enumerate(ArchiveIterator(source, parse_http=False)):
        headers = {
            name.decode("latin-1").lower(): value.decode("utf-8", "replace")
            for name, value in record.headers.items_bytes()
        }
        length = headers.get("content-length", "")
        if not length.isdigit():
            raise OSError(f"record header without a length: {length!r}")
        size = int(length)
        content, whole = b"", True
        kind = wanted.get(int(record.record_type), "")
        if kind and size <= limit:
            content = record.reader.read()
            whole = len(content) == size
        yield _Record(
            record.stream_pos, f"{prefix}record={number}", kind, headers, size, content, whole
        )


class _Uncompressed:
    """The same interface for a file that is not compressed."""

    def __init__(self, handle: Any, offset: int):
        self._handle, self.offset = handle, offset

    def read(self, size: int = -1) -> bytes:
        return self._handle.read(size)

    def tell(self) -> int:
        return 0


# --- after damage -----------------------------------------------------------------------------


def _resume(
    handle: Watched, kind: str, source: Any, last: _Record | None, error: Exception
) -> tuple[int, int | None]:
    """Where the damaged part begins in the file, and where the next whole record does (None = there
    is none)."""
    begin = 0 if last is None else last.start
    if not kind:
        failed = source.offset + begin
        return failed, _find(handle, failed + 1, _plain_start)
    if isinstance(error, Damaged):
        failed = error.member
    else:
        # The member of the last record, or the first.
        failed = max(
            (at for given, at in source.starts if given <= begin), default=source.starts[0][1]
        )
    return failed, _find(handle, failed + 1, _gzip_start) if kind == "gzip" else None


def _find(handle: Watched, offset: int, start_in: Any) -> int | None:
    """The first place at or after `offset` where a record begins."""
    handle.seek(offset)
    buffer, base = b"", offset
    while True:
        block = handle.read(_SCAN)
        buffer += block
        position = 0
        while (found := start_in(buffer, position)) is not None:
            place, whole = found
            if whole:
                return base + place
            position = place + 1
        if not block:
            return None
        keep = min(len(buffer), 4096)
        base += len(buffer) - keep
        buffer = buffer[-keep:]


def _plain_start(buffer: bytes, position: int) -> tuple[int, bool] | None:
    found = _RECORD.search(buffer, position)
    return (found.end(), True) if found else None


def _gzip_start(buffer: bytes, position: int) -> tuple[int, bool] | None:
    """A gzip member that holds a record: three bytes of magic alone occur by chance."""
    place = buffer.find(_GZIP_MAGIC, position)
    if place < 0:
        return None
    try:
        head = zlib.decompressobj(31).decompress(buffer[place : place + 4096], 16)
    except zlib.error:
        return place, False
    return place, head.startswith(b"WARC/")


# --- documents --------------------------------------------------------------------------------


def _item(file: FileRef, options: ReadOptions, record: _Record, dump: str) -> Iterator[Item]:
    if not record.kind:
        return  # a request, a revisit or metadata: no document, nothing lost
    url = record.headers.get("warc-target-uri", "").strip("<>")
    when = timestamp(record.headers.get("warc-date", ""))
    if record.length > options.max_document_bytes + _MAX_HTTP_HEADER:
        detail = f"{record.length:,} bytes, more than {options.max_document_bytes:,}: {url}"
        yield dead_letter(file, "too_large", detail, record.at, record.length)
        return
    data, kind, charset = record.content, record.headers.get("content-type", ""), ""
    if record.kind == "response":
        try:
            status, kind, charset, data = _http(record.content, options.max_document_bytes)
        except (OSError, ValueError) as error:
            yield dead_letter(
                file, "corrupt_http", f"{error}: {url}", record.at, record.length,
                record.content[:800],
            )  # fmt: skip
            return
        if not 200 <= status < 300:
            yield dead_letter(file, "http_status", f"{status}: {url}", record.at, record.length)
            return
        if len(data) > options.max_document_bytes:
            detail = f"unpacks to more than {options.max_document_bytes:,} bytes: {url}"
            yield dead_letter(file, "too_large", detail, record.at, record.length)
            return
    meta = {}
    if language := record.headers.get("warc-identified-content-language"):
        meta["identified_language"] = language
    if truncated := record.headers.get("warc-truncated"):
        meta["truncated"] = truncated
    kind = kind.partition(";")[0].strip().lower()
    if record.kind != "conversion" and (kind in _HTML_TYPES or (not kind and _is_html(data))):
        yield page(
            file, options, data, origin=url, at=record.at, charset=charset, url=url, dump=dump,
            timestamp=when, meta=meta,
        )  # fmt: skip
    elif record.kind == "conversion" or kind == "text/plain":
        try:
            text, encoding = decode(data, charset or None)
        except NotText as error:
            yield dead_letter(file, "binary", f"{error}: {url}", record.at, len(data), data[:800])
            return
        meta |= {"kind": file.kind} | ({} if encoding == "utf-8" else {"encoding": encoding})
        yield document(
            file, options, text, origin=url, at=record.at, url=url, dump=dump,
            timestamp=when, meta=meta,
        )  # fmt: skip
    else:
        yield dead_letter(file, "not_html", f"{kind or 'no type'}: {url}", record.at, len(data))


def _http(content: bytes, limit: int) -> tuple[int, str, str, bytes]:
    """Status, content type, character set and at most `limit` + 1 bytes of the decoded body."""
    from fastwarc.warc import WarcRecord, WarcRecordType

    # Some crawlers store a page unpacked and keep the header that says it is packed.
    for decoding in ("all", "transfer", "none"):
        response = WarcRecord()
        response.init_headers(WarcRecordType.response, content_length=len(content))
        response.is_http = True
        response.set_bytes_content(content)
        try:
            response.parse_http(decoding, max_header_len=_MAX_HTTP_HEADER, quirks_mode=True)
            body = response.reader.read(limit + 1)
        except OSError:
            if decoding == "none":
                raise
            continue
        status = response.http_headers.status_code
        if status is None:
            raise ValueError("no HTTP status")
        return status, response.http_content_type or "", response.http_charset or "", body
    raise AssertionError("the last attempt returns or raises")


def _is_html(data: bytes) -> bool:
    return bool(re.search(rb"<(?:!doctype html|html|body|p|div)\b", data[:2048], re.IGNORECASE))
