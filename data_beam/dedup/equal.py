"""The first half of the search: what a shard sends out, equal texts, and buckets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_beam.dedup import blobs, buckets, components
from data_beam.dedup.local import Local, Shards, refs, row_of, shard_of
from data_beam.dedup.verify import SIMILARITIES, SIMILARITY
from data_beam.kernels.labels import order, preference, run_starts
from data_beam.runners import beam

# The best document of a shard with its text. `node`: and of its signature too.
TEXT = np.dtype(
    [("digest", "<u8", 2), ("text", "<u8", 2), ("label", "<u8", 5), ("ref", "<u8"), ("node", "?")]
)
# A note for the shard's writer: the document in this row has the text of a better one.
COPIES, COPY = b"c", np.dtype([("row", "<u4")])
_EMITTED = 1 << 16  # documents whose band members are in memory at a time


class Emit(beam.DoFn):
    """Shard -> its documents as members of buckets; (tag "texts") TEXT."""

    def __init__(self, shards: Shards, bands: int, rows: int, text_parts: int, band_parts: int):
        super().__init__()
        self.shards, self.bands, self.rows = shards, bands, rows
        self.text_parts, self.band_parts = text_parts, band_parts

    def process(self, shard):
        local, signatures = self.shards.load(shard)
        yield blobs.tally("candidates", len(local.rows))
        yield beam.pvalue.TaggedOutput("notes", (shard, b""))  # so that every shard is written
        texts = text_records(shard, local)
        to = blobs.partition_of(texts["digest"][:, 0], self.text_parts)
        yield from blobs.tagged("texts", blobs.route(texts, to))
        nodes = np.flatnonzero((local.same_words == np.arange(len(local.rows))) & local.signed)
        for start in range(0, len(nodes), _EMITTED):
            some = nodes[start : start + _EMITTED]
            digest = local.digest[some, 0]
            members = buckets.band_members(
                signatures[some], preference(local.labels[some], digest), digest,
                refs(shard, local.rows[some]), self.bands, self.rows,
            )  # fmt: skip
            yield from blobs.route(members, blobs.partition_of(members["key"], self.band_parts))


def text_records(shard: int, local: Local) -> np.ndarray:
    """[distinct texts] TEXT."""
    best = np.flatnonzero(local.same_text == np.arange(len(local.rows)))
    table = np.empty(len(best), TEXT)
    table["digest"], table["text"] = local.digest[best], local.text[best]
    table["label"], table["ref"] = local.labels[best], refs(shard, local.rows[best])
    table["node"] = local.same_words[best] == best
    return table


def compare_texts(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges between the best documents of the shards that share a signature, each with the best of
    all; and refs of documents whose text a better document has."""
    table = table[order([table["digest"][:, 0], table["digest"][:, 1]])]
    first = run_starts(table["digest"][:, 0], table["digest"][:, 1])
    table = table[~(first & np.append(first[1:], True))] if len(table) else table
    words = [table["digest"][:, 0], table["digest"][:, 1]]
    text = [table["text"][:, 0], table["text"][:, 1]]
    label = [table["label"][:, column] for column in range(5)]
    rows = order([*words, *label])
    first = run_starts(*(key[rows] for key in words))
    best = rows[np.flatnonzero(first)[np.cumsum(first) - 1]]
    linked = table["node"][rows] & (rows != best)
    edges = components.edges(table["ref"][best[linked]], table["ref"][rows[linked]])
    rows = order([*words, *text, *label])
    again = ~run_starts(*(key[rows] for key in (*words, *text)))
    return edges, table["ref"][rows[again]]


def same_similarity(edges: np.ndarray) -> Iterator[blobs.Blob]:
    table = np.empty(2 * len(edges), SIMILARITY)
    table["ref"] = np.concatenate([edges["node"], edges["other"]])
    table["similarity"] = 1
    table = table[np.unique(table["ref"], return_index=True)[1]]
    yield from blobs.route(table, shard_of(table["ref"]))


class Compare(beam.DoFn):
    """(partition, texts) -> edges between equal signatures; notes for the shards."""

    def __init__(self, partitions: int, kept: bool):
        super().__init__()
        self.partitions, self.kept = partitions, kept

    def process(self, element):
        edges, copies = compare_texts(blobs.gather(element[1], TEXT, self.kept))
        yield from blobs.route(edges, blobs.partition_of(edges["node"], self.partitions))
        yield from blobs.tagged("notes", same_similarity(edges), SIMILARITIES)
        table = np.empty(len(copies), COPY)
        table["row"] = row_of(copies)
        yield from blobs.tagged("notes", blobs.route(table, shard_of(copies)), COPIES)


class Pair(beam.DoFn):
    """(partition, members of whole buckets) -> candidate pairs, to the shard of the better one."""

    def __init__(self, max_bucket: int, kept: bool):
        super().__init__()
        self.max_bucket, self.kept = max_bucket, kept

    def process(self, element):
        members = blobs.gather(element[1], buckets.MEMBER, self.kept)
        found = buckets.candidates(members, self.max_bucket)
        yield blobs.tally("hot_buckets", found.hot)
        yield blobs.tally("largest_bucket", found.largest)
        yield from blobs.route(found.pairs, shard_of(found.pairs["left"]))
