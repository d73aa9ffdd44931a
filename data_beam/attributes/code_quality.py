"""The rules' score of a source file, and the features it is made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyarrow as pa

from data_beam.attributes.base import Examined
from data_beam.attributes.licences import programming_language
from data_beam.code import quality


@dataclasses.dataclass(frozen=True)
class CodeQuality:
    """`rule_score` in [0, 1] and the columns of `code.quality.Features`; NaN for prose, settings
    and data. `code.grades` turns the scores of a corpus into cut-offs per language and grades."""

    name: ClassVar[str] = "code_quality"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [("rule_score", pa.float32())]
        + [(feature, pa.float32()) for feature in quality.Features._fields]
    )

    def setup(self) -> None:
        pass

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        columns: dict[str, Any] = {name: [] for name in self.schema.names}
        for examined in batch:
            lang = programming_language(examined.document) or ""
            values = [math.nan] * len(columns)
            if quality.scorable(lang):
                found = quality.features(examined.document.text, lang)
                values = [quality.score(found), *found]
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        return columns
