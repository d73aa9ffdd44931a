"""Numbers about the text: every signal of `kernels.textstats` as a column, and C4's lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import pyarrow as pa

from data_beam.attributes.base import Examined
from data_beam.kernels.c4 import select_lines
from data_beam.kernels.textstats import SIGNALS, Signals, share_ngram_work


@dataclasses.dataclass(frozen=True)
class TextSignals:
    """A column for every signal. NaN where a signal means nothing for the text.

    Of a longer text the first `max_chars` characters are looked at, for up to 150 bytes of memory
    go for each; `num_chars` is always of the whole.
    """

    name: ClassVar[str] = "signals"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [(name, pa.int32() if kind is int else pa.float32()) for name, kind in SIGNALS.items()]
    )

    max_chars: int = 2_000_000

    def setup(self) -> None:
        pass

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        texts = [examined.document.text for examined in batch]
        many = [
            examined.signals if len(text) <= self.max_chars else Signals(text[: self.max_chars])
            for examined, text in zip(batch, texts, strict=True)
        ]
        share_ngram_work(many)
        columns = {name: [getattr(one, name) for one in many] for name in SIGNALS}
        return {**columns, "num_chars": list(map(len, texts))}


@dataclasses.dataclass(frozen=True)
class C4Lines:
    """What C4's rules for lines leave of the text.

    `removed` are the spans to cut (the edit "c4.removed" of the mix), `sentences` and `lines` count
    what stays, `kept_share` is of the characters. C4's rules for whole pages are limits on
    `c4.sentences`, `signals.lorem_ipsum` and `signals.curly_bracket`, see the preset.
    """

    name: ClassVar[str] = "c4"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("sentences", pa.int32()),
            ("lines", pa.int32()),
            ("kept_share", pa.float32()),
            ("removed", pa.list_(pa.int32())),
        ]
    )

    def setup(self) -> None:
        pass

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        found = [select_lines(one.document.text, one.signals) for one in batch]
        shares = []
        for examined, lines in zip(batch, found, strict=True):
            cut = sum(lines.removed[1::2]) - sum(lines.removed[::2])
            shares.append(1 - cut / max(len(examined.document.text), 1))
        return {
            "sentences": [lines.sentences for lines in found],
            "lines": [lines.lines for lines in found],
            "kept_share": shares,
            "removed": [lines.removed for lines in found],
        }
