"""The bytes of one record of tokens: many documents together, because reading one costs as much.

A record is little-endian uint32 throughout: n, then the n lengths, then the documents' tokens end
to end. One ArrayRecord read of one document takes some 700 us of CPU; records of about 64k tokens
read in batches make that vanish. Beside a shard NAME lies NAME.index.npy, int64 [records + 1, 2]:
how many documents and how many tokens stand before each record, the totals last, so that any of
them is found without reading what is before it. Both the job that writes tokens and the trainer
that reads them use this module; it needs numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WORD = np.dtype("<u4")
INDEX_SUFFIX = ".index.npy"


def pack_record(documents: Sequence[Sequence[int] | np.ndarray]) -> bytes:
    """One record of `documents`, each a sequence of token ids."""
    lengths = [len(document) for document in documents]
    words = np.empty(1 + len(lengths) + sum(lengths), WORD)
    words[0] = len(lengths)
    words[1 : 1 + len(lengths)] = lengths
    end = 1 + len(lengths)
    for document, length in zip(documents, lengths, strict=True):
        words[end : end + length] = document
        end += length
    return words.tobytes()


def record_arrays(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(lengths [n], tokens [sum of lengths]) of a record, as views; ValueError if it is damaged."""
    if len(record) % WORD.itemsize or not record:
        raise ValueError(f"{len(record)} bytes are not whole 4-byte words")
    words = np.frombuffer(record, WORD)
    count = int(words[0])
    lengths, tokens = words[1 : 1 + count], words[1 + count :]
    if len(lengths) != count or int(lengths.sum(dtype=np.int64)) != len(tokens):
        raise ValueError(f"the lengths of its {count} documents do not add up to its size")
    return lengths, tokens


def unpack_record(record: bytes) -> list[np.ndarray]:
    """The documents of a record, the inverse of `pack_record`."""
    lengths, tokens = record_arrays(record)
    ends = np.cumsum(lengths, dtype=np.int64)
    return [tokens[end - length : end] for length, end in zip(lengths, ends, strict=True)]


def index_of(counts: Sequence[tuple[int, int]]) -> np.ndarray:
    """The index of a shard whose records hold `counts` (documents, tokens)."""
    index = np.zeros((len(counts) + 1, 2), np.int64)
    np.cumsum(np.array(counts, np.int64).reshape(-1, 2), axis=0, out=index[1:])
    return index
