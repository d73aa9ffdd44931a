"""What a document says of itself, as columns: the mix, the reports and the labels of duplicates
read these instead of the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import pyarrow as pa

from data_beam.attributes.base import Examined

_COLUMNS = ("source", "lang", "license", "repo", "url", "path", "dump")


@dataclasses.dataclass(frozen=True)
class Facts:
    """`num_bytes` is of the text in UTF-8, `timestamp` in seconds since 1970 (0 = unknown)."""

    name: ClassVar[str] = "facts"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [(column, pa.string()) for column in _COLUMNS]
        + [("timestamp", pa.int64()), ("num_bytes", pa.int64())]
    )

    def setup(self) -> None:
        pass

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        documents = [examined.document for examined in batch]
        columns: dict[str, Sequence[Any]] = {
            column: [getattr(document, column) for document in documents] for column in _COLUMNS
        }
        columns["timestamp"] = [document.timestamp for document in documents]
        columns["num_bytes"] = [document.num_bytes for document in documents]
        return columns
