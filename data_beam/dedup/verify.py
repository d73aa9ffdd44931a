"""Candidate pairs -> verified edges, in two hops through the shards that hold the evidence.

Unverified, one boilerplate paragraph chains unrelated documents into a single cluster. The pair
goes to the shard of its better document, which attaches that one's signature (once per shard it is
sent to); the shard of the other compares. With `verify="exact"` the pairs that the signatures leave
possible make the same journey with the sets of n-grams, read from the texts of the candidates.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data_beam.attributes.base import Examined
from data_beam.attributes.fingerprints import Fingerprints
from data_beam.dedup import blobs, components
from data_beam.dedup.buckets import PAIR, distinct
from data_beam.dedup.local import Shards, row_of, shard_of
from data_beam.kernels import minhash
from data_beam.kernels.labels import order, run_starts
from data_beam.runners import beam
from data_beam.stage import Documents

# A note for a shard's writer: the highest similarity of a document to one it was compared with.
SIMILARITIES = b"s"
SIMILARITY = np.dtype([("ref", "<u8"), ("similarity", "<f4")])
_COMPARED = 8192  # pairs at a time
_HEAD = struct.Struct("<III")


def pack(lefts: np.ndarray, evidence: np.ndarray, lengths: np.ndarray, index: np.ndarray,
         rights: np.ndarray) -> bytes:  # fmt: skip
    """One piece: `evidence` (bytes) of the documents `lefts`, `lengths` bytes each, and pairs
    (index into lefts, ref of the other)."""
    head = _HEAD.pack(len(lefts), len(index), len(evidence))
    parts = (lefts, lengths.astype("<u4"), index.astype("<u4"), rights, evidence)
    return head + b"".join(part.tobytes() for part in parts)


def unpack(piece: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """lefts, evidence, lengths, index, rights."""
    count, pairs, size = _HEAD.unpack_from(piece)
    place = _HEAD.size
    arrays = []
    for dtype, length in (("<u8", count), ("<u4", count), ("<u4", pairs), ("<u8", pairs),
                          ("u1", size)):  # fmt: skip
        arrays.append(np.frombuffer(piece, dtype, length, place))
        place += arrays[-1].nbytes
    lefts, lengths, index, rights, evidence = arrays
    return lefts, evidence, lengths.astype(np.int64), index.astype(np.int64), rights


def send(pairs: np.ndarray, evidence: np.ndarray, begins: np.ndarray) -> Iterator[blobs.Blob]:
    """Pairs, sorted by `left`, to the shards of their `right`. `evidence[begins[i]:begins[i + 1]]`
    belongs to the i-th distinct left."""
    which = np.cumsum(run_starts(pairs["left"])) - 1
    to = shard_of(pairs["right"])
    rank = order((to, which))
    pairs, which, to = pairs[rank], which[rank], to[rank]
    # A piece ends with its shard, or when its evidence is enough for one element.
    sizes = np.diff(begins)[which] * run_starts(to, which) + 12
    for start, end in _pieces(to, sizes):
        first = run_starts(which[start:end])
        rows = which[start:end][first]
        lengths = np.diff(begins)[rows]
        chosen = np.concatenate([evidence[begins[row] : begins[row + 1]] for row in rows])
        index = np.cumsum(first) - 1
        lefts = pairs["left"][start:end][first]
        yield int(to[start]), pack(lefts, chosen, lengths, index, pairs["right"][start:end])


def _pieces(to: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of rows with one destination and not much more than one piece of evidence."""
    total = np.cumsum(sizes)
    start = 0
    while start < len(to):
        before = int(total[start - 1]) if start else 0
        enough = int(np.searchsorted(total, before + blobs.PIECE_BYTES, "right"))
        stop = min(max(enough, start + 1), int(np.searchsorted(to, to[start], "right")))
        yield start, stop
        start = stop


def strongest(table: np.ndarray) -> np.ndarray:
    """SIMILARITY records, the highest of each document."""
    table = table[order((table["ref"], -table["similarity"]))]
    return table[run_starts(table["ref"])]


@dataclasses.dataclass(frozen=True)
class Threshold:
    """`similarity` counts from `minimum` on; edges go to `partitions`."""

    minimum: float
    partitions: int

    def edges(self, pairs: np.ndarray, values: np.ndarray) -> Iterator[Any]:
        """Pieces of edges, and notes for the shards of both ends."""
        good = values >= self.minimum
        table = components.edges(pairs["left"][good], pairs["right"][good])
        yield from blobs.route(table, blobs.partition_of(table["node"], self.partitions))
        record = np.empty(2 * int(good.sum()), SIMILARITY)
        record["ref"] = np.concatenate([pairs["left"][good], pairs["right"][good]])
        record["similarity"] = np.tile(values[good], 2)
        record = strongest(record)
        to = shard_of(record["ref"])
        yield from blobs.tagged("notes", blobs.route(record, to), SIMILARITIES)


class Accept(beam.DoFn):
    """(shard, candidate pairs) -> edges, without a look."""

    def __init__(self, partitions: int):
        super().__init__()
        self.partitions = partitions

    def process(self, element):
        pairs = distinct(blobs.gather(element[1], PAIR))
        yield blobs.tally("candidate_pairs", len(pairs))
        table = components.edges(pairs["left"], pairs["right"])
        yield from blobs.route(table, blobs.partition_of(table["node"], self.partitions))


