"""Documents -> an attribute that a model computes: one pass through RunInference.

    read a shard -> (shard, row, id) and text -> batches -> model -> (shard, row) -> attribute shard

Documents go through the model in the worker that read them; only rows of numbers are shuffled, and
come together again by shard. Every document has a row in the end: one that the model could not
score has nulls and a reason in the column `error`, and is counted. Each shard is a unit of
resumption.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import orjson
import pyarrow as pa

from data_beam import progress, runners, tables  # runners first: it imports Beam without its noise
from data_beam.io import storage
from data_beam.mix.rules import Rule
from data_beam.schema import Document
from data_beam.scoring import artifacts, handlers
from data_beam.stage import Documents, Output, open_documents
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

if TYPE_CHECKING:
    from data_beam.scoring.handlers import ScoreHandler

beam = runners.beam
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference  # noqa: E402

MAX_FAILED_SHARE = 0.01
_ROWS_AT_ONCE = 4096
_KEYED_ROW = beam.typehints.KV[int, bytes]


class Scorer(Protocol):
    """A frozen dataclass: which model, asked what. The values depend on `settings()`, the model's
    content and the document, on nothing else."""

    version: ClassVar[int]  # raised whenever the values would change
    schema: ClassVar[pa.Schema]  # of the columns, without `id` and `error`

    @property
    def name(self) -> str:
        """Of the attribute."""
        ...

    @property
    def model(self) -> str:
        """The model's folder."""
        ...

    def settings(self) -> dict[str, Any]:
        """The fields that the values depend on, the model apart."""
        ...

    def selects(self, document: Document) -> bool:
        """Whether the model is to look at a document; the others have nulls."""
        ...

    def example(self, document: Document) -> Any:
        """What the model is given of it."""
        ...

    def handler(self) -> ScoreHandler: ...


class Candidates(Protocol):
    """Which documents are worth the model's time; `mix.decide.Candidates` is one."""

    def __call__(self, shard: int) -> np.ndarray:
        """[documents of the shard] bool."""
        ...

    def settings(self) -> Any:
        """What the answer depends on."""
        ...


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained text classifier as an attribute: "toxicity", "advertisement", "fluency" ...

    `score` is the probability of label 1 (what is to be dropped), the mean over the windows of the
    document; `max_score` is that of its worst window.

    Attributes:
        name: of the attribute.
        model: folder that stage `classifier` or `fasttext_classifier` left.
        max_windows: a longer document is sampled at even distances.
        tokens_per_batch, documents_per_call: how much goes through the model at once; no score
            depends on them.
        share_model: one copy of the model for all processes of a machine.
    """

    name: str
    model: str
    max_windows: int = 64
    tokens_per_batch: int = 8192
    documents_per_call: int = 256
    share_model: bool = False
    max_failed_share: float = MAX_FAILED_SHARE

    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [("score", pa.float32()), ("max_score", pa.float32()), ("windows", pa.int32())]
    )

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise UserError(
                f"attribute name {self.name!r} must be lower-case letters, digits and underscores"
            )

    def settings(self) -> dict[str, Any]:
        return {"max_windows": self.max_windows}

    def selects(self, document: Document) -> bool:
        return True

    def example(self, document: Document) -> str:
        return document.text

    def handler(self) -> ScoreHandler:
        load = functools.partial(
            handlers.load_classifier, self.model, self.tokens_per_batch, self.max_windows
        )
        return handlers.ScoreHandler(load, self.documents_per_call, share=self.share_model)

    def rule(self, stage: str, threshold: float | None = None) -> Rule:
        """Drops what the classifier flags: at `threshold`, or at the cut-off that its training
        chose; by the document's mean or its worst window, as it was trained for. Raises UserError
        when the training found no cut-off of the wanted precision."""
        described = handlers.describe_classifier(self.model)
        threshold = described["cutoff"]["threshold"] if threshold is None else threshold
        if threshold is None:
            raise UserError(
                f"the classifier {self.model} has no cut-off ({described['cutoff']['rule']} is out "
                "of its reach); train it better, or give a threshold yourself"
            )
        column = {"mean": "score", "worst": "max_score"}[described["judge"]]
        # Flagged is what scores at the cut-off or above; a rule keeps its maximum.
        below = float(np.nextafter(np.float32(threshold), np.float32(0)))
        return Rule(stage, self.name, f"{self.name}.{column}", maximum=below)

    def run(
        self,
        output: str | os.PathLike,
        beam_options: Sequence[str] = (),
        candidates: Candidates | None = None,
    ) -> dict[str, Any]:
        """Scores the documents below `output`; see the function `run`."""
        return run(
            output,
            self,
            candidates=candidates,
            max_failed_share=self.max_failed_share,
            beam_options=beam_options,
        )


# ---------------------------------------------------------------------------- the job


def run(
    output: str | os.PathLike,
    scorer: Scorer,
    *,
    candidates: Candidates | None = None,
    max_failed_share: float = MAX_FAILED_SHARE,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores the documents below `output` into its attribute `scorer.name`; returns the manifest.

    With `candidates` the others are not looked at (nulls): a model is too dear for documents that a
    cheap rule drops anyway. The result then depends on those rules, too.
    Raises UserError when more than `max_failed_share` of the documents could not be scored; the
    shards they are in are then made again by the next run.
    """
    documents = open_documents(output)
    settings = {
        "attribute": scorer.name,
        "version": scorer.version,
        "model": artifacts.digest(scorer.model),
        **scorer.settings(),
    }
    if candidates is not None:
        settings["candidates"] = candidates.settings()
    keys = tuple(fingerprint([settings, digest]) for digest in documents.digests)
    folder = tables.folder_of(output, scorer.name)
    target = Output(folder, "attribute", tables.SUFFIX, keys)
    upstream = {"documents": documents.digest}
    if not target.is_complete(settings, upstream):
        target.start()
        pending = target.pending()
        if pending:
            pipeline = runners.pipeline(beam_options)
            reader = _Read(documents, scorer, candidates)
            _build(pipeline, pending, reader, target)
            total = sum(documents.counts[shard] for shard in pending)
            with progress.show(scorer.name, total, "document"):
                runners.run(pipeline)
        _check(target, scorer, sum(documents.counts), max_failed_share)
    failed = sum((target.sidecar(s) or {}).get("failed", 0) for s in range(target.shards))
    return target.complete(settings, upstream, failed=failed)


