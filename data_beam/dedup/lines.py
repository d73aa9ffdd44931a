"""Lines (or paragraphs) that many documents share -> the attribute "repeated_lines".

Of a line that stands in at least `min_documents` documents, the one with the best label keeps it;
all others lose it. Most lines are unique, so counting comes first, with 16 bytes per distinct line
of a shard; only for the repeated ones do the shards then say who has them:

    line hashes -> counts per line -> repeated ones, to the shards that have them
                -> the best holder of each shard -> of all -> spans to remove, per shard
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_beam import progress, runners, tables  # runners first: it imports Beam without its noise
from data_beam.attributes.line_hashes import LineHashes
from data_beam.dedup import blobs
from data_beam.dedup.local import Mask, fixed, refs, row_of, shard_of
from data_beam.io import storage
from data_beam.kernels.labels import LABEL_BYTES, TOP, order, preference, run_starts
from data_beam.kernels.lines import merge
from data_beam.stage import Documents, Output, read_manifest
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

beam = runners.beam
NAME = "repeated_lines"
VERSION = 1
SCHEMA = pa.schema([("removed", pa.list_(pa.int32())), ("removed_share", pa.float32())])
_COUNT = np.dtype([("hash", "<u8"), ("shard", "<u4"), ("documents", "<u4")])
_HASH = np.dtype([("hash", "<u8")])
# Nearly the label (`labels.preference`), then the id: the smaller the better.
_HOLDER = np.dtype([("hash", "<u8"), ("worth", "<u8"), ("id", "<u8", 2), ("ref", "<u8")])
_KEEPER = np.dtype([("hash", "<u8"), ("ref", "<u8")])


@dataclasses.dataclass(frozen=True)
class RepeatedLines:
    """A line in fewer than `min_documents` documents stays everywhere, as does one narrower than
    `min_width` characters (`LineHashes`). `unit` is "line" or "paragraph". `partition_bytes` and
    `max_memory` as in `near.NearDuplicates`."""

    unit: str = "line"
    min_width: int = 24
    min_documents: int = 6
    partition_bytes: int = 32 << 20
    max_memory: int = 64 << 20

    def __post_init__(self):
        self.attribute()
        if self.min_documents < 2 or min(self.partition_bytes, self.max_memory) < 1:
            raise UserError(
                f"min_documents {self.min_documents} must be at least 2, partition_bytes "
                f"{self.partition_bytes} and max_memory {self.max_memory} at least 1"
            )

    def attribute(self) -> LineHashes:
        """What has to be computed of every document first."""
        return LineHashes(self.unit, self.min_width)


def run(
    output: str | os.PathLike,
    documents: Documents,
    settings: RepeatedLines | None = None,
    *,
    candidates: Mask | None = None,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes OUTPUT/attributes/repeated_lines and returns its manifest.

    `candidates` as in `near.run`; a document that takes no part has null columns. `removed` are
    characters of the text, flat [start, end, ...]; `removed_share` is their share.
    """
    lines = settings or RepeatedLines()
    manifest = read_manifest(tables.folder_of(output, LineHashes.name), "attribute")
    for name in ("unit", "min_width"):
        if manifest["settings"][name] != getattr(lines, name):
            raise UserError(
                f"the line hashes were made with {name} {manifest['settings'][name]}, the search "
                f"for repeated lines wants {getattr(lines, name)}; give both the same"
            )
    result_settings = {
        "attribute": NAME, "version": VERSION, "unit": lines.unit, "min_width": lines.min_width,
        "min_documents": lines.min_documents,
    }  # fmt: skip
    upstream = {
        "documents": documents.digest, LineHashes.name: manifest["digest"],
        "candidates": fingerprint(candidates.settings() if candidates else None),
    }  # fmt: skip
    key = fingerprint([result_settings, upstream])
    target = Output(
        tables.folder_of(output, NAME), "attribute", tables.SUFFIX, (key,) * documents.shards
    )
    if target.is_complete(result_settings, upstream):
        return read_manifest(target.folder, "attribute")
    target.start()
    if target.pending():
        # A line has some 80 characters; an error here only changes the size of the partitions.
        count = sum(documents.num_bytes) // 80
        partitions = blobs.partitions_for(count, _COUNT.itemsize, lines.partition_bytes)
        work = storage.join(target.folder, "work")
        storage.delete_tree(work)
        keep = blobs.keep_folder(work, count * _COUNT.itemsize, lines.max_memory, beam_options)
        pipeline = runners.pipeline(beam_options)
        reader = _Reader(os.fspath(output), candidates)
        _build(pipeline, reader, target, lines.min_documents, partitions, keep)
        with progress.show("repeated lines", len(target.pending()), "shard"):
            runners.run(pipeline)
        storage.delete_tree(work)
    return target.complete(result_settings, upstream)