class AttachSignatures(beam.DoFn):
    """(shard, pairs whose better document lies there) -> (shard of the other, with signatures)."""

    def __init__(self, shards: Shards):
        super().__init__()
        self.shards = shards

    def process(self, element):
        shard, pieces = element
        pairs = distinct(blobs.gather(pieces, PAIR))
        yield blobs.tally("candidate_pairs", len(pairs))
        lefts = pairs["left"][run_starts(pairs["left"])]
        table = self.shards.signatures(shard)[row_of(lefts)]
        width = 2 * self.shards.num_perm
        begins = np.arange(len(lefts) + 1) * width
        yield from send(pairs, table.reshape(-1).view(np.uint8), begins)


class CompareSignatures(beam.DoFn):
    """(shard, pairs with signatures of the better document) -> edges; "possible" pairs for an exact
    comparison instead when `exact`."""

    def __init__(self, shards: Shards, threshold: Threshold, exact: bool):
        super().__init__()
        self.shards, self.threshold, self.exact = shards, threshold, exact

    def process(self, element):
        shard, pieces = element
        own = self.shards.signatures(shard)
        for piece in pieces:
            lefts, evidence, _, index, rights = unpack(piece)
            table = evidence.view("<u2").reshape(len(lefts), -1)
            rows = row_of(rights)
            values = np.empty(len(rights), np.float32)
            for start in range(0, len(rights), _COMPARED):
                part = slice(start, start + _COMPARED)
                values[part] = minhash.similarity(table[index[part]], own[rows[part]])
            pairs = np.empty(len(rights), PAIR)
            pairs["left"], pairs["right"] = lefts[index], rights
            if self.exact:
                pairs = pairs[values >= self.threshold.minimum]
                yield from blobs.route(pairs, shard_of(pairs["left"]))
            else:
                good = int((values >= self.threshold.minimum).sum())
                yield blobs.tally("verified_pairs", good)
                yield from self.threshold.edges(pairs, values)


def shingles_of(
    documents: Documents, fingerprints: Fingerprints, shard: int, rows: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, sorted distinct n-grams [S] uint32) of the documents in `rows` (ascending)."""
    wanted = iter(rows.tolist())
    following = next(wanted, None)
    for row, document in enumerate(documents.read(shard)):
        if row == following:
            words = fingerprints.words(Examined(document))
            yield row, np.unique(minhash.shingles([words], fingerprints.ngram)[0])
            following = next(wanted, None)
            if following is None:
                return


class AttachShingles(beam.DoFn):
    """As `AttachSignatures`, with the n-grams of the texts."""

    def __init__(self, documents: Documents, fingerprints: Fingerprints):
        super().__init__()
        self.documents, self.fingerprints = documents, fingerprints

    def process(self, element):
        shard, pieces = element
        pairs = distinct(blobs.gather(pieces, PAIR))
        lefts = pairs["left"][run_starts(pairs["left"])]
        found = [
            values
            for _, values in shingles_of(self.documents, self.fingerprints, shard, row_of(lefts))
        ]
        begins = np.append(0, np.cumsum([values.nbytes for values in found]))
        yield from send(pairs, np.concatenate(found).view(np.uint8), begins)


class CompareShingles(beam.DoFn):
    """As `CompareSignatures`, by exact Jaccard similarity."""

    def __init__(self, documents: Documents, fingerprints: Fingerprints, threshold: Threshold):
        super().__init__()
        self.documents, self.fingerprints, self.threshold = documents, fingerprints, threshold

    def process(self, element):
        shard, pieces = element
        pairs, sets = _by_right(pieces)
        bounds = np.searchsorted(pairs["right"], np.unique(pairs["right"]), "left")
        values = np.empty(len(pairs), np.float32)
        rows = row_of(pairs["right"][bounds])
        ends = np.append(bounds[1:], len(pairs))
        own = shingles_of(self.documents, self.fingerprints, shard, rows)
        for (_, mine), begin, end in zip(own, bounds, ends, strict=True):
            for pair in range(begin, end):
                values[pair] = minhash.jaccard(sets[int(pairs["left"][pair])], mine)
        good = int((values >= self.threshold.minimum).sum())
        yield blobs.tally("verified_pairs", good)
        yield from self.threshold.edges(pairs, values)


def _by_right(pieces: Iterable[bytes]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """All pairs, sorted by the document of this shard, and the n-grams of the others."""
    tables, sets = [], {}
    for piece in pieces:
        lefts, evidence, lengths, index, rights = unpack(piece)
        ends = np.cumsum(lengths)
        for left, start, end in zip(lefts.tolist(), ends - lengths, ends, strict=True):
            sets[left] = evidence[start:end].view("<u4")
        table = np.empty(len(rights), PAIR)
        table["left"], table["right"] = lefts[index], rights
        tables.append(table)
    pairs = np.concatenate(tables)
    return pairs[order((pairs["right"], pairs["left"]))], sets
