"""What one shard's worker knows: the fingerprints of the shard, equal texts and equal signatures in
it already collapsed, so that a million copies of a page leave it as one record."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from data_beam import tables
from data_beam.kernels.labels import LABEL_BYTES, order, run_starts
from data_beam.kernels.tokens import mix64

_ROW_BITS = np.uint64(32)


class Mask(Protocol):
    """Which documents of a shard take part: [documents] bool, None = all. It is pickled."""

    def __call__(self, shard: int) -> np.ndarray | None: ...

    def settings(self) -> Any:
        """What the answer depends on, in JSON types."""


def refs(shard: int, rows: np.ndarray) -> np.ndarray:
    """[n] uint64: shard and row of documents."""
    return np.uint64(shard) << _ROW_BITS | rows.astype(np.uint64)


def shard_of(ref: np.ndarray) -> np.ndarray:
    return (ref >> _ROW_BITS).astype(np.int64)


def row_of(ref: np.ndarray) -> np.ndarray:
    return (ref & np.uint64(0xFFFFFFFF)).astype(np.int64)


class Local(NamedTuple):
    """Columns over the rows of the shard that take part, `rows` (in ascending order).

    `labels` [n, 5], `text` [n, 2] and `digest` [n, 2] are uint64; `digest` stands for the
    signature, or for the text where it has no words. `signed` [n] tells these apart. `same_text`
    and `same_words` [n] name (as indices into `rows`) the best of the shard's documents with the
    same text, and with the same signature.
    """

    documents: int  # rows of the shard, with those that take no part
    rows: np.ndarray
    labels: np.ndarray
    text: np.ndarray
    digest: np.ndarray
    signed: np.ndarray
    same_text: np.ndarray
    same_words: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shards:
    """How workers read the fingerprints below `output`."""

    output: str | os.PathLike
    attribute: str
    num_perm: int
    candidates: Mask | None

    def table(self, shard: int, columns: list[str]) -> pa.Table:
        return tables.read_attribute(self.output, self.attribute, shard, columns)

    def load(self, shard: int) -> tuple[Local, np.ndarray]:
        """The shard, and its signatures [n, num_perm] uint16 (zeros where it has none)."""
        table = self.table(shard, ["label", "text_hash", "signature"]).combine_chunks()
        mask = None if self.candidates is None else self.candidates(shard)
        rows = np.arange(len(table)) if mask is None else np.flatnonzero(mask)
        if mask is not None:
            if len(mask) != len(table):
                raise ValueError(f"candidates of shard {shard}: {len(mask)} for {len(table)} rows")
            table = table.take(pa.array(rows))
        labels = fixed(table["label"], LABEL_BYTES).view(">u8").astype(np.uint64).reshape(-1, 5)
        text = fixed(table["text_hash"], 16).view("<u8").reshape(-1, 2)
        signed = table["signature"].is_valid().to_numpy()
        signatures = self._signatures(table["signature"], signed)
        return collapse(len(table) if mask is None else len(mask), rows, labels, text,
                        _digest(signatures, text, signed), signed), signatures  # fmt: skip

    def _signatures(self, column: pa.ChunkedArray, signed: np.ndarray) -> np.ndarray:
        result = np.zeros((len(column), self.num_perm), np.uint16)
        if signed.any():
            values = fixed(column.drop_null(), 2 * self.num_perm)
            result[signed] = values.view("<u2").reshape(-1, self.num_perm)
        return result

    def signatures(self, shard: int) -> np.ndarray:
        """[documents, num_perm] uint16 of all rows of a shard, zeros where there is none."""
        column = self.table(shard, ["signature"])["signature"]
        return self._signatures(column, column.is_valid().to_numpy())


def fixed(column: Any, width: int) -> np.ndarray:
    """[n * width] uint8 of a column of binary values that all have `width` bytes."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    array = column.cast(pa.binary(width))
    start = array.offset * width
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return data[start : start + len(array) * width]


@functools.lru_cache(maxsize=4)
def _factors(count: int) -> np.ndarray:
    """[2, count] odd uint64."""
    return mix64(np.arange(1, 2 * count + 1, dtype=np.uint64)).reshape(2, count) | np.uint64(1)


def _digest(signatures: np.ndarray, text: np.ndarray, signed: np.ndarray) -> np.ndarray:
    """[n, 2] uint64."""
    words = signatures if signatures.shape[1] % 4 else signatures.view("<u8")
    words = mix64(words.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    result = np.empty((len(words), 2), np.uint64)
    for half, factors in enumerate(_factors(words.shape[1])):
        result[:, half] = mix64((words * factors).sum(axis=1, dtype=np.uint64))
    result[~signed] = text[~signed]
    return result


def collapse(
    documents: int, rows: np.ndarray, labels: np.ndarray, text: np.ndarray, digest: np.ndarray,
    signed: np.ndarray,
) -> Local:  # fmt: skip
    count = len(rows)
    same_text, same_words = np.arange(count), np.arange(count)
    # Equal texts have equal signatures; most signatures are alone.
    by_digest = np.argsort(digest[:, 0], kind="stable")
    first = run_starts(digest[by_digest, 0])
    some = by_digest[~(first & np.append(first[1:], True))] if count else by_digest
    keys = [labels[some, column] for column in range(5)]
    words = [digest[some, 0], digest[some, 1]]
    for result, group in (
        (same_words, words), (same_text, [*words, text[some, 0], text[some, 1]]),
    ):  # fmt: skip
        rank = order([*group, *keys])
        first = run_starts(*(key[rank] for key in group))
        best = np.flatnonzero(first)[np.cumsum(first) - 1]
        result[some[rank]] = some[rank[best]]
    return Local(documents, rows, labels, text, digest, signed, same_text, same_words)