def _build(
    pipeline: beam.Pipeline, reader: _Reader, target: Output, min_documents: int,
    partitions: int, keep: str | None,
) -> None:  # fmt: skip
    shards = runners.spread(pipeline, range(target.shards))
    counts = shards | "CountLines" >> blobs.par_do(
        _CountLines(reader, partitions), "counts", nothing=blobs.TYPE
    )
    numbers = counts.counts
    if keep is not None:
        numbers = numbers | "KeepCounts" >> blobs.par_do(blobs.Keep(keep))
    keepers = (
        numbers
        | "ByLine" >> beam.GroupByKey()
        | "Repeated" >> blobs.par_do(_Repeated(min_documents, keep is not None))
        | "ByShard" >> beam.GroupByKey()
        | "Holders" >> blobs.par_do(_Holders(reader, partitions))
        | "ByRepeatedLine" >> beam.GroupByKey()
        | "Keepers" >> blobs.par_do(_Keepers())
    )
    _ = (
        (keepers, counts.nothing)
        | "ForWriters" >> beam.Flatten()
        | "ByWriter" >> beam.GroupByKey()
        | "Write" >> beam.ParDo(_Write(reader, target))
    )


class Lines(NamedTuple):
    """The hashed lines of a shard: `hashes` [L], `row` [L] of their document, `spans` [L, 2]; for
    each of its documents `takes_part`, `labels` [documents, 5]."""

    hashes: np.ndarray
    row: np.ndarray
    spans: np.ndarray
    takes_part: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Reader:
    output: str
    candidates: Mask | None

    def load(self, shard: int) -> Lines:
        table = tables.read_attribute(
            self.output, LineHashes.name, shard, ["label", "hashes", "spans"]
        ).combine_chunks()
        mask = None if self.candidates is None else self.candidates(shard)
        takes_part = np.ones(len(table), bool) if mask is None else np.asarray(mask, bool)
        labels = fixed(table["label"], LABEL_BYTES).view(">u8").astype(np.uint64).reshape(-1, 5)
        counts = table["hashes"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        row = np.repeat(np.arange(len(table)), counts)
        hashes = table["hashes"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        spans = table["spans"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        here = takes_part[row]
        return Lines(hashes[here], row[here], spans.reshape(-1, 2)[here], takes_part, labels)


def _once_per_document(lines: Lines) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (hash, row), sorted."""
    rank = order((lines.hashes, lines.row))
    hashes, row = lines.hashes[rank], lines.row[rank]
    first = run_starts(hashes, row)
    return hashes[first], row[first]


class _CountLines(beam.DoFn):
    """Shard -> _COUNT of its distinct lines, to the partitions of the lines."""

    def __init__(self, reader: _Reader, partitions: int):
        super().__init__()
        self.reader, self.partitions = reader, partitions

    def process(self, shard):
        yield beam.pvalue.TaggedOutput("nothing", (shard, b""))  # so that every shard is written
        hashes, _ = _once_per_document(self.reader.load(shard))
        starts = np.flatnonzero(run_starts(hashes))
        table = np.empty(len(starts), _COUNT)
        table["hash"], table["shard"] = hashes[starts], shard
        table["documents"] = np.diff(np.append(starts, len(hashes)))
        yield from blobs.route(table, blobs.partition_of(table["hash"], self.partitions))


class _Repeated(beam.DoFn):
    """(partition, _COUNT) -> _HASH of the lines of enough documents, to the shards."""

    def __init__(self, min_documents: int, kept: bool):
        super().__init__()
        self.min_documents, self.kept = min_documents, kept

    def process(self, element):
        table = blobs.gather(element[1], _COUNT, self.kept)
        table = table[np.argsort(table["hash"])]
        starts = np.flatnonzero(run_starts(table["hash"]))
        totals = np.add.reduceat(table["documents"].astype(np.int64), starts)
        often = np.repeat(totals >= self.min_documents, np.diff(np.append(starts, len(table))))
        table = table[often]
        result = np.empty(len(table), _HASH)
        result["hash"] = table["hash"]
        yield from blobs.route(result, table["shard"])


class _Holders(beam.DoFn):
    """(shard, repeated lines) -> _HOLDER: the best document of the shard that has each."""

    def __init__(self, reader: _Reader, partitions: int):
        super().__init__()
        self.reader, self.partitions = reader, partitions

    def process(self, element):
        shard, pieces = element
        repeated = np.sort(blobs.gather(pieces, _HASH)["hash"])
        lines = self.reader.load(shard)
        hashes, row = _once_per_document(lines)
        some = np.isin(hashes, repeated, assume_unique=False)
        hashes, row = hashes[some], row[some]
        worth = preference(lines.labels, lines.labels[:, 3])[row]
        rank = order((hashes, worth, lines.labels[row, 3], lines.labels[row, 4]))
        rank = rank[run_starts(hashes[rank])]
        table = np.empty(len(rank), _HOLDER)
        table["hash"], table["worth"] = hashes[rank], worth[rank]
        table["id"], table["ref"] = lines.labels[row[rank], 3:], refs(shard, row[rank])
        yield from blobs.route(table, blobs.partition_of(table["hash"], self.partitions))


class _Keepers(beam.DoFn):
    """(partition, _HOLDER) -> _KEEPER of every repeated line, to all shards that have it."""

    def process(self, element):
        table = blobs.gather(element[1], _HOLDER)
        keys = (table["hash"], table["worth"], table["id"][:, 0], table["id"][:, 1])
        table = table[order(keys)]
        first = run_starts(table["hash"])
        result = np.empty(len(table), _KEEPER)
        result["hash"] = table["hash"]
        result["ref"] = table["ref"][np.flatnonzero(first)[np.cumsum(first) - 1]]
        yield from blobs.route(result, shard_of(table["ref"]))


class _Write(beam.DoFn):
    """(shard, _KEEPER) -> the shard of the attribute."""

    def __init__(self, reader: _Reader, target: Output):
        super().__init__()
        self.reader, self.target = reader, target

    def process(self, element):
        shard, pieces = element
        if self.target.sidecar(shard) is not None:
            return
        keepers = np.sort(blobs.gather(pieces, _KEEPER), order="hash")
        lines = self.reader.load(shard)
        ids = tables.read_attribute(self.reader.output, LineHashes.name, shard, ["id"])["id"]
        removed = removed_spans(shard, lines, keepers)
        length = (np.uint64(TOP) - lines.labels[:, 2]).astype(np.float64)
        gone = np.array([0 if s is None else int((s[1::2] - s[0::2]).sum()) for s in removed])
        share = np.where(lines.takes_part, gone / np.maximum(length, 1), np.nan)
        table = pa.table(
            {"id": ids, "removed": pa.array(removed, SCHEMA.field("removed").type),
             "removed_share": pa.array(share.astype(np.float32), from_pandas=True)},
            schema=tables.with_id(SCHEMA),
        )  # fmt: skip
        tables.write_table(self.target.path(shard), table)
        self.target.finish(shard, len(table), removed_characters=int(gone.sum()),
                           changed_documents=int((gone > 0).sum()))  # fmt: skip
        progress.bump()


def removed_spans(shard: int, lines: Lines, keepers: np.ndarray) -> list[np.ndarray | None]:
    """For each document the spans to remove; None for one that takes no part."""
    result: list[np.ndarray | None] = [
        np.zeros(0, np.int32) if takes_part else None for takes_part in lines.takes_part
    ]
    if not len(keepers):
        return result
    at = np.minimum(np.searchsorted(keepers["hash"], lines.hashes), len(keepers) - 1)
    keeper = keepers["ref"][at]
    lost = keepers["hash"][at] == lines.hashes
    lost &= (shard_of(keeper) != shard) | (row_of(keeper) != lines.row)
    rows, spans = lines.row[lost], lines.spans[lost]
    bounds = np.flatnonzero(np.append(run_starts(rows), True)) if len(rows) else np.zeros(0, int)
    for begin, end in itertools.pairwise(bounds):
        merged = merge(spans[begin:end, 0], spans[begin:end, 1])
        result[rows[begin]] = merged.astype(np.int32)
    return result
