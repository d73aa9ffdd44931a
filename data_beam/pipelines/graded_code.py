"""Scores -> the attribute "grade": cut-offs per language from the whole corpus, then high, moderate
or low for every file. Two passes over columns; no text is read.

The score is the rules', or a trained model's in the languages in which the two agree, or in which
the model agrees with people who labelled files (`grades.agreement`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from data_beam import progress, runners, tables  # runners first: it imports Beam without its noise
from data_beam.code import grades
from data_beam.io import storage
from data_beam.mix.decide import Candidates
from data_beam.scoring import score
from data_beam.stage import Output, open_documents, read_manifest
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint, read_jsonl

beam = runners.beam
NAME = "grade"
VERSION = 2
SCHEMA = pa.schema([("grade", pa.string()), ("score", pa.float32())])
CUTS = "cuts.json"
AGREEMENT = "agreement.json"
MODEL = "code_model"  # the attribute of a model's scores
# Files of a language that are looked at to see whether the model agrees: those of the least ids.
_SAMPLE = 4096
_ROW = np.dtype([("rank", "<u8"), ("rule", "<f4"), ("model", "<f4"), ("label", "<i4")])
_NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Grades:
    """`shares` of bytes: high, moderate, low. A language with less than `keep_below` of all bytes
    loses nothing to low quality.

    With `model`, the folder of a trained classifier of bad code, its score takes the place of the
    rules' where it separates good files from bad with probability `agreement`: those that people
    labelled in the file `labels`, JSON lines {"id", "label": 1 = bad}, or else those that the rules
    are surest of.
    """

    shares: tuple[float, float, float] = grades.REPORT_SHARES
    keep_below: float = 0.001
    model: str = ""
    labels: str = ""
    agreement: float = 0.8

    def __post_init__(self):
        if self.labels and not self.model:
            raise UserError("labels of code without a model to compare with; give --scorer as well")


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
    labels = read_labels(settings.labels) if settings.labels else {}
    names = ["facts", "code_quality"]
    if settings.model:
        scorer = score.Classifier(MODEL, settings.model)
        scorer.run(output, beam_options=beam_options, candidates=candidates)
        names.append(MODEL)
    fields = {
        "attribute": NAME, "version": VERSION, "shares": settings.shares,
        "keep_below": settings.keep_below, "agreement": settings.agreement,
        "labels": fingerprint(sorted(labels.items())),
    }  # fmt: skip
    upstream = {
        "documents": documents.digest, "candidates": fingerprint(candidates.settings()),
        **{name: read_manifest(tables.folder_of(output, name), "attribute")["digest"]
           for name in names},
    }  # fmt: skip
    key = fingerprint([fields, upstream])
    folder = tables.folder_of(output, NAME)
    target = Output(folder, "attribute", tables.SUFFIX, (key,) * documents.shards)
    path = storage.join(folder, CUTS)
    if not target.is_complete(fields, upstream):
        target.start()
        with progress.show("grades", 2 * documents.shards, "shard"):
            look = _Histograms(output, candidates, labels, modelled=bool(settings.model))
            _calibrate(look, settings, documents.shards, folder, beam_options)
            cuts = grades.from_json(storage.read_json(path))
            pipeline = runners.pipeline(beam_options)
            work = _Grade(look, cuts, target)
            _ = runners.spread(pipeline, target.pending()) | "Grade" >> beam.ParDo(work)
            runners.run(pipeline)
    found = {"cuts": storage.read_json(path)}
    if settings.model:
        found["agreement"] = storage.read_json(storage.join(folder, AGREEMENT))
    return target.complete(fields, upstream, **found)


def read_labels(path: str | os.PathLike) -> dict[str, int]:
    """People's labels by the id of the document: 1 = bad."""
    found = {}
    for number, row in enumerate(read_jsonl(path), 1):
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) \
                or row.get("label") not in (0, 1):  # fmt: skip
            raise UserError(f'{path}: row {number} is not {{"id": text, "label": 0 or 1}}')
        found[row["id"]] = int(row["label"])
    return found


