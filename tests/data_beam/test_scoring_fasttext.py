"""fastText: deterministic, deaf to labels inside texts, long texts in windows, real text judged."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from data_beam.scoring import curves, labelled
from data_beam.scoring.fasttext_model import FastTextClassifier, FastTextTraining, train, words
from data_beam.scoring.labelled import Labelled
from internlm2_jax.errors import UserError

pytest.importorskip("fasttext")
SMALL = FastTextTraining(epochs=8, dim=8, buckets=2000, min_count=1)


@pytest.fixture(scope="module")
def fluency(shared):
    """Plays, whole and damaged."""
    text = (shared / "data/tinyshakespeare/input.txt").read_text()
    documents = [(f"part {i}", text[i * 4000 : (i + 1) * 4000]) for i in range(250)]
    rows = labelled.fluency(documents, seed=0)
    rows = [Labelled(r["text"], r["label"], group=r["group"]) for r in rows]
    return labelled.split(rows, 0.2, "plays")


def test_damaged_writing_is_found_in_held_out_text(fluency, tmp_path):
    path = tmp_path / "model.bin"
    digest = train(fluency.train, path, FastTextTraining(epochs=20))
    model = FastTextClassifier(path, digest=digest, window=400)
    found = {}
    for name, part in (("validation", fluency.validation), ("test", fluency.test)):
        labels, weights = labelled.columns(part)
        found[name] = (labels, model.first_logits([r.text for r in part]), weights)
    calibration, report = curves.report(curves.CutoffRule(precision=0.9), *found.values())
    assert report["test"]["auc"] > 0.75  # 0.5 is chance
    probabilities = calibration.probability(found["test"][1])
    assert curves.calibration_error(found["test"][0], probabilities) < 0.12


def test_the_same_rows_give_the_same_bytes(fluency, tmp_path):
    for name in ("a", "b"):
        train(fluency.train[:200], tmp_path / name, SMALL)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    train(fluency.train[1:201], tmp_path / "c", SMALL)
    assert (tmp_path / "c").read_bytes() != (tmp_path / "a").read_bytes()


def test_words_of_any_script_and_no_smuggled_labels():
    assert words("Hello, World!") == ["hello", ",", "world", "!"]
    assert words("我们很好。ok") == ["我", "们", "很", "好", "。", "ok"]
    assert words("__label__1 snake_case __") == ["label__1", "snake_case", "_"]
    assert words("a\nb\tc\u3000d") == ["a", "b", "c", "d"]


def test_a_label_in_a_text_teaches_nothing(tmp_path):
    rows = [Labelled(f"good word{i % 7}", 0) for i in range(60)]
    rows += [Labelled(f"__label__0 awful word{i % 7}", 1) for i in range(60)]
    path = tmp_path / "model.bin"
    model = FastTextClassifier(path, digest=train(rows, path, SMALL), window=50)
    good, awful = model.score(["good word1", "awful word1"])
    assert good["score"] < 0.5 < awful["score"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.bin"
    rows = [Labelled("good fine nice", 0), Labelled("bad vile foul", 1)] * 40
    digest = train(rows, path, SMALL)
    return functools.partial(FastTextClassifier, path, digest=digest)


def test_long_texts_are_read_in_windows(tiny):
    model = tiny(window=10)
    (mixed,) = model.score(["good fine " * 50 + "vile foul bad " * 4])
    assert mixed["windows"] == 12 and mixed["max_score"] > 0.5 > mixed["score"]
    (few,) = tiny(window=10, max_windows=5).score(["good " * 500 + "foul " * 10])
    assert few["windows"] == 5 and few["max_score"] > 0.5  # the end is always among them
    assert model.score([]) == []
    (empty,) = model.score([""])
    assert empty["windows"] == 1 and 0 < empty["score"] < 1


def test_batch_mates_change_nothing(tiny):
    model = tiny(window=10)
    texts = ["good", "bad", "good bad", "", "foul " * 40]
    assert model.score(texts) == [model.score([text])[0] for text in texts]


def test_certain_scores_have_finite_logits(tiny):
    model = tiny(window=1000)
    assert np.isfinite(model.first_logits(["bad vile foul " * 300, "good fine nice " * 300])).all()


def test_what_it_cannot_do_is_told(tiny, tmp_path):
    rows = [Labelled("a", 0), Labelled("b", 1, weight=2.0)]
    with pytest.raises(UserError, match="labels 0 and 1 without weights"):
        train(rows, tmp_path / "model.bin", SMALL)
    with pytest.raises(UserError, match="could not be trained"):
        train([], tmp_path / "model.bin", SMALL)
    assert not list(tmp_path.iterdir())
    # fastText itself would take all of the memory for a file that lost its end
    (path,) = tiny.args
    damaged = tmp_path / "model.bin"
    damaged.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not the model that was trained"):
        FastTextClassifier(damaged, digest=tiny.keywords["digest"], window=10)
