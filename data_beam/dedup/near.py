"""Exact and near duplicates -> the attribute "duplicates": who is a copy, and of whom.

One Beam job over the fingerprint shards; texts are read only for `verify="exact"`. Per document
that takes part about 0.7 kB is shuffled (16 bands x 40 bytes, and 81 for the comparison of texts):

    fingerprints -> equal texts, equal signatures ------------------ edges -+-> components
                 -> bands -> buckets -> pairs -> verified pairs ---- edges -+        |
    duplicates <- verdicts per shard <- survivor of each component <- labels <-------+

The survivor of a cluster is its document with the best label (`kernels.labels`). The result depends
on the set of documents and the settings, not on shards, partitions, order, bundles or workers.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from data_beam import progress, runners, tables  # runners first: it imports Beam without its noise
from data_beam.attributes.base import settings_of
from data_beam.attributes.fingerprints import Fingerprints
from data_beam.dedup import blobs, buckets, clusters, components, equal, verify
from data_beam.dedup.local import Mask, Shards
from data_beam.io import storage
from data_beam.stage import Documents, Output, read_manifest
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

beam = runners.beam
NAME = "duplicates"
VERSION = 1
_COUNTS = "counts.json"
_WORK = "work"
# Edges that one worker holds easily; above, components take shuffles.
_LOCAL_DOCUMENTS = 3_000_000


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """Settings of the search for duplicates.

    `threshold` is the Jaccard similarity of word `ngram`s from which two documents count as copies,
    estimated from `num_perm` hashes (`verify` "signature"), measured on the texts of the candidates
    ("exact"), or not checked at all ("none"). Buckets of more than `max_bucket` signatures are
    divided further; a cluster of more than `max_cluster` distinct signatures fails the job.
    `components` "stars" takes `rounds` rounds of two shuffles, and as many more as it needs,
    "local" one worker; "auto" decides by the number of documents. A partition of a shuffle holds
    about `partition_bytes`. More than `max_memory` bytes of fingerprints are shuffled through files
    where the runner is the one in this process, which would keep them in memory.
    """

    ngram: int = 5
    num_perm: int = 128
    bands: int = 16
    rows: int = 8
    threshold: float = 0.7
    verify: str = "signature"
    max_bucket: int = 2000
    max_cluster: int = 100_000
    components: str = "auto"
    rounds: int = 5
    partition_bytes: int = 32 << 20
    max_memory: int = 64 << 20

    def __post_init__(self):
        if min(self.ngram, self.num_perm, self.bands, self.rows) < 1:
            raise UserError("ngram, num_perm, bands and rows must be at least 1")
        if self.bands * self.rows > self.num_perm:
            raise UserError(
                f"bands x rows = {self.bands} x {self.rows} needs {self.bands * self.rows} hashes "
                f"but num_perm is {self.num_perm}; raise num_perm or lower bands or rows"
            )
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold {self.threshold} is not in (0, 1]; the report uses 0.7")
        for name, known in (("verify", ("signature", "exact", "none")),
                            ("components", ("auto", "stars", "local"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown; choose {', '.join(known)}"
                )
        least = min(self.max_cluster, self.rounds, self.partition_bytes, self.max_memory)
        if self.max_bucket < 2 or least < 1:
            raise UserError(
                "max_bucket must be at least 2; max_cluster, rounds, partition_bytes and "
                "max_memory at least 1"
            )

    def possible(self) -> float:
        """Estimates below this are four standard errors from a pair at the threshold."""
        error = math.sqrt(self.threshold * (1 - self.threshold) / self.num_perm)
        return max(self.threshold - 4 * error, 0.0)

    def result_settings(self) -> dict[str, Any]:
        """What the verdicts depend on: not how the work is divided."""
        how = ("components", "rounds", "partition_bytes", "max_memory")
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in how}
        return {"attribute": NAME, "version": VERSION, **fields}


def run(
    output: str | os.PathLike,
    documents: Documents,
    settings: NearDuplicates | None = None,
    *,
    candidates: Mask | None = None,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes OUTPUT/attributes/duplicates and returns its manifest.

    `candidates(shard)` says which documents take part (None = all): the others neither survive for
    a copy nor remove one. Its `settings()` go into the resume key.
    Columns: `exact_of` (a better document has the same text but for white space) or `near_of` names
    the survivor of the cluster, for a copy; `similarity` is the highest verified one (1 for equal
    signatures, null where nothing was found); `cluster_size` counts the documents of the cluster,
    null for a document that takes no part.
    """
    near = settings or NearDuplicates()
    manifest = read_manifest(tables.folder_of(output, Fingerprints.name), "attribute")
    prints = _fingerprints_of(manifest["settings"], near)
    result_settings = {**near.result_settings(), "fingerprints": settings_of(prints)}
    upstream = {
        "documents": documents.digest, Fingerprints.name: manifest["digest"],
        "candidates": fingerprint(candidates.settings() if candidates else None),
    }  # fmt: skip
    key = fingerprint([result_settings, upstream])
    target = Output(
        tables.folder_of(output, NAME), "attribute", tables.SUFFIX, (key,) * documents.shards
    )
    if target.is_complete(result_settings, upstream):
        return read_manifest(target.folder, "attribute")
    target.start()
    if _counts(target) is None or target.pending():
        shards = Shards(os.fspath(output), Fingerprints.name, near.num_perm, candidates)
        size = sum(documents.counts) * (near.bands * buckets.MEMBER.itemsize + equal.TEXT.itemsize)
        work = storage.join(target.folder, _WORK)
        keep = blobs.keep_folder(work, size, near.max_memory, beam_options)
        job = _Job(shards, documents, prints, near, target, keep)
        with progress.show("duplicates", documents.shards, "shard"):
            _run_to_convergence(job, beam_options)
    storage.delete_tree(storage.join(target.folder, _WORK))
    return target.complete(result_settings, upstream, **_counts(target) or {})


