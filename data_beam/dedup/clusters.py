"""The second half of the search: components, their survivors, and the verdicts of each shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from data_beam import progress, tables
from data_beam.dedup import blobs, components
from data_beam.dedup.equal import COPIES, COPY
from data_beam.dedup.local import Local, Shards, row_of, shard_of
from data_beam.dedup.verify import SIMILARITIES, SIMILARITY, strongest
from data_beam.io import storage
from data_beam.kernels.labels import order, run_starts, to_ids
from data_beam.runners import beam
from data_beam.stage import Output
from internlm2_jax.errors import UserError

SCHEMA = pa.schema(
    [("exact_of", pa.string()), ("near_of", pa.string()), ("similarity", pa.float32()),
     ("cluster_size", pa.int32())]
)  # fmt: skip
UNCONVERGED = "unconverged.json"
_TALLIES = "tallies.json"
VERDICTS = b"v"  # notes for a shard's writer, beside COPIES and SIMILARITIES
_BELONGS = np.dtype(
    [("centre", "<u8"), ("ref", "<u8"), ("digest", "<u8"), ("copies", "<u4"), ("label", "<u8", 5)]
)
_VERDICT = np.dtype([("row", "<u4"), ("size", "<u4"), ("survivor", "<u8", 2)])


@dataclasses.dataclass(frozen=True)
class Plan:
    """`saved` is the folder for what a further attempt starts from, should the rounds be too few;
    `counts` the file for the totals."""

    shards: Shards
    target: Output
    saved: str
    counts: str
    partitions: int
    rounds: int
    max_cluster: int


def conclude(pipeline: beam.Pipeline, edges: Any, notes: Any, tallies: Any, plan: Plan) -> None:
    """Adds everything after the edges to the pipeline."""
    blob = blobs.TYPE
    stars = edges | "Components" >> components.ConnectedComponents(plan.rounds, plan.partitions)
    unconverged = beam.pvalue.AsIter(stars.unconverged)
    survivors = (
        stars.edges
        | "Members" >> beam.ParDo(_Members(plan.saved), unconverged).with_output_types(blob)
        | "ByMember" >> beam.GroupByKey()
        | "AttachLabels" >> blobs.par_do(_AttachLabels(plan.shards, plan.partitions))
        | "ByCluster" >> beam.GroupByKey()
        | "Survivors" >> blobs.par_do(_Survivors(plan.max_cluster), "notes", tally=blob)
    )
    written = (
        (notes, survivors.notes)
        | "ForWriters" >> beam.Flatten()
        | "ByShard" >> beam.GroupByKey()
        | "Write" >> beam.ParDo(_Write(plan), unconverged).with_output_types(blob)
    )
    _ = (
        (tallies, survivors.tally, written)
        | "AllTallies" >> beam.Flatten()
        | "OneTally" >> beam.GroupByKey()
        | "Totals" >> beam.ParDo(_Totals(plan), unconverged)
    )


def resume(pipeline: beam.Pipeline, saved: str, shards: int) -> tuple[Any, Any, Any]:
    """Edges, notes and tallies of an attempt whose rounds were too few."""
    names = [info.path for info in storage.list_files(saved)]
    files = [(0, path) for path in names if path.endswith(".edges")]
    edges = (
        pipeline
        | "EdgeFiles" >> beam.Create(files)
        | "SpreadEdges" >> beam.Reshuffle()
        | "ReadEdges" >> beam.Map(_read).with_output_types(blobs.TYPE)
    )
    files = [(shard, "") for shard in range(shards)]
    for path in names:
        if path.endswith(".notes"):
            files.append((int(path.rsplit("/", 1)[-1].split("-")[0]), path))
    notes = (
        pipeline
        | "NoteFiles" >> beam.Create(files)
        | "SpreadNotes" >> beam.Reshuffle()
        | "ReadNotes" >> beam.Map(_read).with_output_types(blobs.TYPE)
    )
    counted = storage.read_json(storage.join(saved, _TALLIES))
    rows = [(0, orjson.dumps(row)) for row in counted.items()]
    return edges, notes, pipeline | "Tallied" >> beam.Create(rows)


def _read(row: tuple[int, str]) -> blobs.Blob:
    key, path = row
    if not path:
        return key, b""
    with storage.open_read(path) as handle:
        return key, handle.read()


def _save(folder: str, name: str, content: bytes) -> None:
    with storage.whole(storage.join(folder, name)) as temporary:
        temporary.write_bytes(content)


class _Members(beam.DoFn):
    """(partition, edges of stars) -> (node, centre), to the shard of the node. Edges that are not
    yet stars are saved instead."""

    def __init__(self, saved: str):
        super().__init__()
        self.saved = saved

    def process(self, element, unconverged):
        partition, piece = element
        if any(unconverged):
            _save(self.saved, f"{partition:05d}.edges", piece)
            return
        table = components.members(np.frombuffer(piece, components.EDGE))
        yield from blobs.route(table, shard_of(table["node"]))


class _AttachLabels(beam.DoFn):
    """(shard, (node, centre)) -> _BELONGS, to the partition of the centre."""

    def __init__(self, shards: Shards, partitions: int):
        super().__init__()
        self.shards, self.partitions = shards, partitions

    def process(self, element):
        shard, pieces = element
        members = blobs.gather(pieces, components.EDGE)
        local, _ = self.shards.load(shard)
        index = np.searchsorted(local.rows, row_of(members["node"]))
        table = np.empty(len(members), _BELONGS)
        table["centre"], table["ref"] = members["other"], members["node"]
        table["digest"], table["label"] = local.digest[index, 0], local.labels[index]
        table["copies"] = np.bincount(local.same_words, minlength=len(local.rows))[index]
        yield from blobs.route(table, blobs.partition_of(table["centre"], self.partitions))


class _Survivors(beam.DoFn):
    """(partition, _BELONGS) -> _VERDICT, to the shards."""

    def __init__(self, max_cluster: int):
        super().__init__()
        self.max_cluster = max_cluster

    def process(self, element):
        table = blobs.gather(element[1], _BELONGS)
        table = table[order([table["centre"], *(table["label"][:, i] for i in range(5))])]
        first = run_starts(table["centre"])
        starts = np.flatnonzero(first)
        which = np.cumsum(first) - 1
        sizes = np.add.reduceat(table["copies"].astype(np.int64), starts)
        survivors = table["label"][starts][:, 3:]
        self._guard(table, which, survivors)
        result = np.empty(len(table), _VERDICT)
        result["row"], result["size"] = row_of(table["ref"]), sizes[which]
        result["survivor"] = survivors[which]
        for shard, piece in blobs.route(result, shard_of(table["ref"])):
            yield shard, VERDICTS + piece
        yield blobs.tally("largest_cluster", sizes.max())

    def _guard(self, table: np.ndarray, which: np.ndarray, survivors: np.ndarray) -> None:
        rows = order([which, table["digest"]])
        distinct = run_starts(which[rows], table["digest"][rows])
        counts = np.bincount(which[rows][distinct])
        if counts.max(initial=0) > self.max_cluster:
            # The same cluster whatever the number of partitions was, if only one is too large.
            worst = np.argmax(counts)
            id = to_ids(survivors[worst : worst + 1])[0]
            raise UserError(
                f"the near duplicates of document {id} form a cluster of {counts[worst]} different "
                f"texts, more than --max-cluster {self.max_cluster}: often boilerplate that links "
                "unrelated documents; look at some of them, then raise --threshold, or "
                "--max-cluster if they are copies"
            )


class _Write(beam.DoFn):
    """(shard, notes) -> the shard of the attribute."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan

    def process(self, element, unconverged):
        shard, pieces = element
        kinds: dict[bytes, list[bytes]] = {COPIES: [], SIMILARITIES: [], VERDICTS: []}
        for piece in pieces:
            if piece:
                kinds[piece[:1]].append(piece[1:])
        similarities = strongest(blobs.gather(kinds[SIMILARITIES], SIMILARITY))
        copies = blobs.gather(kinds[COPIES], COPY)
        if any(unconverged):
            for kind, table in ((COPIES, copies), (SIMILARITIES, similarities)):
                if len(table):
                    name = f"{shard:05d}-{kind.decode()}.notes"
                    _save(self.plan.saved, name, kind + table.tobytes())
            return
        local, _ = self.plan.shards.load(shard)
        verdicts = blobs.gather(kinds[VERDICTS], _VERDICT)
        ids = self.plan.shards.table(shard, ["id"])["id"]
        table = _table(ids, shard, local, copies, similarities, verdicts)
        if self.plan.target.sidecar(shard) is None:
            tables.write_table(self.plan.target.path(shard), table)
            self.plan.target.finish(shard, len(table))
        progress.bump()
        for column, name in (("exact_of", "exact_copies"), ("near_of", "near_copies")):
            yield 0, orjson.dumps((name, len(table) - table[column].null_count))


