"""Words of a text as an array of 64-bit hashes, without a Python loop over words.

A word is a run of letters, digits, marks and underscores, lower-cased. Scripts written without
spaces (Han, kana, Thai, Lao, Khmer, Burmese) give one word per character: with `\\w+` a whole
Chinese clause would be a single word and an n-gram would span a paragraph, so edited copies of
Chinese documents would go unseen (every public MinHash tool we know has that fault).

The hash of a word is sum_j v(c_j) B^j mod 2^64 over its characters c_j, read off a running sum:
(S[end] - S[start]) * B^-start, with v random per code point and B odd, hence invertible.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from typing import NamedTuple

import numpy as np

SEPARATOR, WORD, IDEOGRAPH = 0, 1, 2

_BASE = 0x9E3779B97F4A7C15
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
# Inclusive ranges of code points of scripts that put no space between words.
_UNSPACED = (
    (0x0E00, 0x0E7F), (0x0E80, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF),  # Thai to Khmer
    (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF),  # radicals, kana
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F),  # Han, half-width kana
    (0x20000, 0x3FFFF),  # Han extensions
)  # fmt: skip


class Tokens(NamedTuple):
    """`codepoints` [C] uint32 of the lower-cased text, `starts`/`ends` [W] int64 into it, and
    `hashes` [W] uint64."""

    codepoints: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 in which every output bit depends on every
    input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.cache
def character_classes() -> np.ndarray:
    """[0x110000] uint8: SEPARATOR, WORD or IDEOGRAPH per code point."""
    classes = np.zeros(sys.maxunicode + 1, np.uint8)
    category = unicodedata.category
    # Letters, marks, digits. Planes 4 to 16 hold no letters.
    classes[:0x40000] = [category(chr(c))[0] in "LMN" for c in range(0x40000)]
    classes[ord("_")] = WORD
    for first, last in _UNSPACED:
        classes[first : last + 1] *= IDEOGRAPH
    return classes


@functools.cache
def _character_values() -> np.ndarray:
    """[0x110000] uint64, one random-looking number per code point."""
    return mix64(np.arange(1, sys.maxunicode + 2, dtype=np.uint64) * np.uint64(_BASE))


@functools.lru_cache(maxsize=4)
def _powers(base: int, count: int) -> np.ndarray:
    steps = np.full(count, base, np.uint64)
    steps[0] = 1
    return np.cumprod(steps, dtype=np.uint64)


def codepoints(text: str) -> np.ndarray:
    """[len(text)] uint32; lone surrogates are kept as they are."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def tokenize(text: str) -> Tokens:
    """Splits a text into words (see the module's text) and hashes them."""
    points = codepoints(text.lower())
    starts, ends = _spans(character_classes().take(points))
    if not len(starts):
        return Tokens(points, starts, ends, np.zeros(0, np.uint64))
    # Powers are cached by size class, so that a run over many documents computes them a few times.
    size = 1 << max(16, len(points).bit_length())
    running = np.zeros(len(points) + 1, np.uint64)
    terms = _character_values().take(points)
    terms *= _powers(_BASE, size)[: len(points)]
    np.cumsum(terms, out=running[1:])
    hashes = (running[ends] - running[starts]) * _powers(_BASE_INVERSE, size)[starts]
    return Tokens(points, starts, ends, mix64(hashes))


def _spans(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First character and last + 1 of every word, from the class of every character."""
    inside = np.zeros(len(classes) + 2, bool)
    np.equal(classes, WORD, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[0::2], edges[1::2]
    alone = np.flatnonzero(classes == IDEOGRAPH)
    if not len(alone):
        return starts, ends
    starts = np.concatenate([starts, alone])
    order = np.argsort(starts, kind="stable")
    return starts[order], np.concatenate([ends, alone + 1])[order]


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """[max(W - n + 1, 0)] uint64: one hash per run of `n` consecutive words."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    combined = np.zeros(count, np.uint64)
    for position in range(n):
        factor = np.uint64(pow(_BASE, position + 1, 1 << 64))
        combined += hashes[position : position + count] * factor
    return mix64(combined)