class _Columns(NamedTuple):
    """Of the documents of a shard. `model` is how good the model thinks a file is; NaN without."""

    ids: list[str]
    languages: np.ndarray
    num_bytes: np.ndarray
    rule: np.ndarray
    model: np.ndarray

    @classmethod
    def read(cls, output: str, shard: int, modelled: bool) -> _Columns:
        facts = tables.read_attribute(output, "facts", shard, ["id", "lang", "num_bytes"])
        rule = tables.read_attribute(output, "code_quality", shard, ["rule_score"])["rule_score"]
        model = np.full(len(facts), np.nan)
        if modelled:
            bad = tables.read_attribute(output, MODEL, shard, ["score"])["score"]
            model = 1 - bad.to_numpy(zero_copy_only=False).astype(np.float64)
        return cls(
            facts["id"].to_pylist(), np.array(facts["lang"].to_pylist(), object),
            facts["num_bytes"].to_numpy(), rule.to_numpy(zero_copy_only=False), model,
        )  # fmt: skip


@dataclasses.dataclass
class _Seen:
    """Of a language: bytes by the rules' score and by the model's [BINS], and a sample of files."""

    rules: np.ndarray
    model: np.ndarray
    sample: np.ndarray  # of _ROW, the least ranks

    def to_bytes(self) -> bytes:
        return self.rules.tobytes() + self.model.tobytes() + self.sample.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> _Seen:
        end = grades.BINS * 8
        counts = np.frombuffer(data[: 2 * end], np.int64).reshape(2, grades.BINS)
        return cls(counts[0], counts[1], np.frombuffer(data[2 * end :], _ROW))

    def scored(self, lang: str) -> Iterator[grades.Scored]:
        for row in self.sample.tolist():
            _, rule, model, label = row
            yield grades.Scored(lang, rule, model, None if label == _NO_LABEL else 1 - label)


class _Histograms(beam.DoFn):
    """Shard -> (language, what was seen of it)."""

    def __init__(self, output: str, candidates: Candidates, labels: dict[str, int], modelled: bool):
        super().__init__()
        self.output, self.candidates, self.modelled = output, candidates, modelled
        self.labels = labels

    def process(self, shard):
        columns = _Columns.read(self.output, shard, self.modelled)
        taking = self.candidates(shard) & ~np.isnan(columns.rule)
        for lang in sorted(set(columns.languages[taking])):
            mine = np.flatnonzero(taking & (columns.languages == lang))
            yield lang, self._seen(columns, mine).to_bytes()
        progress.bump()

    def _seen(self, columns: _Columns, mine: np.ndarray) -> _Seen:
        num_bytes, rule, model = columns.num_bytes[mine], columns.rule[mine], columns.model[mine]
        sample = np.zeros(len(mine) if self.modelled else 0, _ROW)
        if self.modelled:
            ids = [columns.ids[n] for n in mine]
            labels = np.array([self.labels.get(id, _NO_LABEL) for id in ids], np.int32)
            # The half that is of the content; a label is worth more than any place in the sample.
            ranks = np.array([int(id[16:], 16) >> 1 for id in ids], np.uint64)
            ranks[labels == _NO_LABEL] |= np.uint64(1 << 63)
            sample["rank"], sample["label"] = ranks, labels
            sample["rule"], sample["model"] = rule, model
        rules = grades.histogram(rule, num_bytes)
        return _Seen(rules, grades.histogram(model, num_bytes), _least(sample))


def _least(sample: np.ndarray) -> np.ndarray:
    """All labelled files, and of the others those of the least ranks."""
    keys = [sample[name] for name in ("label", "model", "rule", "rank")]
    sample = sample[np.lexsort(keys)]
    return sample[: np.count_nonzero(sample["label"] != _NO_LABEL) + _SAMPLE]


