"""One file, one document: text, code, man pages, package descriptions, docstrings, saved pages."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_beam.io.encodings import NotText, decode, is_binary
from data_beam.io.extract import documents
from data_beam.io.file_ref import FileRef
from data_beam.io.options import ReadOptions
from data_beam.io.readers.base import Item, Unreadable, document, opened
from data_beam.io.readers.decompress import Damaged, open_stream

_HEAD = 1 << 16
_PIECE = 1 << 20


def read_bytes(file: FileRef, options: ReadOptions, binary: bool = False) -> bytes:
    """The whole content, decompressed. Raises Unreadable for what is damaged or too large, and for
    binary files (unless they are wanted), of which only the head is read: they can be huge."""
    with opened(file) as handle:
        stream = open_stream(handle, file.path)
        try:
            data = stream.read(_HEAD)
            if not binary and is_binary(data):
                raise Unreadable("binary", num_bytes=file.size, head=data)
            parts, size = [data], len(data)
            while data and size <= options.max_document_bytes:
                parts.append(data := stream.read(_PIECE))
                size += len(data)
        except Damaged as damage:
            raise Unreadable(damage.reason, damage, num_bytes=file.size) from damage
    if size > options.max_document_bytes:
        detail = f"more than {options.max_document_bytes:,} bytes"
        raise Unreadable("too_large", detail, num_bytes=file.size, head=parts[0])
    return b"".join(parts)


def module_name(path: str) -> str:
    return re.sub(r"/__init__$", "", path.removesuffix(".py")).replace("/", ".")


def read(file: FileRef, options: ReadOptions) -> Iterator[Item]:
    data = read_bytes(file, options)
    try:
        text, encoding = decode(data)
    except NotText as error:
        raise Unreadable("binary", error, num_bytes=len(data), head=data) from error
    if file.kind == "man":
        text = documents.man_page(text)
    elif file.kind == "metadata":
        text = documents.package_description(text)
    elif file.kind == "docstrings":
        try:
            text = documents.docstrings(text, module_name(file.path))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Unreadable("syntax_error", error, num_bytes=len(data), head=data) from error
    meta = {"kind": file.kind} | ({} if encoding == "utf-8" else {"encoding": encoding})
    yield document(
        file, options, text, origin=file.path_in_repo, lang=file.lang, repo=file.repo,
        path=file.path_in_repo, meta=meta,
    )  # fmt: skip
