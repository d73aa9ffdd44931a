"""Runs of words of any length looked up in a large fixed set, without a Python loop over words.

With S the running sum of h_i B^i over the word hashes h_i (B odd, hence invertible mod 2^64), the
run of n words from word i has the hash mix64((S[i + n] - S[i]) B^-i + n C): one subtraction and one
product for every n, where `tokens.ngram_hashes` needs n of each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_beam.kernels.tokens import mix64

_BASE = 0xD6E8FEB86659FD93
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
_LENGTH_SALT = 0xA0761D6478BD642F


@functools.lru_cache(maxsize=16)
def _powers(base: int, size: int) -> np.ndarray:
    steps = np.full(size, base, np.uint64)
    steps[0] = 1
    return np.cumprod(steps, dtype=np.uint64)


class Runs:
    """Hashes of the runs of one sequence of words, given as `hashes` [W] uint64."""

    def __init__(self, hashes: np.ndarray):
        self.num_words = len(hashes)
        self._size = 1 << max(12, self.num_words.bit_length())
        self._sums = np.zeros(self.num_words + 1, np.uint64)
        np.cumsum(hashes * _powers(_BASE, self._size)[: len(hashes)], out=self._sums[1:])

    def all(self, n: int) -> np.ndarray:
        """[max(W - n + 1, 0)] uint64: the run of `n` >= 1 words from every word on."""
        count = max(self.num_words - n + 1, 0)
        sums = self._sums[n : n + count] - self._sums[:count]
        return self._finish(sums, _powers(_BASE_INVERSE, self._size)[:count], n)

    def at(self, starts: np.ndarray, n: int) -> np.ndarray:
        """[len(starts)] uint64: the runs of `n` words from the words `starts`, all of which have
        n words left."""
        sums = self._sums[starts + n] - self._sums[starts]
        return self._finish(sums, _powers(_BASE_INVERSE, self._size)[starts], n)

    def whole(self) -> int:
        """The run of all words."""
        return int(self.all(self.num_words)[0]) if self.num_words else 0

    @staticmethod
    def _finish(sums: np.ndarray, inverse: np.ndarray, n: int) -> np.ndarray:
        sums *= inverse
        sums += np.uint64(n * _LENGTH_SALT % (1 << 64))
        return mix64(sums)


class HashSet:
    """A fixed set of uint64 in ascending order, with a table that turns most others away.

    The table has a byte for each value of the leading bits, about 32 times as many as there are
    keys but at most 16 MiB, so that the binary search is done for few others than the keys.
    """

    def __init__(self, keys: np.ndarray):
        self.keys = np.ascontiguousarray(keys, np.uint64)
        bits = min(24, max(12, (32 * len(keys)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[self.keys >> self._shift] = True

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(where in `queries`, where among the keys) of every query that is in the set, both
        int64, in the order of the queries."""
        at = np.flatnonzero(self._table.take((queries >> self._shift).view(np.int64)))
        if not len(at):
            return at, at
        wanted = queries[at]
        key = np.searchsorted(self.keys, wanted)
        key[key == len(self.keys)] = 0
        found = self.keys[key] == wanted
        return at[found], key[found]


class Postings(NamedTuple):
    """For each of `keys` [K] uint64 (ascending), the `values` [offsets[k] : offsets[k + 1]]."""

    keys: np.ndarray
    offsets: np.ndarray  # [K + 1] int64
    values: np.ndarray  # int64, ascending within a key

    @classmethod
    def build(cls, pairs: Sequence[tuple[np.ndarray, int]]) -> Postings:
        """From (keys, value) pairs; a pair that occurs twice is kept once."""
        keys = np.concatenate([np.zeros(0, np.uint64), *(some for some, _ in pairs)])
        values = np.repeat(
            np.array([value for _, value in pairs], np.int64), [len(some) for some, _ in pairs]
        )
        order = np.lexsort((values, keys))
        keys, values = keys[order], values[order]
        new_key = np.ones(len(keys), bool)
        new_key[1:] = keys[1:] != keys[:-1]
        new = new_key.copy()
        new[1:] |= values[1:] != values[:-1]
        keys, values, new_key = keys[new], values[new], new_key[new]
        firsts = np.flatnonzero(new_key)
        return cls(keys[firsts], np.append(firsts, len(keys)).astype(np.int64), values)

    def of(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position in `keys`, value) of every posting of the keys with these numbers."""
        counts = self.offsets[keys + 1] - self.offsets[keys]
        owner = np.repeat(np.arange(len(keys)), counts)
        ends = np.cumsum(counts)
        within = np.arange(len(owner)) - np.repeat(ends - counts, counts)
        return owner, self.values[self.offsets[keys][owner] + within]

    def without(self, keys: np.ndarray) -> Postings:
        """The same, less some keys."""
        kept = np.flatnonzero(~np.isin(self.keys, keys))
        owner, values = self.of(kept)
        offsets = np.append(0, np.cumsum(np.bincount(owner, minlength=len(kept))))
        return Postings(self.keys[kept], offsets.astype(np.int64), values)


def merge(starts: np.ndarray, ends: np.ndarray, gap: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The union of the intervals [start, end) as disjoint ones in ascending order; those with at
    most `gap` between them become one."""
    if not len(starts):
        return starts, ends
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.append(True, starts[1:] > reach[:-1] + gap)
    last = np.append(first[1:], True)
    return starts[first], reach[last]