def _add(pieces: Iterable[bytes]) -> bytes:
    rules, model = np.zeros(grades.BINS, np.int64), np.zeros(grades.BINS, np.int64)
    sample = np.zeros(0, _ROW)
    for piece in pieces:
        seen = _Seen.from_bytes(piece)
        rules, model = rules + seen.rules, model + seen.model
        sample = _least(np.concatenate([sample, seen.sample]))
    return _Seen(rules, model, sample).to_bytes()


class _Write(beam.DoFn):
    """What was seen of every language -> cuts.json, and where the model agrees."""

    def __init__(self, settings: Grades, folder: str):
        super().__init__()
        self.settings, self.folder = settings, folder

    def process(self, element):
        seen = {lang: _Seen.from_bytes(one) for lang, one in sorted(element[1])}
        accepted: dict[str, np.ndarray] = {}
        if self.settings.model:
            scored = (row for lang, one in seen.items() for row in one.scored(lang))
            agreed = grades.agreement(scored, self.settings.agreement)
            accepted = {lang: seen[lang].model for lang, one in agreed.items() if one.accepted}
            rows = {lang: dataclasses.asdict(one) for lang, one in agreed.items()}
            _write_json(storage.join(self.folder, AGREEMENT), rows)
        histograms = {lang: one.rules for lang, one in seen.items()}
        cuts = grades.calibrate(
            histograms, self.settings.shares, self.settings.keep_below, accepted
        )
        _write_json(storage.join(self.folder, CUTS), grades.to_json(cuts))


def _write_json(path: str, value: Any) -> None:
    with storage.whole(path) as temporary:
        temporary.write_bytes(orjson.dumps(value))


def _calibrate(
    look: _Histograms, settings: Grades, shards: int, folder: str, beam_options: Sequence[str]
) -> None:
    for name in (CUTS, AGREEMENT):  # what a corpus without any score has
        _write_json(storage.join(folder, name), {})
    pipeline = runners.pipeline(beam_options)
    keyed = beam.typehints.KV[str, bytes]
    (
        runners.spread(pipeline, range(shards))
        | "Histograms" >> beam.ParDo(look).with_output_types(keyed)
        | "AddUp" >> beam.CombinePerKey(_add)
        | "Together" >> beam.Map(lambda item: ("", item)).with_output_types(
            beam.typehints.KV[str, tuple])
        | "Gather" >> beam.GroupByKey()
        | "WriteCuts" >> beam.ParDo(_Write(settings, folder))
    )  # fmt: skip
    runners.run(pipeline)


class _Grade(beam.DoFn):
    """Shard -> its grades; beside it what the candidates among its programs amount to by grade."""

    def __init__(self, look: _Histograms, cuts: dict[str, grades.Cut], target: Output):
        super().__init__()
        self.look, self.cuts, self.target = look, cuts, target

    def process(self, shard):
        columns = _Columns.read(self.look.output, shard, self.look.modelled)
        by_model = [
            cut is not None and cut.scorer == grades.BY_MODEL
            for cut in map(self.cuts.get, columns.languages)
        ]
        given = [
            grades.grade(self.cuts, lang, float(rule), float(model))
            for lang, rule, model in zip(
                columns.languages, columns.rule, columns.model, strict=True
            )
        ]
        scores = np.where(np.array(by_model, bool), columns.model, columns.rule)
        table = pa.table(
            {"id": columns.ids, "grade": given, "score": scores.astype(np.float32)},
            schema=tables.with_id(SCHEMA),
        )
        tables.write_table(self.target.path(shard), table)
        programs = self.look.candidates(shard) & ~np.isnan(columns.rule)
        counts = {}
        for name in (grades.HIGH, grades.MODERATE, grades.LOW):
            mine = programs & (np.array(given, object) == name)
            counts[name] = {"files": int(mine.sum()), "bytes": int(columns.num_bytes[mine].sum())}
        self.target.finish(shard, len(columns.ids), grades=counts)
        progress.bump()
