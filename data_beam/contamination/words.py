"""The words by which a question is recognised, whatever dress a copy of it wears.

On top of `kernels.tokens` (which ignores case, white space and punctuation): an underscore is no
part of a word, so markdown's _emphasis_ and LaTeX's x_1 against x_{1} make no difference; LaTeX
commands that only change the look (\\left, \\quad, \\mathrm ...) are no words, nor is the n of a
literal "\\n"; \\dfrac and \\tfrac are \\frac.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from data_beam.kernels.tokens import Tokens, tokenize

_LOOKS = [
    "left", "right", "middle", "big", "bigl", "bigr", "bigg", "biggl", "biggr", "quad", "qquad",
    "text", "textbf", "textit", "textrm", "textnormal", "mbox", "mathrm", "mathbf", "mathit",
    "mathsf", "boldsymbol", "operatorname", "displaystyle", "textstyle", "limits", "nolimits",
    "hspace", "vspace", "phantom", "n", "t", "r",
]  # fmt: skip
_SAME = {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "ldots": "dots", "cdots": "dots"}
_BACKSLASH = ord("\\")


class Words(NamedTuple):
    """`hashes` [W] uint64 and the characters `starts`, `ends` [W] int64 of each word, which count
    in `lowered_length` characters of the lower-cased text (see `offsets`)."""

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lowered_length: int


@functools.cache
def _commands() -> tuple[np.ndarray, np.ndarray]:
    """Hashes of commands in ascending order, and of what they stand for (0 = nothing)."""
    names = [*_LOOKS, *_SAME]
    hashes = np.array([tokenize(name).hashes[0] for name in names], np.uint64)
    meanings = [tokenize(_SAME[n]).hashes[0] if n in _SAME else 0 for n in names]
    order = np.argsort(hashes)
    return hashes[order], np.array(meanings, np.uint64)[order]


def words_of(text: str, tokens: Tokens | None = None) -> Words:
    """The words of `text`; `tokens` are `tokenize(text)`, if known and it has no underscore."""
    points, starts, ends, hashes = tokens or tokenize(text.replace("_", " "))
    if "\\" in text:
        keep, hashes = _without_commands(points, starts, hashes)
        starts, ends, hashes = starts[keep], ends[keep], hashes[keep]
    return Words(hashes, starts, ends, len(points))


def _without_commands(points, starts, hashes) -> tuple[np.ndarray, np.ndarray]:
    """(which words to keep, the hashes of all)."""
    at = np.flatnonzero(points.take(starts - 1, mode="clip") == _BACKSLASH)
    known, meanings = _commands()
    row = np.searchsorted(known, hashes[at])
    row[row == len(known)] = 0
    at, row = at[known[row] == hashes[at]], row[known[row] == hashes[at]]
    hashes = hashes.copy()
    hashes[at] = meanings[row]
    keep = np.ones(len(hashes), bool)
    keep[at] = meanings[row] != 0
    return keep, hashes


def offsets(text: str, lowered: np.ndarray, lowered_length: int) -> np.ndarray:
    """Offsets into `text` for offsets into the lower-cased text (which is longer where a capital
    has no single small letter, as the Turkish dotted I)."""
    if len(text) == lowered_length:
        return lowered
    starts = np.cumsum([0, *(len(character.lower()) for character in text)])
    return np.searchsorted(starts, lowered, side="right") - 1