def _fingerprints_of(made: dict[str, Any], near: NearDuplicates) -> Fingerprints:
    fields = {field.name: made[field.name] for field in dataclasses.fields(Fingerprints)}
    for name in ("ngram", "num_perm"):
        if fields[name] != getattr(near, name):
            raise UserError(
                f"the fingerprints were made with {name} {fields[name]}, the search for duplicates "
                f"wants {getattr(near, name)}; give both the same"
            )
    return Fingerprints(**fields)


def _counts(target: Output) -> dict[str, int] | None:
    """What the finished job counted."""
    path = storage.join(target.folder, _COUNTS)
    if not storage.exists(path):
        return None
    row = storage.read_json(path)
    return row["counts"] if row.get("key") == target.keys[0] else None


@dataclasses.dataclass(frozen=True)
class _Job:
    shards: Shards
    documents: Documents
    fingerprints: Fingerprints
    near: NearDuplicates
    target: Output
    keep: str | None  # folder for what the runner would hold in memory

    @property
    def total(self) -> int:
        return sum(self.documents.counts)

    def partitions(self, record_bytes: int, per_document: int = 1) -> int:
        return blobs.partitions_for(
            self.total * per_document, record_bytes, self.near.partition_bytes
        )

    @property
    def edge_partitions(self) -> int:
        return self.partitions(2 * components.EDGE.itemsize)

    @property
    def rounds(self) -> int:
        """Of shuffles for components; 0 = in one worker."""
        local = self.near.components == "local" or (
            self.near.components == "auto" and self.total <= _LOCAL_DOCUMENTS
        )
        return 0 if local else self.near.rounds


