"""Hashes of a document's lines or paragraphs, for finding those that many documents share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_beam.attributes.base import Examined
from data_beam.kernels import lines
from data_beam.kernels.labels import LABEL_BYTES, label_of
from internlm2_jax.errors import UserError

UNITS = ("line", "paragraph")


@dataclasses.dataclass(frozen=True)
class LineHashes:
    """`hashes` of the lines (or paragraphs, by `unit`) whose words have at least `min_width`
    characters, those of scripts without spaces counted twice: shorter ones (menus, brackets) are
    common for other reasons. `spans` are their characters, flat [start, end, ...]."""

    unit: str = "line"
    min_width: int = 24

    name: ClassVar[str] = "line_hashes"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("label", pa.binary(LABEL_BYTES)),
            ("hashes", pa.list_(pa.uint64())),
            ("spans", pa.list_(pa.int32())),
        ]
    )

    def __post_init__(self):
        if self.unit not in UNITS:
            raise UserError(f"unit {self.unit!r} is unknown; choose {' or '.join(UNITS)}")
        if self.min_width < 1:
            raise UserError(f"min_width {self.min_width} must be at least 1")

    def setup(self) -> None:
        pass

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        hashes, spans = [], []
        for examined in batch:
            units = lines.split(
                examined.document.text, examined.signals.words, self.unit == "paragraph"
            )
            wide = units.widths >= self.min_width
            hashes.append(units.hashes[wide])
            both = np.stack([units.starts[wide], units.ends[wide]], axis=1)
            spans.append(both.reshape(-1).astype(np.int32))
        return {
            "label": [label_of(one.document) for one in batch], "hashes": hashes, "spans": spans,
        }  # fmt: skip
