"""Saved web pages: the main text of an .html file."""

from __future__ import annotations

from collections.abc import Iterator

from data_beam.io.extract import web
from data_beam.io.file_ref import FileRef
from data_beam.io.options import ReadOptions
from data_beam.io.readers.base import Item, dead_letter, document
from data_beam.io.readers.plain import read_bytes


def read(file: FileRef, options: ReadOptions) -> Iterator[Item]:
    data = read_bytes(file, options, binary=True)
    yield page(file, options, data, origin=file.path, path=file.path)


def page(
    file: FileRef, options: ReadOptions, data: bytes, *, origin: str, at: str = "",
    charset: str = "", url: str = "", dump: str = "", timestamp: int = 0, path: str = "",
    meta: dict[str, str] | None = None,
) -> Item:  # fmt: skip
    """The main text of one page."""
    if not data.strip():
        return dead_letter(file, "empty", "", at, len(data))
    try:
        text, found = web.extract(
            data, url, options.extractor, charset=charset, timeout=options.extraction_timeout,
            memory=options.extraction_memory,
        )  # fmt: skip
    except web.ExtractionError as error:
        return dead_letter(file, error.reason, error.detail, at, len(data),
                           data[:800])  # fmt: skip
    if not text.strip():
        detail = f"{options.extractor} found no main text"
        return dead_letter(file, "extraction_empty", detail, at, len(data), data[:800])
    meta = {"kind": file.kind, "extractor": options.extractor} | found | (meta or {})
    return document(
        file, options, text, origin=origin, at=at, url=url, dump=dump or options.dump,
        timestamp=timestamp, path=path, meta=meta,
    )  # fmt: skip
