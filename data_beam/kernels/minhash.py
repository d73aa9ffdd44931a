"""MinHash signatures and their bands (Broder 1997; the InternLM2 report, section 3.1.1, uses word
5-grams, 128 hashes and threshold 0.7 but gives no band split: 16 bands of 8 rows by default).

Two documents agree in one of the `num_perm` minima with probability J, the Jaccard similarity of
their sets of n-grams; in all `rows` of at least one of `bands` bands with 1 - (1 - J^rows)^bands.

Signatures are kept compact, 16 bits a minimum. Unequal minima then agree by chance with probability
2^-16, which moves an estimate of J by (1 - J) / 65,536 and the chance that a band of 8 rows meets
by a factor of 1.0001 at J = 0.5: far below the estimate's own error of 0.04. So the bands are
computed from the compact signature too, and their number can change without reading the texts
again.
"""

from __future__ import annotations

import functools

import numpy as np

from data_beam.kernels.tokens import mix64, ngram_hashes

# Shingles hashed at a time, of many documents together: one numpy call per permutation and block.
# 32,768 x (4 + 4) bytes stay in the second-level cache.
_BLOCK = 32768


@functools.lru_cache(maxsize=8)
def _multipliers(num_perm: int, seed: int) -> np.ndarray:
    """[num_perm, 1] uint32 of the hash family h(x) = x * b mod 2^32, b odd. The shingles x are
    random numbers already (they come out of `mix64`); the measured error of the estimate equals
    the binomial one, as it does with the usual (x XOR a) * b, at two thirds of the cost."""
    index = np.arange(1, num_perm + 1, dtype=np.uint64) + np.uint64(seed % (1 << 32) << 20)
    bits = mix64(mix64(index) + np.uint64(0x9E3779B97F4A7C15))
    return (bits.astype(np.uint32) | np.uint32(1))[:, None]


def shingles(texts: list[np.ndarray], ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashed word n-grams of texts that are given as word hashes, one after the other [S]
    uint32, and where each text's begin [D + 1].

    A text of at most `ngram` words has one n-gram (of all its words), so that equal short texts
    still meet; it gives two values, for 32 bits would let unrelated short texts of a web crawl be
    taken for equal. A text without words has no shingle.
    """
    lengths = np.array([len(words) for words in texts], np.int64)
    if not lengths.sum():
        return np.zeros(0, np.uint32), np.zeros(len(texts) + 1, np.int64)
    counts = np.where(lengths > ngram, lengths - ngram + 1, np.minimum(lengths, 1) * 2)
    offsets = np.append(0, np.cumsum(counts))
    hashes = ngram_hashes(np.concatenate(texts), ngram)
    values = np.empty(offsets[-1], np.uint32)
    begin = 0
    for text, words in enumerate(texts):
        first, last = offsets[text : text + 2]
        if len(words) > ngram:
            values[first:last] = hashes[begin : begin + last - first] >> np.uint64(32)
        elif len(words):
            values[first:last] = ngram_hashes(words, len(words)).view(np.uint32)
        begin += len(words)
    # Zero would be the least under every multiplier.
    return np.maximum(values, np.uint32(1), out=values), offsets


def signatures(values: np.ndarray, offsets: np.ndarray, num_perm: int, seed: int) -> np.ndarray:
    """[D, num_perm] uint32: the least hash of the shingles `values[offsets[d] : offsets[d + 1]]` of
    each text under each permutation; 2^32 - 1 for a text without shingles. Repeated shingles need
    no removal: they do not change a minimum."""
    result = np.full((num_perm, len(offsets) - 1), 0xFFFFFFFF, np.uint32)
    filled = np.flatnonzero(np.diff(offsets))
    bounds = offsets[:-1].take(filled)
    hashed = np.empty(min(_BLOCK, len(values)), np.uint32)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        first = np.searchsorted(bounds, start, "right") - 1
        last = np.searchsorted(bounds, start + len(block), "left")
        begins = np.maximum(bounds[first:last] - start, 0)
        least = np.empty((num_perm, len(begins)), np.uint32)
        out = hashed[: len(block)]
        for row, multiplier in zip(least, _multipliers(num_perm, seed), strict=True):
            np.multiply(block, multiplier, out=out)
            np.minimum.reduceat(out, begins, out=row)
        columns = filled[first:last]
        result[:, columns] = np.minimum(result[:, columns], least)
    return result.T


def compact(minima: np.ndarray) -> np.ndarray:
    """[..., num_perm] uint16: 16 bits of every minimum. The minima themselves are small numbers
    (their high bits are zero for long texts), hence the mixing."""
    return (mix64(minima.astype(np.uint64)) >> np.uint64(48)).astype("<u2")


def band_keys(compact_signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """[D, bands] uint64: a hash of each band's rows, and of the band's number, so that a match in
    different bands is no match. Uses the first bands * rows minima."""
    table = compact_signatures[:, : bands * rows].reshape(-1, bands, rows)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), table.shape[:2])
    for row in range(rows):
        keys = mix64(keys * np.uint64(0x9E3779B97F4A7C15) + table[:, :, row])
    return keys


def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of compact signatures, over the last axis; standard error
    sqrt(J (1 - J) / num_perm)."""
    return np.mean(left == right, axis=-1)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Exact similarity of two sorted arrays of distinct shingles; 0 when both are empty."""
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / max(len(left) + len(right) - common, 1)
