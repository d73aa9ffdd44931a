"""What a section of the page is made of, and how numbers are written.

Sections are functions from loaded data to a `Section`; the template knows how each kind of block
looks. Nothing here or in the sections writes HTML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Picture:
    """A figure. `title` says what the reader should see, `alt` what is drawn, for who cannot.

    wide, narrow: SVG text for screens and for phones; without `wide`, `narrow` serves both.
    """

    kind: ClassVar[str] = "picture"
    title: str
    alt: str
    source: str
    narrow: str
    wide: str = ""
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell of running text with a short note under it, such as a score."""

    text: str
    note: str = ""
    mono: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text; columns listed in `numeric` are aligned right.

    stacked: on phones each row becomes a card, for tables with long text in their cells.
    """

    kind: ClassVar[str] = "table"
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    source: str
    numeric: frozenset[int] = frozenset()
    stacked: bool = False
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """Small blocks side by side, as many as fit."""

    kind: ClassVar[str] = "grid"
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them; open in print."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: Sequence[Block]
    open: bool = False


@dataclass(frozen=True)
class Pieces:
    """Texts cut into tokens, each piece visible."""

    kind: ClassVar[str] = "pieces"
    title: str
    examples: Sequence[Sequence[str]]
    source: str


@dataclass(frozen=True)
class Text:
    """A text as it stands, monospaced, scrolling sideways."""

    kind: ClassVar[str] = "text"
    text: str
    title: str = ""
    source: str = ""


@dataclass(frozen=True)
class Piece:
    """A part of a line of text; `changed` when the other side has something else there."""

    text: str
    changed: bool = False


@dataclass(frozen=True)
class Row:
    """Lines of two texts: `same` in both, or a line that says what was `skipped`, or two sides."""

    same: str | None = None
    skipped: str = ""
    left: Sequence[Piece] = ()
    right: Sequence[Piece] = ()


@dataclass(frozen=True)
class Compare:
    """Two texts side by side, what differs marked; on phones one under the other."""

    kind: ClassVar[str] = "compare"
    title: str
    left: str
    right: str
    rows: Sequence[Row]
    source: str
    note: str = ""


Block = Picture | Table | Grid | Fold | Pieces | Text | Compare


@dataclass(frozen=True)
class Section:
    """One stage's part of the page. `status` is one of load's three; `lead` a sentence or two."""

    id: str
    title: str
    status: str
    lead: str = ""
    blocks: Sequence[Block] = field(default_factory=tuple)


@dataclass(frozen=True)
class Headline:
    """A row of the table at the top: what was measured, the number, what it means."""

    name: str
    number: str
    reading: str
    source: str
    section: str


DASH = "–"


def num(value: float | None, digits: int = 3) -> str:
    """A number in `digits` significant digits, thousands separated; a dash when there is none."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    if abs(value) >= 10**digits:
        return f"{value:,.0f}".replace("-", "−")
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa} × 10{_superscript(int(exponent))}".replace("-", "−")
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{places}f}".replace("-", "−")


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(value: float | None) -> str:
    """A share in 0..1 as a percentage: whole, but one decimal below 10 %."""
    if value is None or math.isnan(value):
        return DASH
    return f"{100 * value:.{1 if 0 < abs(value) < 0.0995 else 0}f} %".replace("-", "−")


def megabytes(value: float | None) -> str:
    """Bytes as MB (10^6), or as kB or B below one of them."""
    if value is None:
        return DASH
    if value < 1e3:
        return f"{num(value)} B"
    return f"{num(value / 1e6)} MB" if value >= 1e6 else f"{num(value / 1e3)} kB"


def size(value: float | None) -> str:
    """Bytes in the unit that fits, B to TB (10^12)."""
    if value is None:
        return DASH
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if value >= scale:
            return f"{num(value / scale)} {unit}"
    return megabytes(value)


def share(value: float | None) -> str:
    """A share in 0..1 as a percentage in two or three significant digits, down to 0.001 %."""
    if value is None or math.isnan(value):
        return DASH
    if 0 < value < 1e-5:
        return "< 0.001 %"
    return f"{num(100 * value, 2 if value < 0.0995 else 3)} %"


def duration(seconds: float | None) -> str:
    """Seconds as "12.3 s", "4 min 05 s" or "2 h 07 min"."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def pretty(name: str) -> str:
    """A key of a result file as words: "ppo_round1" -> "PPO round 1"."""
    upper = {"grpo": "GRPO", "ppo": "PPO", "sft": "SFT", "kl": "KL", "rm": "RM", "all": "all"}
    spaced = re.sub(r"round(?=\d)", "round ", name).replace("_", " ").replace("-", " ")
    words = [upper.get(word, word) for word in spaced.split()]
    text = " ".join(words)
    return text[:1].upper() + text[1:] if text else text


def clip(text: str, length: int = 600) -> str:
    """At most `length` characters; says how many were left out."""
    if len(text) <= length:
        return text
    return f"{text[:length].rstrip()} … ({len(text) - length:,} more characters)"
