"""The licence that a file itself states, and whether a person wrote it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import pyarrow as pa

from data_beam.attributes.base import Examined
from data_beam.code import generated, licences, spdx
from data_beam.code.languages import is_documentation, language
from data_beam.schema import Document


@dataclasses.dataclass(frozen=True)
class Licence:
    """`spdx`: an SPDX expression from the file's SPDX line or notice, a licence's text, a package's
    metadata; None when it states none: then its repository's holds, which `code.assemble` applies.
    `permissive`: whether `allowed` licences are enough for it; None without a licence. `generated`
    and `generated_reason` (one of `code.generated.REASONS`): made by a program, vendored, minified,
    data. All None for documents that are no files of code and have no path in a repository.
    """

    name: ClassVar[str] = "licence"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("spdx", pa.string()),
            ("permissive", pa.bool_()),
            ("generated", pa.bool_()),
            ("generated_reason", pa.string()),
        ]
    )

    allowed: tuple[str, ...] = spdx.PERMISSIVE

    def setup(self) -> None:
        pass

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        rows = [self._row(examined.document) for examined in batch]
        return {name: [row[place] for row in rows] for place, name in enumerate(self.schema.names)}

    def _row(self, document: Document) -> tuple[str | None, bool | None, bool | None, str | None]:
        lang = programming_language(document)
        if lang is None and not (document.repo and document.path):
            return None, None, None, None
        stated = licences.of_file(document.path, document.text)
        permits = None if stated is None else spdx.permits(stated, self.allowed)
        reason = generated.by_name(document.path) or generated.by_content(document.text, lang)
        return stated, permits, reason is not None, reason


def programming_language(document: Document) -> str | None:
    """The document's own `lang` if it is code, else by its path and text; None for prose."""
    if document.path and is_documentation(document.path):
        return None
    if document.path and (found := language(document.path, document.text)):
        return found
    return document.lang if document.source == "code" and document.lang != "und" else None
