"""The cheap classifier: fastText (Joulin et al. 2016), a bag of words and word pairs.

Seconds to train and some ten thousand documents a second on one core, against a decoder's hundreds;
it reads no further than its n-grams. Same labelled file, same split, same curves and cut-off as the
decoder's, so that the two can be compared and exchanged. One thread and a seed: the same rows give
the same model, byte for byte.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_beam.io import storage
from data_beam.scoring.curves import Calibration
from data_beam.scoring.labelled import Labelled
from internlm2_jax import files
from internlm2_jax.errors import UserError

MODEL = "model.bin"
# Ideographs and kana stand alone, as in kernels.tokens, and so do punctuation marks.
_ALONE = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\w\s])")
_SURE = 1e-7  # fastText's probabilities are float32: the logit of 0 and 1 must stay finite


@dataclasses.dataclass(frozen=True)
class FastTextTraining:
    """Sizes of the model and how long it is trained.

    `word_ngrams`: longest run of words hashed into one of `buckets`; `min_letters`, `max_letters`:
    parts of words, none by default (two to four letters see damaged words). `window` is how many
    words are read at once: training reads the first window of a text, scoring all of them.
    """

    epochs: int = 10
    dim: int = 32
    learning_rate: float = 0.5
    word_ngrams: int = 2
    min_letters: int = 0
    max_letters: int = 0
    min_count: int = 2
    buckets: int = 200_000
    window: int = 400
    seed: int = 0


def words(text: str) -> list[str]:
    """Lower-case words and marks. A text cannot smuggle a label in: labels are written with an
    underscore at each end, which no word here keeps."""
    return [w.strip("_") or "_" for w in _ALONE.sub(r" \1 ", text.lower()).split()]


def _library() -> Any:
    try:
        import fasttext
    except ImportError as error:
        raise UserError(
            "fastText is not installed; pip install 'internlm2-jax[data]', or use the decoder"
        ) from error
    if not hasattr(fasttext, "train_supervised"):
        raise UserError(
            "the installed fasttext module only predicts (the package fasttext-predict replaced "
            "it); pip install --force-reinstall fasttext-community"
        )
    return fasttext


def train(rows: Sequence[Labelled], path: str | os.PathLike, training: FastTextTraining) -> str:
    """Trains on `rows` and writes the model to `path`, whole or not at all; returns its digest."""
    fasttext = _library()
    if any(row.weight != 1 or row.label not in (0, 1) for row in rows):
        raise UserError(
            "fastText takes labels 0 and 1 without weights; leave weights and soft labels to the "
            "decoder, or round them in the labelled file"
        )
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "lines.txt")
        with open(lines, "w", encoding="utf-8", errors="replace") as handle:
            for row in rows:
                handle.write(f"__label__{row.label:.0f} {' '.join(words(row.text)[: training.window])}\n")  # noqa: E501  # fmt: skip
        try:
            model = fasttext.train_supervised(
                str(lines),
                epoch=training.epochs,
                dim=training.dim,
                lr=training.learning_rate,
                wordNgrams=training.word_ngrams,
                minn=training.min_letters,
                maxn=training.max_letters,
                minCount=training.min_count,
                bucket=training.buckets,
                seed=training.seed,
                thread=1,
                verbose=0,
            )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"fastText could not be trained ({reason}); change its settings"
            ) from error
        with files.whole_file(path) as temporary:
            model.save_model(os.fspath(temporary))
    return storage.digest(path)


class FastTextClassifier:
    """A trained model in memory. `score` reads long texts in windows.

    `digest` is that of the whole file (`storage.digest`): fastText believes whatever a damaged one
    says of its size, and takes all of the memory.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        digest: str,
        window: int,
        calibration: Calibration | None = None,
        max_windows: int = 64,
    ):
        fasttext = _library()
        if not os.path.isfile(path) or storage.digest(path) != digest:
            raise UserError(f"{path} is not the model that was trained; train it again")
        self._model = fasttext.load_model(os.fspath(path))
        self._window, self._most = window, max_windows
        self._calibration = calibration or Calibration()

    def logits(self, lines: Sequence[str]) -> np.ndarray:
        """Uncalibrated logit of label 1, for lines of words."""
        if not lines:
            return np.zeros(0)
        found = self._model.predict(list(lines), k=-1)
        ones = [float(p[labels.index("__label__1")]) for labels, p in zip(*found, strict=True)]
        clipped = np.clip(np.array(ones, np.float64), _SURE, 1 - _SURE)
        return np.log(clipped) - np.log1p(-clipped)

    def first_logits(self, texts: Sequence[str]) -> np.ndarray:
        """The logits of the texts' first windows: what training saw."""
        return self.logits([" ".join(words(text)[: self._window]) for text in texts])

    def score(self, texts: Sequence[str]) -> list[dict[str, float | int]]:
        """{"score": mean, "max_score", "windows"} over the windows of each text."""
        lines: list[str] = []
        ends = []
        for text in texts:
            lines += [" ".join(window) for window in self._windows(words(text))]
            ends.append(len(lines))
        probabilities = self._calibration.probability(self.logits(lines))
        return [summary(probabilities[s:e]) for s, e in zip([0, *ends], ends, strict=False)]

    def _windows(self, found: list[str]) -> list[list[str]]:
        size = self._window
        if len(found) <= size:
            return [found]
        starts = [*range(0, len(found) - size, size), len(found) - size]
        if len(starts) > self._most:
            last = max(self._most - 1, 1)
            starts = [starts[round(i * (len(starts) - 1) / last)] for i in range(self._most)]
        return [found[start : start + size] for start in starts]


def summary(probabilities: np.ndarray) -> dict[str, float | int]:
    """What is kept of the windows of one document."""
    return {
        "score": math.fsum(probabilities) / len(probabilities),
        "max_score": float(np.max(probabilities)),
        "windows": len(probabilities),
    }
