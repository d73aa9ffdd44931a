"""Classifiers trained on real text: they learn, resume, report curves, and score a corpus alike."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from data_beam.scoring import handlers, labelled, score
from data_beam.scoring.curves import CutoffRule
from internlm2_jax import files
from internlm2_jax.data.tokenizer import Tokenizer, train_tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.models.config import preset
from internlm2_jax.stages.classifier import (
    ClassifierTraining,
    FastTextTraining,
    classifier,
    fasttext_classifier,
)
from internlm2_jax.stages.labelled import labelled_harm
from internlm2_jax.train.checkpoint import load_model

ROOT = Path(__file__).parents[2]
stage = sys.modules[classifier.__module__]  # the package has a function of this name
TRAINING = ClassifierTraining(
    steps=60, row_length=48, batch_size=16, learning_rate=5e-3, warmup=10, checkpoint_every=20
)
CUTOFF = CutoffRule(precision=0.9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A labelled file of this project's sources (0) and of its documentation strings (1)."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = random.Random(0)
    rows = []
    for path in sorted((ROOT / "internlm2_jax").rglob("*.py")):
        parts = path.read_text().split('"""')
        for label, texts in ((1, parts[1::2]), (0, parts[2::2])):
            for text in texts:
                start = rng.randrange(max(1, len(text) - 150))
                piece = text[start : start + 150]
                if len(piece) > 40:
                    rows.append({"text": piece, "label": label, "weight": rng.choice([1, 2])})
    files.write_jsonl(folder / "labelled" / "labelled.jsonl", rows)
    plain = [{k: v for k, v in row.items() if k != "weight"} for row in rows]
    files.write_jsonl(folder / "plain.jsonl", plain)
    path = folder / "tokenizer" / "tokenizer.model"
    train_tokenizer([row["text"] for row in rows], path, vocab_size=512)
    return folder


def run(folders: Path, target: Path, training=TRAINING, **more):
    inputs = {"model": preset("tiny"), "labelled": folders / "labelled", **more}
    classifier(
        target,
        tokenizer=folders / "tokenizer",
        training=training,
        cutoff=CUTOFF,
        held_out=0.2,
        **inputs,
    )
    return target


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory) -> Path:
    return run(folders, tmp_path_factory.mktemp("run") / "classifier")


def test_it_learns_and_says_how_well(trained):
    result = files.read_json(trained / "result.json")
    assert result["test"]["auc"] > 0.9
    assert result["cutoff"]["validation"]["precision"] >= 0.9
    assert result["cutoff"]["test"]["precision"] > 0.75
    assert result["test"]["calibration_error"] < 0.2
    curve = result["test"]["curve"]
    assert curve["recall"] == sorted(curve["recall"]) and curve["recall"][-1] == 1
    sizes = result["texts"]
    assert sizes["train"] > 2 * sizes["test"] > 50
    rows = files.read_jsonl(trained / "metrics.jsonl")
    assert rows[-1]["split"] == "validation" and rows[-1]["auc"] > 0.9


