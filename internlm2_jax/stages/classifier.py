"""Text classifiers for the corpus: is this text toxic, an advertisement, damaged?

InternLM2 (section 3.1.1) filters its web text by four BERT classifiers. Here the trunk is the
project's own decoder with a scalar head, trained by the one loop; `fasttext_classifier` is the same
stage with fastText in its place. Either leaves, beside the model, classifier.json: calibration,
cut-off and how to judge a long document; data_beam.scoring applies it to a corpus.

The labelled texts are split by content into three. The second part calibrates and chooses the
cut-off, the third measures what that choice does to texts that had no part in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data_beam.scoring import curves
from data_beam.scoring.curves import CutoffRule
from data_beam.scoring.fasttext_model import FastTextTraining
from internlm2_jax import files
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.losses.classification import Pooling, binary_cross_entropy, pooled_logits
from internlm2_jax.models.build import build, swap_head
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.checkpoint import load_model, save_model_json
from internlm2_jax.train.loop import fit
from internlm2_jax.train.step import init_state, make_train_step

if TYPE_CHECKING:
    from data_beam.scoring.labelled import Labelled, Splits

Judge = Literal["mean", "worst"]
LABELLED = "labelled.jsonl"
_WATCHED = 512  # held-out texts looked at while training goes on
_BEST_F1 = CutoffRule()
_FASTTEXT = FastTextTraining()


@dataclasses.dataclass(frozen=True)
class ClassifierTraining:
    """How a decoder classifier is trained.

    `row_length` is in tokens: training reads a text's beginning, scoring all of it in windows of
    that length. `positive_share` is the share of label 1 in a batch; None leaves the data's own.
    """

    steps: int
    row_length: int
    batch_size: int
    learning_rate: float
    final_ratio: float = 0.1
    warmup: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    positive_share: float | None = None
    validate_every: int = 100
    checkpoint_every: int = 100
    log_every: int = 10


def classifier(
    folder: Path,
    *,
    labelled: Path | str,
    tokenizer: Path | str,
    training: ClassifierTraining,
    model: ModelConfig | None = None,
    base: Path | str | None = None,
    pooling: Pooling = "mean",
    judge: Judge = "mean",
    cutoff: CutoffRule = _BEST_F1,
    held_out: float = 0.1,
    seed: int = 0,
) -> None:
    """Trains a decoder with a scalar head by binary cross-entropy.

    Args:
        labelled: a JSONL file (data_beam/scoring/labelled.py), or a stage's folder with one.
        tokenizer: folder with tokenizer.model.
        model: size of a model drawn at random; or `base`, a stage whose trunk is the start.
        judge: what a rule looks at in a long document: the "mean" of its windows, or its "worst".
        held_out: share of the groups of texts for validation, and again for the test.
    """
    tokenizer = Path(tokenizer)
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    parts, counts = _labelled(folder, labelled, held_out)
    if (model is None) == (base is None):
        raise UserError("classifier: give either a model size or a base to start from, not both")
    if base is not None:
        base_model, base_params = load_model(base)
        network = build(base_model.cfg, head="scalar")
        head = network.init(jax.random.key(seed))["head"]
        params = swap_head(base_params, head)
    else:
        assert model is not None
        config = dataclasses.replace(model, vocab_size=vocabulary.vocab_size)
        network = build(config, head="scalar")
        params = jax.jit(network.init)(jax.random.key(seed))
    if network.cfg.vocab_size != vocabulary.vocab_size:
        raise UserError(
            f"{base} has {network.cfg.vocab_size} pieces, {tokenizer} has {vocabulary.vocab_size}; "
            "give the tokenizer that the base was trained with"
        )

    # ------------------------------------------------------------------ data
    train_rows = Rows(parts.train, vocabulary, training.row_length)
    sources, weights = _sources(train_rows, training.positive_share)
    batches = Batches(sources, weights, batch_size=training.batch_size, seed=seed)
    validation = Rows(parts.validation, vocabulary, training.row_length)
    watched = validation.every(max(1, len(validation) // _WATCHED))

    # ----------------------------------------------------------------- model
    schedule = optimizers.warmup_cosine(
        training.learning_rate,
        training.steps,
        warmup=training.warmup,
        final_ratio=training.final_ratio,
    )
    optimizer = optimizers.adamw(
        schedule, b2=0.999, weight_decay=training.weight_decay, clip_norm=training.clip_norm
    )

    def loss_fn(params: Any, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = pooled_logits(
            network, params, batch["tokens"], batch["length"], pooling, remat="full"
        )
        return binary_cross_entropy(logits, batch["label"], batch["weight"])

    step_fn = make_train_step(loss_fn, optimizer)
    logits_fn = jax.jit(
        lambda p, tokens, lengths: pooled_logits(network, p, tokens, lengths, pooling)
    )

    def score(params: Any, rows: Rows) -> np.ndarray:
        return np.concatenate(
            [
                np.asarray(logits_fn(params, batch["tokens"], batch["length"]))[:count]
                for batch, count in rows.batches(training.batch_size)
            ]
        )

    # -------------------------------------------------------------- training
    def train(step: int, state: dict[str, Any], rows: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        state, values = step_fn(state, rows)
        return state, {**values, "learning_rate": schedule(step)}

    def validate(done: int, state: dict[str, Any]) -> dict[str, Any]:
        logits = score(state["params"], watched)
        measured, _ = binary_cross_entropy(
            *map(jnp.asarray, (logits, watched.labels, watched.weights))
        )
        labels, weights = watched.labels >= 0.5, watched.weights
        return {"loss": float(measured), "auc": curves.auc(curves.count(labels, logits, weights))}

    state = fit(
        folder,
        init_state(params, optimizer),
        train,
        steps=training.steps,
        label="classifier",
        batch=lambda step, skipped: batches(step + skipped),
        shown=("loss", "accuracy"),
        log_every=training.log_every,
        validate=validate,
        validate_every=training.validate_every,
        checkpoint_every=training.checkpoint_every,
    )

    # --------------------------------------------------------------- results
    test = Rows(parts.test, vocabulary, training.row_length)
    measured = [
        (rows.labels >= 0.5, score(state["params"], rows), rows.weights)
        for rows in (validation, test)
    ]
    save_model_json(folder, network.cfg, "scalar")
    with files.whole_file(folder / "tokenizer.model") as temporary:
        shutil.copyfile(tokenizer / "tokenizer.model", temporary)
    described = {
        "backend": "decoder",
        "pooling": pooling,
        "row_length": training.row_length,
        "tokenizer_sha256": vocabulary.sha256,
        "judge": judge,
    }
    more = {"too_long": train_rows.too_long, "parameters": network.cfg.num_params("scalar")}
    _finish(folder, described, measured, cutoff, {**counts, **more})


def fasttext_classifier(
    folder: Path,
    *,
    labelled: Path | str,
    training: FastTextTraining = _FASTTEXT,
    judge: Judge = "mean",
    cutoff: CutoffRule = _BEST_F1,
    held_out: float = 0.1,
) -> None:
    """Trains fastText on the same file, with the same split, curves and cut-off."""
    from data_beam.scoring import fasttext_model

    parts, counts = _labelled(folder, labelled, held_out)
    path = folder / fasttext_model.MODEL
    digest = fasttext_model.train(parts.train, path, training)
    trained = fasttext_model.FastTextClassifier(path, digest=digest, window=training.window)
    measured = []
    for part in (parts.validation, parts.test):
        labels, weights = _columns(part)
        measured.append((labels, trained.first_logits([row.text for row in part]), weights))
    described = {
        "backend": "fasttext",
        "window": training.window,
        "digest": digest,
        "judge": judge,
    }
    _finish(folder, described, measured, cutoff, counts)


# ------------------------------------------------------------------------------ parts


class Rows:
    """Labelled texts as padded rows; `rows[i]` -> tokens [T] int32, length, label, weight.

    A text longer than a row is cut at its end (`too_long` counts them).
    """

    def __init__(self, texts: Sequence[Labelled], vocabulary: Tokenizer, row_length: int):
        self.labels = np.array([row.label for row in texts], np.float32)
        self.weights = np.array([row.weight for row in texts], np.float32)
        self._length, self._pad = row_length, vocabulary.pad_id
        encoded = vocabulary.encode_batch([row.text for row in texts])
        self.too_long = sum(len(ids) >= row_length for ids in encoded)
        self._ids = [[vocabulary.bos_id, *ids[: row_length - 1]] for ids in encoded]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids = self._ids[index]
        tokens = np.full(self._length, self._pad, np.int32)
        tokens[: len(ids)] = ids
        return {
            "tokens": tokens,
            "length": np.asarray(len(ids), np.int32),
            "label": self.labels[index],
            "weight": self.weights[index],
        }

    def take(self, indices: np.ndarray) -> Rows:
        """Some of the rows; what they hold is shared."""
        taken = object.__new__(Rows)
        taken.labels, taken.weights = self.labels[indices], self.weights[indices]
        taken._length, taken._pad, taken.too_long = self._length, self._pad, self.too_long
        taken._ids = [self._ids[i] for i in indices]
        return taken

    def every(self, stride: int) -> Rows:
        """Each `stride`-th row of either class, so that both stay present."""
        order = np.argsort(self.labels >= 0.5, kind="stable")
        negatives = int(np.sum(self.labels < 0.5))
        return self.take(np.concatenate([order[:negatives:stride], order[negatives::stride]]))

    def batches(self, size: int) -> list[tuple[dict[str, np.ndarray], int]]:
        """(batch of `size` rows, how many of them count) over all rows in order."""
        found = []
        for start in range(0, len(self), size):
            indices = [min(i, len(self) - 1) for i in range(start, start + size)]
            rows = [self[i] for i in indices]
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            found.append((batch, min(size, len(self) - start)))
        return found


def _sources(rows: Rows, positive_share: float | None) -> tuple[dict[str, Any], dict[str, float]]:
    """What the batches are mixed from, and the shares."""
    if positive_share is None:
        return {"labelled": rows}, {"labelled": 1.0}
    if not 0 < positive_share < 1:
        raise UserError(f"positive_share is {positive_share}; it must lie between 0 and 1")
    positive = rows.labels >= 0.5
    sources = {
        "positive": rows.take(np.flatnonzero(positive)),
        "negative": rows.take(np.flatnonzero(~positive)),
    }
    return sources, {"positive": positive_share, "negative": 1 - positive_share}


def _labelled(folder: Path, labelled: Path | str, held_out: float) -> tuple[Splits, dict[str, Any]]:
    """The three parts and their sizes. A file that changed since the stage began is a UserError:
    a resumed training must not go on with other texts."""
    from data_beam.scoring import labelled as texts

    path = Path(labelled)
    path = path / LABELLED if path.is_dir() else path
    rows = texts.read(path)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    started = folder / "labelled.json"
    if started.is_file() and files.read_json(started)["digest"] != digest:
        raise UserError(
            f"{path} has changed since {folder} was begun; repeat the stage with --redo, or give "
            "another --run-dir"
        )
    files.write_json(started, {"digest": digest})
    parts = texts.split(rows, held_out, str(path))
    sizes = {name: len(part) for name, part in parts._asdict().items()}
    return parts, {"texts": sizes, "labelled": digest}


def _columns(rows: Sequence[Labelled]) -> tuple[np.ndarray, np.ndarray]:
    from data_beam.scoring import labelled as texts

    return texts.columns(rows)


def _finish(
    folder: Path,
    described: dict[str, Any],
    measured: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    cutoff: CutoffRule,
    counts: dict[str, Any],
) -> None:
    """Calibration, cut-off and curves: classifier.json for who applies it (with the curve of the
    texts that chose nothing, to choose otherwise by), result.json for who reads about it."""
    _, found = curves.report(cutoff, measured[0], measured[1])
    result = {**counts, **described, **found}
    kept = ("calibration", "cutoff")
    files.write_json(folder / "result.json", result)
    applied = {name: found[name] for name in kept} | {"curve": found["test"]["curve"]}
    files.write_json(
        folder / "classifier.json", {**described, **applied, "labelled": counts["labelled"]}
    )
