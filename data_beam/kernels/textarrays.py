"""Arrays over one text that its signals share: characters, words, chunks, lines, sentences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from data_beam.kernels import characters
from data_beam.kernels.characters import DIGIT, IDEOGRAPH, KIND, LETTER, PUNCTUATION, SPACE, WIDE
from data_beam.kernels.tokens import Tokens, codepoints, tokenize

_Value = TypeVar("_Value")


class lazy(Generic[_Value]):
    """functools.cached_property without the lock that costs it most of its time before 3.12."""

    def __init__(self, func: Callable[[Any], _Value]):
        self.func, self.__doc__ = func, func.__doc__

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, instance: Any, owner: type) -> _Value:
        value = instance.__dict__[self.name] = self.func(instance)
        return value


class Lines(NamedTuple):
    """`starts`/`ends` [L] of the lines; `numbers` [L] count blank lines too, which are `total`."""

    starts: np.ndarray
    ends: np.ndarray
    numbers: np.ndarray
    total: int


@functools.cache
def _ascii_kinds() -> bytes:
    return bytes((characters.flags()[:256] & KIND).astype(np.uint8))


class TextArrays:
    """Every array is computed when first asked for. [C] stands for characters, [W] for words, [L]
    for lines."""

    def __init__(self, text: str):
        self.text = text

    @lazy
    def words(self) -> Tokens:
        """Of the lower-cased text, which may be longer than the text."""
        return tokenize(self.text)

    @lazy
    def word_lengths(self) -> np.ndarray:
        """[W] in characters."""
        return self.words.ends - self.words.starts

    @lazy
    def word_flags(self) -> np.ndarray:
        """[W] flags of the first character of every word."""
        return characters.flags().take(self.words.codepoints[self.words.starts])

    @lazy
    def quarters(self) -> np.ndarray:
        """[W] uint8: how many quarters of a word each counts."""
        return characters.quarter_words().take(self.words.codepoints[self.words.starts])

    @lazy
    def points(self) -> np.ndarray:
        """[C] uint32 code points."""
        return codepoints(self.text)

    @lazy
    def flags(self) -> np.ndarray:
        """[C] uint16, see `characters`."""
        return characters.flags().take(self.points)

    @lazy
    def kinds(self) -> np.ndarray:
        """[C] uint8: letter, digit, space, ..."""
        if self.text.isascii():
            return np.frombuffer(self.text.encode().translate(_ascii_kinds()), np.uint8)
        return (self.flags & KIND).astype(np.uint8)

    def flags_at(self, places: np.ndarray) -> np.ndarray:
        """Flags of some characters: of few, cheaper than of all."""
        return characters.flags().take(self.points[places])

    @lazy
    def kind_counts(self) -> np.ndarray:
        return np.bincount(self.kinds, minlength=KIND + 1)

    @lazy
    def num_visible(self) -> int:
        """Characters that are not white space; at least 1, being divided by."""
        return max(len(self.points) - int(self.kind_counts[SPACE]), 1)

    @lazy
    def chunks(self) -> np.ndarray:
        """[chunks] int64 where each begins: after white space, at an ideograph, and at a letter or
        digit after an ideograph or wide punctuation. Other punctuation joins what is before it."""
        begins = np.empty(len(self.points), bool)
        begins[:1] = True
        np.equal(self.kinds[:-1], SPACE, out=begins[1:])
        if not self.text.isascii():
            ideograph = (self.flags & IDEOGRAPH) != 0
            begins |= ideograph
            breaks = ideograph | ((self.flags & WIDE != 0) & (self.kinds >= PUNCTUATION))
            begins[1:] |= breaks[:-1] & ((self.kinds == LETTER) | (self.kinds == DIGIT))[1:]
        begins &= self.kinds != SPACE
        return np.flatnonzero(begins)

    @lazy
    def lines(self) -> Lines:
        """The stretches without newline that are not blank, stripped."""
        newlines = (self.points == ord("\n")).nonzero()[0]
        begins = np.zeros(len(newlines) + 1, np.int64)
        np.add(newlines, 1, out=begins[1:])
        stops = np.full(len(newlines) + 1, len(self.points))
        stops[:-1] = newlines
        visible = np.flatnonzero(self.kinds != SPACE)
        first = np.searchsorted(visible, begins)
        last = np.searchsorted(visible, stops) - 1
        numbers = np.flatnonzero(first <= last)
        total = len(begins) - int(not self.text or self.text.endswith("\n"))
        return Lines(visible[first[numbers]], visible[last[numbers]] + 1, numbers, total)

    @lazy
    def line_end_flags(self) -> np.ndarray:
        """[L] flags of the last character of every line."""
        return self.flags_at(self.lines.ends - 1)

    @lazy
    def ellipsis_lines(self) -> np.ndarray:
        """[L] bool: which lines end with an ellipsis."""
        starts, ends, points = self.lines.starts, self.lines.ends, self.points
        if "..." not in self.text and "…" not in self.text:
            return np.zeros(len(starts), bool)
        dots = ends - starts >= 3
        for back in (1, 2, 3):
            dots &= points[np.maximum(ends - back, 0)] == ord(".")
        return dots | (points[ends - 1] == ord("…"))

    @lazy
    def line_lengths(self) -> np.ndarray:
        return self.lines.ends - self.lines.starts

    @lazy
    def line_widths(self) -> np.ndarray:
        """[L] in columns: East Asian wide characters take two."""
        if self.text.isascii():
            return self.line_lengths
        wide = _sums(self.flags & WIDE)
        return self.line_lengths + wide[self.lines.ends] - wide[self.lines.starts]

    @lazy
    def line_texts(self) -> list[str]:
        """The same as strings."""
        return [line for raw in self.text.split("\n") if (line := raw.strip())]

    @lazy
    def char_counts(self) -> np.ndarray:
        """How often each visible character occurs, in no order of note."""
        return run_lengths(np.sort(self.points[self.kinds != SPACE]))

    @lazy
    def marks(self) -> np.ndarray:
        """Where the punctuation marks and symbols are."""
        return np.flatnonzero(self.kinds >= PUNCTUATION)

    @lazy
    def sentence_ends(self) -> np.ndarray:
        """[sentences] the character after the last mark of each."""
        flags = np.append(self.flags, np.uint16(SPACE))
        marks = np.flatnonzero(flags & characters.TERMINAL)
        ends = marks[flags[marks + 1] & characters.TERMINAL == 0] + 1
        wide = flags[ends - 1] & WIDE != 0
        for _ in range(3):  # closers, as in: ("So?")
            ends = ends + ((flags[ends] & characters.CLOSER != 0) & (ends < len(self.points)))
        return ends[wide | (flags[ends] & KIND == SPACE)]


def _sums(flags: np.ndarray) -> np.ndarray:
    """[C + 1] int32 running count of what is not 0."""
    sums = np.zeros(len(flags) + 1, np.int32)
    np.cumsum(flags != 0, out=sums[1:])
    return sums


def run_lengths(ascending: np.ndarray) -> np.ndarray:
    """How often each value occurs."""
    if not len(ascending):
        return np.zeros(0, np.int64)
    new = np.ones(len(ascending) + 1, bool)
    np.not_equal(ascending[1:], ascending[:-1], out=new[1:-1])
    edges = new.nonzero()[0]
    return edges[1:] - edges[:-1]