def schema_of(scorer: Scorer) -> pa.Schema:
    return scorer.schema.append(pa.field("error", pa.string()))


def _build(pipeline: Any, pending: list[int], reader: _Read, target: Output) -> None:
    documents, scorer = reader.documents, reader.scorer
    shards = runners.spread(pipeline, pending)
    read = shards | "Read" >> beam.ParDo(reader).with_outputs("rows", main="examples")
    scored, lost = (
        read.examples
        | "Score" >> RunInference(KeyedModelHandler(scorer.handler())).with_exception_handling()
    )
    rows = scored | "Rows" >> beam.Map(_row).with_output_types(_KEYED_ROW)
    # What fails outside the model's own calls (which see to themselves) is a whole batch.
    lost_rows = lost.failed_inferences | "LostRows" >> beam.FlatMap(_lost_rows).with_output_types(
        _KEYED_ROW
    )
    unscored = read.rows | "Unscored" >> beam.Map(lambda row: row).with_output_types(_KEYED_ROW)
    _ = (
        (rows, lost_rows, unscored)
        | "AllRows" >> beam.Flatten()
        | "ByShard" >> beam.GroupByKey()
        | "Write" >> beam.ParDo(_Write(documents, scorer, target))
    )


class _Read(beam.DoFn):
    """Shard -> ((shard, row, id), example); on "rows" the documents that are not to be scored, and
    an empty row, so that a shard without documents is written too."""

    def __init__(self, documents: Documents, scorer: Scorer, candidates: Candidates | None):
        super().__init__()
        self.documents, self.scorer, self.candidates = documents, scorer, candidates

    def process(self, shard):
        wanted = None if self.candidates is None else self.candidates(shard)
        yield beam.pvalue.TaggedOutput("rows", (shard, b""))
        for row, document in enumerate(self.documents.read(shard)):
            if (wanted is None or wanted[row]) and self.scorer.selects(document):
                yield (shard, row, document.id), self.scorer.example(document)
            else:
                packed = orjson.dumps([row, document.id, None, None])
                yield beam.pvalue.TaggedOutput("rows", (shard, packed))


def _row(element) -> tuple[int, bytes]:
    (shard, row, identity), result = element
    if isinstance(result, handlers.Failed):
        return shard, orjson.dumps([row, identity, None, result.error])
    return shard, orjson.dumps([row, identity, result, None])


def _lost_rows(element) -> Iterator[tuple[int, bytes]]:
    batch, error = element
    reason = " ".join(str(error[1]).split())[:200]
    for (shard, row, identity), _ in batch:
        yield shard, orjson.dumps([row, identity, None, reason])


class _Write(beam.DoFn):
    """(shard, rows in any order) -> the attribute shard, in the order of its documents."""

    def __init__(self, documents: Documents, scorer: Scorer, target: Output):
        super().__init__()
        self.documents, self.schema, self.target = documents, schema_of(scorer), target

    def process(self, element):
        shard, packed = element
        rows = sorted((orjson.loads(row) for row in packed if row), key=lambda row: row[0])
        if [row[0] for row in rows] != list(range(self.documents.counts[shard])):
            raise RuntimeError(
                f"shard {shard} has {self.documents.counts[shard]} documents but rows of "
                f"{len(rows)} came back"
            )
        with storage.whole(self.target.path(shard)) as path:
            writer = tables.Writer(path, self.schema)
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                some = rows[start : start + _ROWS_AT_ONCE]
                writer.write([row[1] for row in some], _columns(some, self.schema))
            writer.close()
        errors = [row[3] for row in rows if row[3] is not None]
        self.target.finish(shard, len(rows), failed=len(errors), errors=sorted(set(errors))[:5])
        progress.bump(len(rows))


def _columns(rows: Iterable[list], schema: pa.Schema) -> dict[str, Sequence[Any]]:
    columns: dict[str, list[Any]] = {field.name: [] for field in schema}
    for _, _, values, error in rows:
        for name, column in columns.items():
            column.append(error if name == "error" else values and values[name])
    return dict(columns)


def _check(target: Output, scorer: Scorer, total: int, limit: float) -> None:
    """Too many failures are a UserError; their shards count as not made."""
    found = {shard: target.sidecar(shard) or {} for shard in range(target.shards)}
    failed = sum(row.get("failed", 0) for row in found.values())
    if failed <= limit * total:
        return
    errors = sorted({error for row in found.values() for error in row.get("errors", ())})
    for shard, row in found.items():
        if row.get("failed"):
            storage.delete(target.path(shard) + ".json")
    raise UserError(
        f"{scorer.name}: {failed:,} of {total:,} documents could not be scored ({errors[0]}), more "
        f"than the allowed share {limit:g}; mend the model or raise max_failed_share"
    )
