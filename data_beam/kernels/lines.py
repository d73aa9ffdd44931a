"""Lines and paragraphs of a text as spans with a hash each, without a Python loop over lines.

Two lines are equal when their words are (`kernels.tokens`): case, punctuation, indentation and
decoration do not count. A line without words has no hash.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_beam.kernels.tokens import IDEOGRAPH, Tokens, character_classes, codepoints, mix64

_NEWLINE = 10
_STEP = np.uint64(0x9E3779B97F4A7C15)
_SPACES = np.array([9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028,
                    0x2029, 0x202F, 0x205F, 0x3000], np.uint32)  # fmt: skip


class Units(NamedTuple):
    """Lines (or paragraphs) with words: `starts`, `ends` [U] int64, characters of the text, line
    ends and following blank lines included; `hashes` [U] uint64; `widths` [U] int64, characters of
    the words, those of scripts without spaces counted twice."""

    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray
    widths: np.ndarray


def split(text: str, words: Tokens, paragraphs: bool = False) -> Units:
    """`words` are the tokens of `text`. A paragraph ends with a blank line."""
    low = words.codepoints
    low_breaks = np.flatnonzero(low == _NEWLINE)
    # Lower case may have more characters, but has the same lines.
    points = low if len(low) == len(text) else codepoints(text)
    breaks = low_breaks if points is low else np.flatnonzero(points == _NEWLINE)
    starts = np.append(0, breaks + 1)
    unit_of_line = np.arange(len(starts))
    if paragraphs:
        unit_of_line, starts = _paragraphs(points, starts)
    bounds = np.append(starts, len(points))
    unit = unit_of_line.take(np.searchsorted(low_breaks, words.starts))
    if not len(unit):
        return Units(*(np.zeros(0, np.int64),) * 2, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    first = np.flatnonzero(np.append(True, unit[1:] != unit[:-1]))
    place = np.arange(len(unit)) - np.repeat(first, np.diff(np.append(first, len(unit))))
    terms = mix64(words.hashes + place.astype(np.uint64) * _STEP)
    wide = character_classes()[low[np.minimum(words.starts, len(low) - 1)]] == IDEOGRAPH
    widths = (words.ends - words.starts) * (1 + wide)
    here = unit[first]
    return Units(
        bounds[here], bounds[here + 1], mix64(np.add.reduceat(terms, first)),
        np.add.reduceat(widths, first),
    )  # fmt: skip


def _paragraphs(points: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The paragraph of every line, and where each paragraph begins. Blank lines belong to the
    paragraph before them."""
    visible = np.append(0, np.cumsum(~np.isin(points, _SPACES)))
    filled = np.diff(visible[np.append(starts, len(points))]) > 0
    begins = filled & ~np.append(False, filled[:-1])
    begins[0] = True
    return np.cumsum(begins) - 1, starts[begins]


def merge(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Spans in ascending order, touching ones joined, as flat [start, end, start, end, ...]."""
    if not len(starts):
        return np.zeros(0, np.int64)
    apart = starts[1:] > ends[:-1]
    first, last = np.append(True, apart), np.append(apart, True)
    return np.stack([starts[first], ends[last]], axis=1).reshape(-1)


def cut(text: str, spans: np.ndarray) -> str:
    """The text without the flat spans [start, end, ...], which are ascending and apart."""
    edges = [0, *(int(edge) for edge in spans), len(text)]
    return "".join(text[a:b] for a, b in zip(edges[0::2], edges[1::2], strict=True))
