"""Beam model handlers: how RunInference loads a model, batches documents and survives a bad one.

Nothing here imports jax or fastText: the loaders do, when a worker sets up.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from data_beam import runners  # first: it imports Beam without its noise
from data_beam.io import storage
from data_beam.scoring import artifacts
from data_beam.scoring.curves import Calibration
from data_beam.scoring.perplexity import Protocol as SpanProtocol
from internlm2_jax.errors import UserError

beam = runners.beam
from apache_beam.ml.inference import base  # noqa: E402

if base.resource is None:
    # Beam forgets this module where torch is absent, and then warns whenever a model is loaded.
    import resource

    base.resource = resource

log = logging.getLogger(__name__)
_CHARACTERS = 8192  # of a document that counts as one

Values = dict[str, Any]


class Failed(NamedTuple):
    """Stands for the values of a document that the model could not score."""

    error: str


class ScoringModel(Protocol):
    def score(self, examples: Sequence[Any]) -> list[Values]:
        """One dict of columns per example, each a function of that example alone."""
        ...


class ScoreHandler(base.ModelHandler):
    """Scores examples with the model that `load` returns.

    Args:
        load: a picklable function without arguments; called once per worker process.
        per_call: documents that go to the model together, a long one counting as several. Fixed,
            not tuned by Beam as it runs.
        share: one copy of the model for all processes of a machine, called through a proxy. For
            models that do not fit in memory several times over, or on one accelerator.

    A call that fails is divided until the documents at fault stand alone; each of these is answered
    by `Failed`, and all others by their scores.
    """

    def __init__(self, load: Callable[[], ScoringModel], per_call: int, *, share: bool = False):
        super().__init__(
            min_batch_size=per_call,
            max_batch_size=per_call,
            element_size_fn=functools.partial(_weight, per_call),
            large_model=share,
        )
        self._load = load

    def load_model(self) -> ScoringModel:
        return self._load()

    def run_inference(
        self,
        batch: Sequence[Any],
        model: ScoringModel,
        inference_args: Mapping[str, Any] | None = None,
    ) -> Iterable[Values | Failed]:
        return score_all(model, list(batch))

    def get_num_bytes(self, batch: Sequence[Any]) -> int:
        # The default pickles every document once more, to count.
        return sum(len(e if isinstance(e, str) else e[-1]) for e in batch)

    def get_metrics_namespace(self) -> str:
        return "scoring"


def _weight(most: int, element: Any) -> int:
    """How many ordinary documents an element, with its key or without, counts for."""
    while not isinstance(element, str):
        element = element[-1]
    # Beam emits an empty batch before an element above the limit.
    return min(most, 1 + len(element) // _CHARACTERS)


def score_all(model: ScoringModel, examples: list[Any]) -> list[Values | Failed]:
    """The scores of all examples, or `Failed` for those that cannot be scored even alone."""
    try:
        scores = model.score(examples)
    except Exception as error:  # whatever a model raises, the other documents get their scores
        if len(examples) > 1:
            half = len(examples) // 2
            return score_all(model, examples[:half]) + score_all(model, examples[half:])
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        log.warning("a document could not be scored: %s", reason)
        return [Failed(reason)]
    return list(scores)


# ------------------------------------------------------------------------- loaders


def load_classifier(
    folder: str | os.PathLike, tokens_per_batch: int, max_windows: int
) -> ScoringModel:
    """The classifier in `folder`, of whichever backend trained it."""
    path = artifacts.local(folder)
    described = describe_classifier(path)
    if described["backend"] == "fasttext":
        from data_beam.scoring import fasttext_model

        return fasttext_model.FastTextClassifier(
            path / fasttext_model.MODEL,
            digest=described["digest"],
            window=described["window"],
            calibration=Calibration(**described["calibration"]),
            max_windows=max_windows,
        )
    from data_beam.scoring import models

    return models.TextClassifier(path, tokens_per_batch=tokens_per_batch, max_windows=max_windows)


def load_spans(
    folder: str | os.PathLike, protocol: SpanProtocol, tokens_per_batch: int
) -> ScoringModel:
    """The language model in `folder`, asked for spans."""
    from data_beam.scoring import models

    return models.SpanModel(artifacts.local(folder), protocol, tokens_per_batch=tokens_per_batch)


def describe_classifier(folder: str | os.PathLike) -> dict[str, Any]:
    """classifier.json of a folder: backend, calibration, cut-off, how documents are judged. Raises
    UserError when there is none."""
    path = storage.join(folder, "classifier.json")
    if not storage.exists(path):
        raise UserError(
            f"{folder} holds no classifier (no classifier.json); train one with the stage "
            "`classifier` or `fasttext_classifier`"
        )
    described = storage.read_json(path)
    if not isinstance(described, dict) or described.get("backend") not in ("decoder", "fasttext"):
        raise UserError(f"{path} does not describe a classifier of this project")
    return described