def test_what_scores_a_corpus_gives_the_same_numbers(trained, folders):
    """The applied classifier, windows of one row included, against the model's own logits."""
    described = files.read_json(trained / "classifier.json")
    texts = [row["text"] for row in files.read_jsonl(folders / "plain.jsonl")[:20]]
    model = handlers.load_classifier(trained, 1024, 64)
    scores = model.score(texts)
    network, params = load_model(trained)
    at_every_place = jax.jit(network.scores)
    vocabulary = Tokenizer.load(trained / "tokenizer.model")
    for text, found in zip(texts, scores, strict=True):
        ids = vocabulary.encode(text)
        if len(ids) >= TRAINING.row_length:
            assert found["windows"] > 1
            continue
        row = np.zeros((1, 2 * TRAINING.row_length), np.int32)
        row[0, : len(ids) + 1] = [vocabulary.bos_id, *ids]
        logit = float(np.mean(at_every_place(params, row)[0, : len(ids) + 1]))
        calibration = described["calibration"]
        logit = logit / calibration["temperature"] + calibration["bias"]
        assert found["score"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
        assert found["windows"] == 1


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_killed_and_continued_is_the_same(trained, folders, tmp_path, monkeypatch):
    real = stage.make_train_step

    def dies(*args):
        step, calls = real(*args), []

        def train(state, batch):
            calls.append(1)
            if len(calls) > 30:
                raise Killed
            return step(state, batch)

        return train

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stage, "make_train_step", dies)
        run(folders, tmp_path / "cut")
    assert not (tmp_path / "cut" / "classifier.json").exists()
    run(folders, tmp_path / "cut")
    for name in ("classifier.json", "result.json", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (trained / name).read_bytes()


def test_other_texts_do_not_slip_into_a_resumed_run(folders, tmp_path, monkeypatch):
    def dies(*args, **more):
        raise Killed

    monkeypatch.setattr(stage, "fit", dies)
    rows = files.read_jsonl(folders / "plain.jsonl")
    files.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(Killed):
        run(folders, tmp_path / "run", labelled=tmp_path / "rows.jsonl")
    files.write_jsonl(tmp_path / "rows.jsonl", rows[1:])
    with pytest.raises(UserError, match=r"rows\.jsonl has changed since .* was begun"):
        run(folders, tmp_path / "run", labelled=tmp_path / "rows.jsonl")


@pytest.mark.slow
def test_a_trained_trunk_is_a_start(trained, folders, tmp_path):
    """The trunk of a trained stage, with balanced batches and the last token read."""
    short = dataclasses.replace(TRAINING, steps=2, positive_share=0.9)
    target = run(
        folders, tmp_path / "next", short, model=None, base=trained, pooling="last", judge="worst"
    )
    described = files.read_json(target / "classifier.json")
    assert (described["pooling"], described["judge"]) == ("last", "worst")
    assert load_model(target)[0].cfg == load_model(trained)[0].cfg
    metrics = [r for r in files.read_jsonl(target / "metrics.jsonl") if r["split"] == "train"]
    rows = files.read_jsonl(folders / "plain.jsonl")
    share = sum(row["label"] for row in rows) / len(rows)
    assert share < 0.6 < 0.75 < metrics[-1]["positives"]


def test_preference_pairs_become_a_labelled_file(shared, tmp_path):
    labelled_harm(tmp_path, pairs=str(shared / "data/hh_rlhf/harmless_base.jsonl"))
    rows = labelled.read(tmp_path / "labelled.jsonl")
    parts = labelled.split(rows, 0.1, "pairs")
    prompts = [{row.group for row in part} for part in parts]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    assert files.read_json(tmp_path / "result.json")["texts"] == len(rows) > 2500


@pytest.mark.slow
def test_the_experiment_runs_and_its_classifiers_apply(tmp_path):
    from internlm2_jax import config

    experiment = config.load(ROOT / "experiments/data/classifier.py", function="tiny")
    config.build(experiment).run(tmp_path, say=lambda line: None)
    for name in ("fasttext", "classifier"):
        manifest = score.Classifier(name, str(tmp_path / name)).run(tmp_path / "corpus")
        assert manifest["records"] > 50 and manifest["failed"] == 0


def test_contradictory_settings(folders, tmp_path):
    with pytest.raises(UserError, match="either a model size or a base"):
        run(folders, tmp_path / "x", model=None)
    bad = dataclasses.replace(TRAINING, positive_share=1.5)
    with pytest.raises(UserError, match="positive_share is"):
        run(folders, tmp_path / "y", bad)


def test_fasttext_takes_the_same_file_and_leaves_the_same_form(folders, trained, tmp_path):
    pytest.importorskip("fasttext")
    target = tmp_path / "fasttext"
    training = FastTextTraining(epochs=10, dim=8, buckets=2000, min_count=1)
    fasttext_classifier(
        target, labelled=folders / "plain.jsonl", training=training, cutoff=CUTOFF, held_out=0.2
    )
    result = files.read_json(target / "result.json")
    assert result["test"]["auc"] > 0.8
    decoder = files.read_json(trained / "result.json")
    assert result["test"].keys() == decoder["test"].keys()
    assert result["texts"] == decoder["texts"]  # the same split
    (found,) = handlers.load_classifier(target, 1024, 64).score(["def f(x): return x + 1"])
    assert 0 <= found["score"] <= 1 and found["windows"] == 1