def _run_to_convergence(job: _Job, beam_options: Sequence[str]) -> None:
    """The job; and, as long as its rounds were too few, more of them from the edges it saved."""
    work = storage.join(job.target.folder, _WORK)
    storage.delete_tree(work)
    attempt = 0
    while True:
        saved = storage.join(work, f"{attempt:03d}")
        pipeline = runners.pipeline(beam_options)
        if not attempt:
            edges, notes, tallies = _search(pipeline, job)
        else:
            edges, notes, tallies = clusters.resume(
                pipeline, storage.join(work, f"{attempt - 1:03d}"), job.documents.shards
            )
        clusters.conclude(
            pipeline, edges, notes, tallies,
            clusters.Plan(job.shards, job.target, saved, storage.join(job.target.folder, _COUNTS),
                          job.edge_partitions, job.rounds, job.near.max_cluster),
        )  # fmt: skip
        runners.run(pipeline)
        if not storage.exists(storage.join(saved, clusters.UNCONVERGED)):
            return
        attempt += 1


def _search(pipeline: beam.Pipeline, job: _Job) -> tuple[Any, Any, Any]:
    """Adds the search to the pipeline: pieces of edges, notes for the shards' writers, tallies."""
    near, blob = job.near, blobs.TYPE
    emit = equal.Emit(
        job.shards, near.bands, near.rows, job.partitions(equal.TEXT.itemsize),
        job.partitions(buckets.MEMBER.itemsize, near.bands),
    )  # fmt: skip
    shards = runners.spread(pipeline, range(job.documents.shards))
    fingerprints = shards | "Fingerprints" >> blobs.par_do(
        emit, "members", texts=blob, notes=blob, tally=blob
    )
    texts, members, kept = fingerprints.texts, fingerprints.members, job.keep is not None
    if job.keep is not None:
        texts = texts | "KeepTexts" >> blobs.par_do(blobs.Keep(f"{job.keep}/texts"))
        members = members | "KeepMembers" >> blobs.par_do(blobs.Keep(f"{job.keep}/members"))
    compare = equal.Compare(job.edge_partitions, kept)
    same = (
        texts
        | "ByText" >> beam.GroupByKey()
        | "EqualTexts" >> blobs.par_do(compare, "edges", notes=blob)
    )
    pairs = (
        members
        | "ByBand" >> beam.GroupByKey()
        | "Candidates" >> blobs.par_do(equal.Pair(near.max_bucket, kept), "pairs", tally=blob)
    )
    found, tallies = _verified(pairs.pairs, job)
    return (
        (same.edges, found.edges) | "Edges" >> beam.Flatten(),
        (fingerprints.notes, same.notes, found.notes) | "Notes" >> beam.Flatten(),
        (fingerprints.tally, pairs.tally, *tallies) | "Tallies" >> beam.Flatten(),
    )


def _verified(pairs: Any, job: _Job) -> tuple[Any, list[Any]]:
    """Edges and notes from candidate pairs, and the tallies of the way."""
    near, partitions, blob = job.near, job.edge_partitions, blobs.TYPE
    accept = verify.Threshold(near.threshold, partitions)
    exact = near.verify == "exact"
    pairs = pairs | "ByBetter" >> beam.GroupByKey()
    if near.verify == "none":
        found = pairs | "Accept" >> blobs.par_do(
            verify.Accept(partitions), "edges", notes=blob, tally=blob
        )
        return found, [found.tally]
    attached = pairs | "AttachSignatures" >> blobs.par_do(
        verify.AttachSignatures(job.shards), "pairs", tally=blob
    )
    first = verify.Threshold(near.possible(), partitions) if exact else accept
    found = (
        attached.pairs
        | "ByOther" >> beam.GroupByKey()
        | "CompareSignatures" >> blobs.par_do(
            verify.CompareSignatures(job.shards, first, exact), "edges", notes=blob, tally=blob
        )
    )  # fmt: skip
    if not exact:
        return found, [attached.tally, found.tally]
    measured = (
        found.edges
        | "ByBetterText" >> beam.GroupByKey()
        | "AttachShingles" >> blobs.par_do(
            verify.AttachShingles(job.documents, job.fingerprints))
        | "ByOtherText" >> beam.GroupByKey()
        | "CompareShingles" >> blobs.par_do(
            verify.CompareShingles(job.documents, job.fingerprints, accept), "edges",
            notes=blob, tally=blob,
        )
    )  # fmt: skip
    return measured, [attached.tally, measured.tally]
