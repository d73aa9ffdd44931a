"""MinHash signatures and their bands (Broder 1997; the InternLM2 report, section 3.1.1, uses word
5-grams, 128 hashes and threshold 0.7 but gives no band split: 16 bands of 8 rows by default).

Two documents agree in one of the `num_perm` minima with probability J, the Jaccard similarity of
their sets of n-grams; in all `rows` of at least one of `bands` bands with 1 - (1 - J^rows)^bands.
"""

from __future__ import annotations

import functools
import threading

import numpy as np

from data_beam.kernels.tokens import mix64, ngram_hashes

# n-grams hashed at a time: num_perm x block x 4 bytes = 2 MiB, the best of 128 to 8192 measured on
# a Sapphire Rapids Xeon. The buffer is kept per thread: fresh pages cost more than the hashing.
_BLOCK = 4096
_scratch = threading.local()


@functools.lru_cache(maxsize=8)
def _family(num_perm: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two columns [num_perm, 1] uint32 of the hash family h(x) = (x XOR a) * b mod 2^32, b odd."""
    index = np.arange(1, num_perm + 1, dtype=np.uint64) + np.uint64(seed % (1 << 32) << 20)
    bits = mix64(mix64(index) + np.uint64(0x9E3779B97F4A7C15))
    xor = (bits >> np.uint64(32)).astype(np.uint32)
    multiply = (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32) | np.uint32(1)
    return xor[:, None], multiply[:, None]


def shingles(word_hashes: np.ndarray, ngram: int) -> np.ndarray:
    """[max(W - ngram + 1, 1)] uint32: the hashed word n-grams of a text. A text of fewer than
    `ngram` words is one shingle, so that equal short texts still meet."""
    if len(word_hashes) < ngram:
        whole = ngram_hashes(word_hashes, len(word_hashes)) if len(word_hashes) else np.zeros(1)
        return (whole.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
    return (ngram_hashes(word_hashes, ngram) >> np.uint64(32)).astype(np.uint32)


def signature(values: np.ndarray, num_perm: int, seed: int) -> np.ndarray:
    """[num_perm] uint32 minima over the shingles `values` [S] uint32. Repeated shingles need no
    removal: they do not change a minimum."""
    xor, multiply = _family(num_perm, seed)
    result = np.full(num_perm, 0xFFFFFFFF, np.uint32)
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) != num_perm:
        buffer = _scratch.buffer = np.empty((num_perm, _BLOCK), np.uint32)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        hashed = buffer[:, : len(block)]
        np.bitwise_xor(block, xor, out=hashed)
        np.multiply(hashed, multiply, out=hashed)
        np.minimum(result, hashed.min(axis=1), out=result)
    return result


def band_keys(minima: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """[bands] uint64: a hash of each band's rows, and of the band's number, so that a match in
    different bands is no match. Uses the first bands * rows minima."""
    table = minima[: bands * rows].reshape(bands, rows).astype(np.uint64)
    keys = np.arange(1, bands + 1, dtype=np.uint64)
    for row in range(rows):
        keys = mix64(keys + table[:, row])
    return keys


def compact(minima: np.ndarray) -> bytes:
    """16 bits of every minimum, for the comparison of candidates: equal minima stay equal, unequal
    ones agree by chance with probability 2^-16. The minima themselves are small numbers (their
    high bits are zero for long texts), hence the mixing."""
    return (mix64(minima.astype(np.uint64)) >> np.uint64(48)).astype("<u2").tobytes()


def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of compact signatures, over the last axis; standard error
    sqrt(J (1 - J) / num_perm)."""
    return np.mean(left == right, axis=-1)
