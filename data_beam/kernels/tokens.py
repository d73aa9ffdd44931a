"""Words of a text as an array of 64-bit hashes, without a Python loop over words.

A word is a run of letters, digits, marks and underscores, lower-cased. Scripts written without
spaces (Han, kana, Thai, Lao, Khmer, Burmese) give one word per character: with `\\w+` a whole
Chinese clause would be a single word and an n-gram would span a paragraph, so edited copies of
Chinese documents would go unseen (every public MinHash tool we know has that fault).

A word's hash mixes its UTF-8 bytes eight at a time. The cost is per word, not per character, and
the hash of a word does not depend on the text around it.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import unicodedata
from typing import NamedTuple

import numpy as np

SEPARATOR, WORD, IDEOGRAPH = 0, 1, 2

_BASE = 0x9E3779B97F4A7C15
# Words of more bytes are hashed one by one: a run of encoded data may have millions.
_MAX_VECTORISED = 32
_CHUNKS = (
    (8, np.uint64(0xD1B54A32D192ED03)), (16, np.uint64(0xABC98388FB8FAC03)),
    (24, np.uint64(0x8CB92BA72F3D8DD7)),
)  # fmt: skip
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
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


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
def _ascii_classes() -> bytes:
    return character_classes()[:256].tobytes()


def codepoints(text: str) -> np.ndarray:
    """[len(text)] uint32; lone surrogates are kept as they are."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def tokenize(text: str) -> Tokens:
    """Splits a text into words (see the module's text) and hashes them."""
    text = text.lower()
    if text.isascii():
        data = text.encode()
        points = np.frombuffer(data, np.uint8).astype(np.uint32)
        classes = np.frombuffer(data.translate(_ascii_classes()), np.uint8)
        starts, ends = spans(classes)
        return Tokens(points, starts, ends, hash_slices(data, starts, ends))
    data = text.encode("utf-8", "surrogatepass")
    points = codepoints(text)
    starts, ends = spans(character_classes().take(points))
    # Every byte that is no continuation starts a character.
    first_byte = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)
    first_byte = np.append(first_byte, len(data))
    hashes = hash_slices(data, first_byte.take(starts), first_byte.take(ends))
    return Tokens(points, starts, ends, hashes)


def spans(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First character and last + 1 of every word, from the class of every character: runs of
    WORD, and each IDEOGRAPH alone."""
    padded = np.zeros(len(classes) + 2, np.uint8)
    padded[1:-1] = classes
    here, before, after = padded[1:-1], padded[:-2], padded[2:]
    if classes.max(initial=0) < IDEOGRAPH:
        edges = np.flatnonzero(padded[1:] != padded[:-1])
        return edges[0::2], edges[1::2]
    alone = here == IDEOGRAPH
    inside = here != SEPARATOR
    starts = np.flatnonzero(inside & (alone | (before != WORD)))
    ends = np.flatnonzero(inside & (alone | (after != WORD))) + 1
    return starts, ends


def hash_slices(data: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[W] uint64: a hash of every slice `data[start:end]`; slices hold no NUL and are not empty."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    lengths = ends - starts
    # Element i of this view is the eight bytes from byte i on; a shift drops those after the slice.
    words = np.ndarray((len(data) + _MAX_VECTORISED - 7,), "<u8", data + bytes(32), strides=(1,))
    hashes = mix64(words[starts] << _unused_bits(lengths))
    rest = np.flatnonzero(lengths > 8)
    if not len(rest):
        return hashes
    long, first = lengths.take(rest), starts.take(rest)
    total = hashes.take(rest) * np.uint64(_BASE)
    # Most long words end in their second eight bytes: the others are looked at for what is left.
    at: slice | np.ndarray = slice(None)
    for offset, factor in _CHUNKS:
        if offset > 8:
            longer = np.flatnonzero(long > offset)
            if not len(longer):
                break
            at = longer
        total[at] += (words[first[at] + offset] << _unused_bits(long[at] - offset)) * factor
    hashes[rest] = mix64(total)
    for index in rest[long > _MAX_VECTORISED].tolist():
        slice_ = data[starts[index] : ends[index]]
        digest = hashlib.blake2b(slice_, digest_size=8).digest()
        hashes[index] = int.from_bytes(digest, "little")
    return hashes


def _unused_bits(lengths: np.ndarray) -> np.ndarray:
    """Of eight bytes, those beyond a slice of so many, as the distance of a left shift."""
    bits = np.minimum(lengths, 8)
    bits *= -8
    bits += 64
    return bits.view(np.uint64)


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """[max(W - n + 1, 0)] uint64: one hash per run of `n` consecutive words."""
    return mix64(_combined(hashes, n))


def _combined(hashes: np.ndarray, n: int) -> np.ndarray:
    """sum_j hashes[i + j] * B^(n - j) for every i, in about 2 log2(n) steps instead of n: a run is
    two runs of half the length, and perhaps one word more."""
    count = len(hashes) - n + 1
    if count <= 0 or n < 1:
        return np.zeros(0, np.uint64)
    if n == 1:
        return hashes * np.uint64(_BASE)
    half = n // 2
    part = _combined(hashes, half)
    result = part[: len(part) - half] * np.uint64(pow(_BASE, half, 1 << 64))
    result += part[half:]
    if n % 2:
        result = result[:count]
        result *= np.uint64(_BASE)
        result += hashes[n - 1 :] * np.uint64(_BASE)
    return result
