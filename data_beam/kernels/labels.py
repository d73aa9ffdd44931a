"""Which of two copies is the better one.

A document's label is 40 bytes that sort best first: newest dump, newest timestamp, longest,
smallest id (InternLM2 keeps the most recent copy, section 3.1.1). Its last 16 bytes are the id. In
arrays a label is five uint64, [..., 5], compared from left to right.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence

import numpy as np

from data_beam.schema import Document

LABEL_BYTES = 40
TOP = (1 << 64) - 1
_SPACE = 32
_WHITE_TO_SPACE = bytes(_SPACE if chr(c).isspace() else c for c in range(256))


def dump_number(dump: str) -> int:
    """A number that grows with the date of a crawl: "CC-MAIN-2023-50" -> 202350."""
    return int("".join(re.findall(r"[0-9]+", dump))[:18] or 0)


def label_of(document: Document) -> bytes:
    newness = dump_number(document.dump), max(document.timestamp, 0), len(document.text)
    inverted = (TOP - min(value, TOP) for value in newness)
    return struct.pack(">QQQ", *inverted) + bytes.fromhex(document.id)


def text_hash(text: str) -> bytes:
    """16 bytes that are equal for texts that differ only in white space (the report removes code
    duplicates under normalised indentation)."""
    if text.isascii():
        # The same, without an object per word.
        data = np.frombuffer(text.encode().translate(_WHITE_TO_SPACE), np.uint8)
        space = data == _SPACE
        again = space[1:] & space[:-1]
        joined = data[:1].tobytes() + data[1:][~again].tobytes()
        joined = joined.strip(b" ")
    else:
        joined = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=16).digest()


def to_ids(halves: np.ndarray) -> list[str]:
    """Ids from the last two columns of labels, [n, 2] uint64."""
    digits = halves.astype(">u8").tobytes().hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]


def preference(labels: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """[n] uint64 that sorts nearly as the labels do, in an eighth of the bytes: dumps to 20 bits,
    times to a day, lengths to 4 %; then the high 16 bits of `tie`."""
    dump, time, length = (np.uint64(TOP) - labels[:, column] for column in range(3))
    days = np.minimum(time // np.uint64(86400), (1 << 18) - 1)
    size = (np.log2(np.maximum(length, 1).astype(np.float64)) * 16).astype(np.uint64)
    newest = np.minimum(dump, (1 << 20) - 1) << np.uint64(44)
    worth = newest | days << np.uint64(26) | np.minimum(size, 1023) << np.uint64(16)
    return ~worth & np.uint64(TOP ^ 0xFFFF) | tie >> np.uint64(48)


def order(keys: Sequence[np.ndarray]) -> np.ndarray:
    """The permutation that sorts by the first key, then the second, ..."""
    return np.lexsort(tuple(reversed(keys)))


def run_starts(*sorted_keys: np.ndarray) -> np.ndarray:
    """[n] bool: the row differs from the one before it in some key."""
    first = np.ones(len(sorted_keys[0]), bool)
    if len(first):
        first[1:] = False
        for key in sorted_keys:
            first[1:] |= key[1:] != key[:-1]
    return first
