"""How much of a text repeats: Gopher's n-gram fractions (Rae et al. 2021, appendix A1.1) in one
chain of sorts.

Where two n-grams differ, so do the (n + 1)-grams that begin there. So only the starts whose n-gram
occurs twice are looked at for n + 1, and the sorts shrink to nothing after a few steps. Short texts
are sorted together, because a call of numpy costs more than its work on a thousand words.

The hash of the words i..j is (S[j] - S[i]) B^-i, with S the running sum of h_i B^i (B odd, hence
invertible mod 2^64). A sort key is, from the top: the number of the text, the high bits of the
hash, the start. So texts never meet, and one plain sort gives the same on any CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

TOP = (2, 3, 4)
DUPLICATE = (5, 6, 7, 8, 9, 10)
_BASE = 0xC2B2AE3D27D4EB4F
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
# Texts sorted together. Fixed, so that the bits left for the hash depend on the text alone.
_TEXT_BITS, _START_BITS = 6, 15


class Words(NamedTuple):
    """`hashes` [W] uint64, `lengths` [W] in characters, `quarters` [W]: of a word, that each
    counts."""

    hashes: np.ndarray
    lengths: np.ndarray
    quarters: np.ndarray


class NgramShares(NamedTuple):
    """Shares of the characters of all words, by n."""

    top: dict[int, float]
    duplicate: dict[int, float]


def ngram_shares(texts: Sequence[Words]) -> list[NgramShares]:
    """Of every text; none depends on another.

    `top` (n = 2 to 4): the characters in the occurrences of the most frequent n-gram, its count
    times its length, at most 1; of several as frequent the longest; 0 where none occurs twice.
    `duplicate` (n = 5 to 10): the characters of n-grams that stood in the text before, each
    character counted once. (RedPajama-V2 also counts the first occurrence, datatrove skips n words
    after each hit and divides by the length of the text, spaces included. The paper leaves it
    open; this reading is that of its duplicate lines.)

    An n-gram is the shortest run of words from a start that weighs at least n words: n words where
    spaces separate them, 2n characters of Chinese.
    """
    result: list[NgramShares] = []
    for group in _groups(texts):
        result.extend(_of_group(group))
    return result


def _groups(texts: Sequence[Words]) -> Iterator[list[Words]]:
    group: list[Words] = []
    count = 0
    for words in texts:
        count += len(words.hashes)
        if group and (count >= 1 << _START_BITS or len(group) == 1 << _TEXT_BITS):
            yield group
            group, count = [], len(words.hashes)
        group.append(words)
    if group:
        yield group


@functools.lru_cache(maxsize=8)
def _powers(base: int, size: int) -> np.ndarray:
    steps = np.full(size, base, np.uint64)
    steps[0] = 1
    return np.cumprod(steps, dtype=np.uint64)


def _running(values: np.ndarray, dtype: type) -> np.ndarray:
    sums: np.ndarray = np.zeros(len(values) + 1, dtype)
    np.cumsum(values, out=sums[1:])
    return sums


def _of_group(texts: list[Words]) -> list[NgramShares]:
    shares = [NgramShares(dict.fromkeys(TOP, 0.0), dict.fromkeys(DUPLICATE, 0.0)) for _ in texts]
    bounds = _running(np.array([len(words.hashes) for words in texts]), np.int64)
    count = int(bounds[-1])
    if count < 2:
        return shares
    hashes, lengths, quarters = (np.concatenate(parts) for parts in zip(*texts, strict=True))
    size = 1 << max(12, count.bit_length())
    sums = _running(hashes * _powers(_BASE, size)[:count], np.uint64)
    inverse = _powers(_BASE_INVERSE, size)
    length_sums = _running(lengths, np.int64)
    ends_of = _ends_of(quarters)
    text_of = np.repeat(np.arange(len(texts)), np.diff(bounds))
    chars = np.maximum(length_sums[bounds[1:]] - length_sums[bounds[:-1]], 1)

    alone = count >= 1 << _START_BITS
    start_bits = np.uint64(count.bit_length() if alone else _START_BITS)
    low = (np.uint64(1) << start_bits) - np.uint64(1)
    text_shift = np.uint64(64 - _TEXT_BITS)
    starts = np.arange(count)
    for n in range(TOP[0], DUPLICATE[-1] + 1):
        ends = ends_of(starts, n)
        inside = ends <= bounds[text_of[starts] + 1]
        starts, ends = starts[inside], ends[inside]
        keys = (sums[ends] - sums[starts]) * inverse[starts]
        if not alone:
            keys >>= np.uint64(_TEXT_BITS)
            keys |= text_of[starts].view(np.uint64) << text_shift
        keys &= ~low
        keys |= starts.view(np.uint64)
        keys.sort()
        grams = keys >> start_bits
        starts = (keys & low).view(np.int64)
        seen = np.zeros(len(starts) + 1, bool)  # stood in its text before; the last is a sentinel
        np.equal(grams[1:], grams[:-1], out=seen[1:-1])
        if not seen.any():
            break
        if n in TOP:
            firsts = (~seen).nonzero()[0]
            counts = firsts[1:] - firsts[:-1]
            repeated = counts > 1
            counts, at = counts[repeated], starts[firsts[:-1][repeated]]
            longest = length_sums[ends_of(at, n)] - length_sums[at]
            best = np.zeros(len(texts), np.int64)
            np.maximum.at(best, text_of[at], counts << 32 | longest)
            covered = (best >> 32) * (best & 0xFFFFFFFF)
            _store(shares, "top", n, np.minimum(covered / chars, 1.0))
        else:
            again = starts[seen[:-1]]
            again.sort()
            ends = ends_of(again, n)
            # The union of intervals whose starts and ends both ascend.
            fresh = again.copy()
            np.maximum(again[1:], ends[:-1], out=fresh[1:])
            new = length_sums[ends] - length_sums[fresh]
            covered = np.bincount(text_of[again], new, minlength=len(texts))
            _store(shares, "duplicate", n, covered / chars)
        starts = starts[seen[:-1] | seen[1:]]
    return shares


def _store(shares: list[NgramShares], field: str, n: int, values: np.ndarray) -> None:
    for one, value in zip(shares, values.tolist(), strict=True):
        getattr(one, field)[n] = value


def _ends_of(quarters: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
    """(starts, n) -> the word after the n-gram from each start, beyond the last word + 1 where the
    words end first."""
    if quarters.min() == 4:
        return lambda starts, n: starts + n
    count = len(quarters)
    weights = _running(quarters, np.int64)
    # By weight in quarters: how many words weigh at least that; then a way past the end.
    words = np.full(weights[-1] + 4 * DUPLICATE[-1] + 1, count + 1)
    words[0] = 0
    words[1 : weights[-1] + 1] = np.repeat(np.arange(1, count + 1), quarters)
    return lambda starts, n: words[weights[starts] + 4 * n]
