"""Scores -> the attribute "grade": cut-offs per language from the whole corpus, then high, moderate
or low for every file. Two passes over columns; no text is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from data_beam import progress, runners  # runners first: it imports Beam without its noise
from data_beam.attributes import tables
from data_beam.code import grades
from data_beam.io import storage
from data_beam.mix.decide import Candidates
from data_beam.stage import Output, open_documents, read_manifest
from internlm2_jax.files import fingerprint

beam = runners.beam
NAME = "grade"
VERSION = 1
SCHEMA = pa.schema([("grade", pa.string()), ("score", pa.float32())])
CUTS = "cuts.json"


@dataclasses.dataclass(frozen=True)
class Grades:
    """`shares` of bytes: high, moderate, low. A language with less than `keep_below` of all bytes
    loses nothing to low quality."""

    shares: tuple[float, float, float] = grades.REPORT_SHARES
    keep_below: float = 0.001


def run(
    output: str | os.PathLike,
    settings: Grades,
    candidates: Candidates,
    *,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Grades the documents below `output` by the attribute "code_quality"; returns the manifest,
    which holds the cut-offs. Only `candidates` count for the cut-offs: what is dropped anyway must
    not move them."""
    output = os.fspath(output)
    documents = open_documents(output)
    fields = {"attribute": NAME, "version": VERSION, **dataclasses.asdict(settings)}
    upstream = {
        "documents": documents.digest, "candidates": fingerprint(candidates.settings()),
        **{name: read_manifest(tables.folder_of(output, name), "attribute")["digest"]
           for name in ("facts", "code_quality")},
    }  # fmt: skip
    key = fingerprint([fields, upstream])
    folder = tables.folder_of(output, NAME)
    target = Output(folder, "attribute", tables.SUFFIX, (key,) * documents.shards)
    path = storage.join(folder, CUTS)
    if not target.is_complete(fields, upstream):
        target.start()
        with progress.show("grades", 2 * documents.shards, "shard"):
            _calibrate(output, settings, candidates, documents.shards, path, beam_options)
            cuts = grades.from_json(storage.read_json(path))
            pipeline = runners.pipeline(beam_options)
            (
                pipeline
                | "Shards" >> beam.Create(target.pending())
                | "SpreadShards" >> beam.Reshuffle()
                | "Grade" >> beam.ParDo(_Grade(output, cuts, target))
            )
            runners.run(pipeline)
    return target.complete(fields, upstream, cuts=storage.read_json(path))


def _columns(output: str, shard: int) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """ids, languages, scores, bytes."""
    facts = tables.read_attribute(output, "facts", shard, ["id", "lang", "num_bytes"])
    scores = tables.read_attribute(output, "code_quality", shard, ["rule_score"])["rule_score"]
    return (
        facts["id"].to_pylist(), facts["lang"].to_pylist(),
        scores.to_numpy(zero_copy_only=False), facts["num_bytes"].to_numpy(),
    )  # fmt: skip


class _Histograms(beam.DoFn):
    """Shard -> (language, histogram of its scores by bytes)."""

    def __init__(self, output: str, candidates: Candidates):
        super().__init__()
        self.output, self.candidates = output, candidates

    def process(self, shard):
        _, languages, scores, num_bytes = _columns(self.output, shard)
        taking = self.candidates(shard)
        names = np.array(languages, object)
        for lang in sorted(set(languages)):
            mine = taking & (names == lang) & ~np.isnan(scores)
            if mine.any():
                yield lang, grades.histogram(scores[mine], num_bytes[mine]).tobytes()
        progress.bump()


def _add(histograms: Iterable[bytes]) -> bytes:
    total = np.zeros(grades.BINS, np.int64)
    for one in histograms:
        total += np.frombuffer(one, np.int64)
    return total.tobytes()


class _Write(beam.DoFn):
    """All histograms -> cuts.json."""

    def __init__(self, settings: Grades, path: str):
        super().__init__()
        self.settings, self.path = settings, path

    def process(self, element):
        counts = {lang: np.frombuffer(one, np.int64) for lang, one in sorted(element[1])}
        cuts = grades.calibrate(counts, self.settings.shares, self.settings.keep_below)
        with storage.whole(self.path) as temporary:
            temporary.write_bytes(orjson.dumps(grades.to_json(cuts)))


def _calibrate(output, settings, candidates, shards: int, path: str, beam_options) -> None:
    with storage.whole(path) as temporary:  # what a corpus without any score has
        temporary.write_bytes(b"{}")
    pipeline = runners.pipeline(beam_options)
    keyed = beam.typehints.KV[str, bytes]
    (
        pipeline
        | "Shards" >> beam.Create(range(shards))
        | "SpreadShards" >> beam.Reshuffle()
        | "Histograms" >> beam.ParDo(_Histograms(output, candidates)).with_output_types(keyed)
        | "AddUp" >> beam.CombinePerKey(_add)
        | "Together" >> beam.Map(lambda item: ("", item)).with_output_types(
            beam.typehints.KV[str, tuple])
        | "Gather" >> beam.GroupByKey()
        | "WriteCuts" >> beam.ParDo(_Write(settings, path))
    )  # fmt: skip
    runners.run(pipeline)


class _Grade(beam.DoFn):
    def __init__(self, output: str, cuts: dict[str, grades.Cut], target: Output):
        super().__init__()
        self.output, self.cuts, self.target = output, cuts, target

    def process(self, shard):
        ids, languages, scores, _ = _columns(self.output, shard)
        given = [
            grades.grade(self.cuts, lang, float(score))
            for lang, score in zip(languages, scores, strict=True)
        ]
        table = pa.table(
            {"id": ids, "grade": given, "score": scores}, schema=tables.with_id(SCHEMA)
        )
        tables.write_table(self.target.path(shard), table)
        self.target.finish(shard, len(ids))
        progress.bump()