def _table(
    ids: pa.ChunkedArray, shard: int, local: Local, copies: np.ndarray, similarities: np.ndarray,
    verdicts: np.ndarray,
) -> pa.Table:  # fmt: skip
    """The rows of a shard, from what is known of the best of each signature in it."""
    count = len(local.rows)

    def where(rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(local.rows, rows)

    group = np.bincount(local.same_words, minlength=count)
    size, survivor = group.copy(), local.labels[:, 3:].copy()
    at = where(verdicts["row"])
    size[at], survivor[at] = verdicts["size"], verdicts["survivor"]
    similarity = np.full(count, np.nan, np.float32)
    similarity[where(row_of(similarities["ref"]))] = similarities["similarity"]
    similarity[group > 1] = 1
    best = local.same_words
    size, survivor, similarity = size[best], survivor[best], similarity[best]
    exact = local.same_text != np.arange(count)
    exact[where(copies["row"])] = True
    kept = (survivor == local.labels[:, 3:]).all(axis=1)
    names = np.array(to_ids(survivor), object)
    columns: dict[str, Any] = {}
    for name, mine in (("exact_of", ~kept & exact), ("near_of", ~kept & ~exact)):
        values = np.full(local.documents, None, object)
        values[local.rows[mine]] = names[mine]
        columns[name] = pa.array(values, pa.string())
    values = np.full(local.documents, np.nan, np.float32)
    values[local.rows] = similarity
    columns["similarity"] = pa.array(values, pa.float32(), from_pandas=True)
    sizes, absent = np.zeros(local.documents, np.int32), np.ones(local.documents, bool)
    sizes[local.rows], absent[local.rows] = size, False
    columns["cluster_size"] = pa.array(sizes, mask=absent)
    return pa.table({"id": ids, **columns}, schema=tables.with_id(SCHEMA))


class _Totals(beam.DoFn):
    """All tallies -> the file of counts; or, for a further attempt, saved with a mark."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan

    def process(self, element, unconverged):
        totals = add_up(orjson.loads(piece) for piece in element[1])
        if count := sum(unconverged):
            storage.write_json(storage.join(self.plan.saved, _TALLIES), totals)
            mark = storage.join(self.plan.saved, UNCONVERGED)
            storage.write_json(mark, {"unconverged": count})
        else:
            storage.write_json(
                self.plan.counts, {"key": self.plan.target.keys[0], "counts": totals}
            )


def add_up(tallies: Iterable[tuple[str, int]] | Iterator[Any]) -> dict[str, int]:
    """Sums by name; of a name that begins with "largest", the maximum."""
    totals: dict[str, int] = {}
    for name, value in tallies:
        known = totals.get(name, 0)
        totals[name] = max(known, value) if name.startswith("largest") else known + value
    return dict(sorted(totals.items()))
