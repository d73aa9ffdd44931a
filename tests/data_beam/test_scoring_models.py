"""Windows and buckets, scores that depend on the text alone, handlers that survive a bad one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_corpus import (
    source_texts,
    train_vocabulary,
    untrained_classifier,
    untrained_model,
    write_documents,
)

from data_beam.io import storage
from data_beam.scoring import artifacts, handlers, models, score, windows
from data_beam.scoring.perplexity import Perplexity, Protocol
from data_beam.scoring.windows import Buckets
from internlm2_jax import files
from internlm2_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TEXTS = source_texts()
SAMPLES = ["", "x", TEXTS[0][:40], TEXTS[1][:150], TEXTS[2][:400], TEXTS[3][:3000], TEXTS[4][:900]]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return untrained_classifier(folder / "stage", train_vocabulary(folder, TEXTS))


@pytest.fixture(scope="module")
def bucketed(classifier):
    """With three buckets; its programs are compiled once for the tests that use it."""
    return models.TextClassifier(classifier, tokens_per_batch=256, buckets=(16, 32, 64))


# ------------------------------------------------------------------------ windows


def letters(texts):
    return [[ord(c) for c in text] for text in texts]


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 400), st.integers(2, 30), st.integers(1, 9))
def test_windows_cover_the_text_and_end_with_it(length, size, most):
    text = "".join(chr(97 + i % 26) for i in range(length))
    found = windows.windows(text, letters, size, most)
    assert 1 <= len(found) <= most and all(len(w) <= size for w in found)
    if length <= size:
        assert found == letters([text])
    else:
        assert all(len(window) == size for window in found)
        assert found[0] == letters([text])[0][:size]
    if size < length <= most * size:
        joined = "".join(chr(i) for window in found[:-1] for i in window)
        assert text.startswith(joined) and found[-1] == letters([text])[0][-size:]
        assert len(joined) + size >= length


def test_of_a_very_long_text_only_slices_are_tokenised():
    read = []

    def encode(texts):
        read.append(sum(map(len, texts)))
        return letters(texts)

    found = windows.windows("abcdefgh" * 200_000, encode, 100, 8)
    assert len(found) == 8 and sum(read) < 10_000


def test_buckets_have_one_shape_each():
    buckets = Buckets.up_to(256, 1024, shortest=50)
    assert buckets.lengths == (64, 128, 256)
    assert [buckets.of(n) for n in (1, 64, 65, 256)] == [64, 64, 128, 256]
    rows = [list(range(1, n + 1)) for n in (3, 200, 64, 65, 1, *range(60, 100))]
    seen = {}
    covered = []
    for chosen, tokens, lengths in buckets.batches(rows, pad=0):
        assert seen.setdefault(tokens.shape[1], tokens.shape) == tokens.shape
        for at, index in enumerate(chosen):
            assert tokens[at, : lengths[at]].tolist() == rows[index]
            assert not tokens[at, lengths[at] :].any()
        covered += chosen
    assert sorted(covered) == list(range(len(rows)))
    assert set(seen.values()) == {(16, 64), (8, 128), (4, 256)}
    with pytest.raises(UserError, match="distinct and ascending"):
        Buckets((8, 8), 64)


# ---------------------------------------------------------------------- the models


def test_batch_mates_and_padding_change_nothing(classifier, bucketed):
    model = bucketed
    alone = [model.score([text])[0] for text in SAMPLES]
    together = model.score(SAMPLES[::-1])[::-1]
    other = models.TextClassifier(classifier, tokens_per_batch=1024).score(SAMPLES)
    for rows in (together, other):
        assert [r["windows"] for r in rows] == [r["windows"] for r in alone]
        for name in ("score", "max_score"):
            np.testing.assert_allclose(
                [r[name] for r in rows], [r[name] for r in alone], atol=1e-5, rtol=0
            )
    spread = np.ptp([r["score"] for r in alone])
    assert spread > 0.01  # or equality would say nothing


def test_compilations_are_bounded_by_the_buckets(bucketed):
    model = bucketed
    rng = np.random.default_rng(0)
    for _ in range(12):
        texts = [TEXTS[3][:n] for n in rng.integers(0, 600, rng.integers(1, 20))]
        model.score(texts)
    assert model.compilations == 3


def test_long_documents_are_scored_in_windows(classifier):
    model = models.TextClassifier(classifier)
    text = TEXTS[3][:3000]
    (whole,) = model.score([text])
    assert whole["windows"] > 5 and whole["max_score"] > whole["score"] + 1e-3
    (few,) = models.TextClassifier(classifier, max_windows=4).score([text])
    assert few["windows"] == 4
    (first,) = models.TextClassifier(classifier, max_windows=1).score([text])
    assert first["score"] == first["max_score"]


def test_calibration_is_applied(classifier, tmp_path):
    (before,) = models.TextClassifier(classifier).score([SAMPLES[2]])
    described = files.read_json(classifier / "classifier.json")
    logit = (np.log(before["score"] / (1 - before["score"])) - 0.5) * 2.0
    changed = {**described, "calibration": {"temperature": 1.0, "bias": 0.0}}
    try:
        files.write_json(classifier / "classifier.json", changed)
        (after,) = models.TextClassifier(classifier).score([SAMPLES[2]])
    finally:
        files.write_json(classifier / "classifier.json", described)
    assert after["score"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)


def test_a_foreign_tokenizer_is_refused(classifier, tmp_path):
    described = files.read_json(classifier / "classifier.json")
    try:
        files.write_json(classifier / "classifier.json", {**described, "tokenizer_sha256": "0"})
        with pytest.raises(UserError, match="not the one that was trained with"):
            models.TextClassifier(classifier)
    finally:
        files.write_json(classifier / "classifier.json", described)


# ------------------------------------------------------------------------ handlers


class Picky:
    """Scores lengths; refuses any batch with a text that has the word bad in it."""

    def __init__(self):
        self.calls = 0

    def score(self, texts):
        self.calls += 1
        if any("bad" in text for text in texts):
            raise RuntimeError("cannot\nread this")
        return [{"score": len(text)} for text in texts]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["ok", "fine", "bad"]), min_size=1, max_size=40))
def test_only_the_documents_at_fault_fail(texts):
    found = handlers.score_all(Picky(), texts)
    assert found == [
        handlers.Failed("RuntimeError: cannot read this") if t == "bad" else {"score": len(t)}
        for t in texts
    ]


def test_one_bad_text_among_many_costs_a_logarithm():
    model = Picky()
    handlers.score_all(model, ["ok"] * 100 + ["bad"] + ["ok"] * 155)
    assert model.calls <= 17


def test_handlers_travel_and_keep_their_settings(classifier):
    made = score.Classifier("toxicity", str(classifier), documents_per_call=7).handler()
    copy = pickle.loads(pickle.dumps(made))
    kwargs = copy.batch_elements_kwargs()
    assert (kwargs["min_batch_size"], kwargs["max_batch_size"]) == (7, 7)
    weight = kwargs["element_size_fn"]
    for element in ("x" * 20_000, (("shard", 3), "x" * 20_000), ((0, 1), ("id", "x" * 20_000))):
        assert weight(element) == 3
    assert (weight("x"), weight("x" * 10**6)) == (1, 7)  # never more than a batch holds
    assert not copy.share_model_across_processes()
    (result,) = copy.run_inference(["text"], copy.load_model())
    assert 0 < result["score"] < 1
    shared_model = score.Classifier("toxicity", str(classifier), share_model=True).handler()
    assert shared_model.share_model_across_processes() and shared_model.model_copies() == 1


def test_neither_jax_nor_fasttext_is_imported_before_a_worker_sets_up(classifier):
    code = (
        "import sys\n"
        "from data_beam.scoring import artifacts, handlers, perplexity, score\n"
        f"score.Classifier('x', {str(classifier)!r}).handler()\n"
        f"perplexity.Perplexity({str(classifier)!r}).handler()\n"
        "bad = {'jax', 'fasttext', 'tensorflow', 'torch', 'flax'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ)


# ----------------------------------------------------------------------- artifacts


def test_the_digest_is_of_the_content_and_not_of_the_place(classifier, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(classifier, copy)
    (copy / "metrics.jsonl").write_text("{}\n")  # no part of the model
    assert artifacts.digest(copy) == artifacts.digest(classifier)
    names = artifacts.parts(copy)
    assert {"classifier.json", "model.json", "tokenizer.model"} < set(names)
    assert any(name.startswith("checkpoints/1/params/") for name in names)
    for name in ("classifier.json", "tokenizer.model"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" ")
        assert artifacts.digest(copy) != artifacts.digest(classifier)
        (copy / name).write_bytes(content)
    assert artifacts.digest(copy) == artifacts.digest(classifier)


def test_a_model_in_a_bucket_is_copied_once_loaded(tmp_path, monkeypatch):
    """The copy holds what the model needs, its run's tokenizer included, and nothing else."""
    path = train_vocabulary(tmp_path / "run/tokenizer", TEXTS)
    stage = untrained_model(tmp_path / "run/pretrain", path, "lm")
    (stage / "tokenizer.model").unlink()
    (stage / "metrics.jsonl").write_text("{}\n")
    digest = artifacts.digest(stage)
    # Beam's file systems read local paths as well, but match a folder itself: a bucket has none.
    root = str(tmp_path / "run")
    listing = [storage.FileInfo(str(p), 0, "") for p in stage.rglob("*") if p.is_file()]
    monkeypatch.setattr(storage, "list_files", lambda folder: listing)
    monkeypatch.setattr(storage, "is_remote", lambda path: str(path).startswith(root))
    assert artifacts.digest(stage) == digest
    copy = artifacts.local(stage)
    assert copy != stage and not (copy / "metrics.jsonl").exists()
    protocol = Protocol(target=16, context=32)
    model = handlers.load_spans(str(stage), protocol, 256)
    (found,) = model.score([("an id", TEXTS[3])])
    assert found["pairs"] == 4 and np.isfinite(found["gain"])


def test_the_tokenizer_of_the_run_belongs_to_the_model(tmp_path):
    path = train_vocabulary(tmp_path / "tokenizer", TEXTS)
    stage = untrained_model(tmp_path / "pretrain", path, "lm")
    own = artifacts.digest(stage)
    (stage / "tokenizer.model").unlink()
    before = artifacts.digest(stage)
    path.write_bytes(path.read_bytes() + b" ")
    assert len({own, before, artifacts.digest(stage)}) == 3


def test_folders_without_a_model_are_told(tmp_path, classifier):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        artifacts.digest(tmp_path / "empty")
    with pytest.raises(UserError, match="holds no classifier"):
        handlers.load_classifier(tmp_path / "empty", 64, 4)
    with pytest.raises(UserError, match="holds no model"):
        write_documents(tmp_path / "out", ["a text"], 1)
        score.Classifier("x", str(tmp_path / "empty")).run(tmp_path / "out")
    with pytest.raises(UserError, match="lower-case"):
        score.Classifier("No good", str(classifier))
    stage = untrained_model(tmp_path / "reward", classifier / "tokenizer.model", "scalar")
    with pytest.raises(UserError, match="give a language model"):
        Perplexity(str(stage), Protocol(target=8, context=8)).handler().load_model()
