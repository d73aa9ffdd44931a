"""What every reader shares: how a document and a dead letter are made."""

from __future__ import annotations

import contextlib
import re
from typing import Any, BinaryIO

from data_beam.code import languages
from data_beam.io import storage
from data_beam.io.file_ref import FileRef
from data_beam.io.options import ReadOptions
from data_beam.schema import DeadLetter, Document, document_id

Item = Document | DeadLetter

# Reasons of input that is whole and simply holds no text: a picture in a repository, an image in a
# crawl. Every other reason means that something was lost.
NO_TEXT_REASONS = frozenset(
    {"binary", "empty", "not_html", "http_status", "link", "not_a_file", "extraction_empty"}
)
_SPACES = re.compile(r"\s+")
_NOT_SOURCE = re.compile(r"[^a-z0-9_]+")
_SURROGATES = re.compile("[\ud800-\udfff]")


class Unreadable(Exception):
    """Carries the reason of a dead letter, and where inside the file it arose."""

    def __init__(
        self, reason: str, detail: object = "", at: str = "", num_bytes: int = 0, head: bytes = b""
    ):
        super().__init__(reason)
        self.reason, self.detail, self.at = reason, detail, at
        self.num_bytes, self.head = num_bytes, head


def dead_letter(
    file: FileRef,
    reason: str,
    detail: object = "",
    at: str = "",
    num_bytes: int = 0,
    head: bytes | str = b"",
) -> DeadLetter:
    """A dead letter of `file`, or of the part `at` of it ("#line=7", "!member")."""
    if isinstance(head, bytes):
        head = head[:800].decode("utf-8", "replace")
    return DeadLetter(
        whole_text(file.location + at), reason, file.source, one_line(detail), num_bytes,
        whole_text(head[:200]),
    )  # fmt: skip


def letter_of(file: FileRef, problem: Unreadable, at: str = "") -> DeadLetter:
    return dead_letter(
        file, problem.reason, problem.detail, problem.at or at, problem.num_bytes, problem.head
    )


def one_line(detail: object) -> str:
    """At most 200 characters of an exception or text, without line breaks."""
    return whole_text(_SPACES.sub(" ", str(detail)).strip()[:200])


def whole_text(text: str) -> str:
    """`text` without lone surrogates, which no encoding has: pairs are joined, others become
    U+FFFD."""
    if text.isascii() or not _SURROGATES.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def source_name(text: object) -> str:
    """A part of the mixture as a name: lower case, digits, underscores."""
    return _NOT_SOURCE.sub("_", str(text).lower())


def document(
    file: FileRef,
    options: ReadOptions,
    text: str,
    *,
    origin: str = "",
    at: str = "",
    num_bytes: int | None = None,
    **fields: Any,
) -> Item:
    """The document of a text as it was read, or a dead letter if there is nothing in it or too
    much. The language of code is told by its path and text, where they can tell."""
    size = len(text.encode()) if num_bytes is None else num_bytes
    if size > options.max_document_bytes:
        return dead_letter(
            file, "too_large", f"more than {options.max_document_bytes:,} bytes", at, size,
            text[:200],
        )  # fmt: skip
    if not text.strip():
        return dead_letter(file, "empty", "", at, size)
    source = fields.pop("source", file.source)
    if source == "code":
        known = languages.language(fields.get("path", ""), text)
        fields["lang"] = known or fields.get("lang", "und").lower()
    identity = document_id(source, origin, text, fields.get("repo", ""), fields.get("dump", ""))
    return Document(identity, text, source, **fields)


class Watched:
    """A remote file as a library reads it; remembers the error when the transport failed, so that
    it is not taken for damage of the file: Beam retries the one and not the other."""

    def __init__(self, handle: BinaryIO):
        self._handle = handle
        self.error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def read(self, size: int = -1) -> bytes:
        try:
            return self._handle.read(size)
        except Exception as error:
            self.error = error
            raise

    def raise_transport_error(self) -> None:
        if self.error is not None:
            raise self.error


def opened(file: FileRef) -> contextlib.closing[BinaryIO]:
    """The bytes of a file, not decompressed."""
    return contextlib.closing(storage.open_read(file.location))
