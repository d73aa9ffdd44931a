"""The needle stage: cells through the engine, resumed, in bounded memory."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

from internlm2_jax import files
from internlm2_jax.data.tasks import NAMES
from internlm2_jax.errors import UserError
from internlm2_jax.evals import needle as protocol
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.models.rope_scaling import DynamicNTK, PositionInterpolation, YaRN
from internlm2_jax.stages import Series
from internlm2_jax.stages import needle as stage
from internlm2_jax.stages.haystacks import haystacks
from internlm2_jax.stages.needle import stretched, summary
from internlm2_jax.train.checkpoint import Checkpoints, save_model_json

LENGTHS, DEPTHS = [128, 192], [0, 100]
SERIES = [Series("pairs", 1), Series("pairs", 2)]


@pytest.fixture(scope="module")
def run(vocabulary, tmp_path_factory):
    """A tokenizer, a corpus of hay, and a model that has learnt nothing."""
    folder = tmp_path_factory.mktemp("run")
    base = tmp_path_factory.getbasetemp()
    (folder / "tokenizer").mkdir()
    found = sorted(base.glob("vocabulary*/tokenizer.model"))[0]
    shutil.copyfile(found, folder / "tokenizer" / "tokenizer.model")
    haystacks(folder / "corpus", lengths={"recall": 60}, tokens={"recall": 600}, fillers=10)
    cfg = preset("tiny", vocab_size=vocabulary.vocab_size, max_position_embeddings=256)
    with Checkpoints(folder / "model") as checkpoints:
        checkpoints.save(1, {"params": build(cfg).init(jax.random.key(0))})
    save_model_json(folder / "model", cfg, "lm")
    return folder


def measure(run, name, **options):
    given = {
        "lengths": LENGTHS, "depths": DEPTHS, "series": SERIES, "repeats": 2, "slots": 2,
        "style": "completion", "max_new_tokens": 4, "arm": "x",
    }  # fmt: skip
    stage(
        run / name, model=run / "model", tokenizer=run / "tokenizer", haystack=run / "corpus",
        **{**given, **options},
    )  # fmt: skip
    return files.read_json(run / name / "result.json")


@pytest.fixture(scope="module")
def whole(run):
    return measure(run, "whole")


def test_every_cell_has_its_texts_and_the_summary_is_theirs(run, whole):
    rows = files.read_jsonl(run / "whole" / "items.jsonl")
    assert len(rows) == len(SERIES) * len(LENGTHS) * len(DEPTHS) * 2
    assert whole["lengths"] == LENGTHS and whole["trained_length"] == 256
    for row in rows:
        assert row["length"] - 60 < row["tokens"] <= row["length"] - 8
        assert len(row["responses"]) == len(row["needles"]) == (1 if "1" in row["series"] else 2)
        assert all(r.startswith(NAMES) for r in row["responses"])
    one = whole["series"]["pairs, 1 needle"]
    cell = [r["edit"] for r in rows
            if (r["series"], r["length"], r["depth"]) == ("pairs, 1 needle", 128, 100)]  # fmt: skip
    assert one["scores"]["edit"][1][0] == pytest.approx(np.mean(cell))
    assert np.shape(one["scores"]["keyword"]) == (len(DEPTHS), len(LENGTHS))


def test_a_killed_run_goes_on_at_the_next_cell(run, whole, monkeypatch):
    shutil.copytree(run / "whole", run / "killed")
    (run / "killed" / "result.json").unlink()
    path = run / "killed" / "items.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:20])  # a cell has two lines: one is cut
    asked = []
    real = protocol.build_sample
    monkeypatch.setattr(
        protocol, "build_sample", lambda *a, **k: asked.append(a[2:4]) or real(*a, **k)
    )
    assert measure(run, "killed") == whole
    assert len(asked) == len(lines) - 6
    assert path.read_bytes() == b"".join(lines)


def test_the_cache_is_bounded(run):
    with pytest.raises(UserError, match="raise cache_bytes"):
        measure(run, "small", cache_bytes=1000)


def test_what_cannot_be_asked_is_said(run, tmp_path):
    for options, said in [
        ({"score": "bleu"}, "choose from keyword"), ({"rope": "longer"}, "choose from own"),
        ({"style": "poem"}, "chat or completion"), ({"haystack": tmp_path}, "no haystack"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            stage(
                run / "wrong", model=run / "model", tokenizer=run / "tokenizer",
                **{"haystack": run / "corpus", "lengths": [128], **options},
            )  # fmt: skip


def test_chat_asks_once_for_all(run):
    found = measure(run, "chat", style="chat", lengths=[192], depths=[50], series=SERIES[1:])
    rows = files.read_jsonl(run / "chat" / "items.jsonl")
    assert [len(r["responses"]) for r in rows] == [1, 1]
    assert list(found["series"]) == ["pairs, 2 needles"]


def test_longer_rows_are_read_in_the_way_asked_for():
    cfg = preset("tiny", max_position_embeddings=128)
    assert stretched(cfg, "own", 512, None) == cfg
    assert stretched(cfg, "none", 512, None).max_position_embeddings == 512
    assert stretched(cfg, "linear", 512, None).rope_scaling == PositionInterpolation(4.0)
    assert stretched(cfg, "yarn", 512, None).rope_scaling == YaRN(4.0, 128)
    dynamic = stretched(cfg, "dynamic", 512, None)
    assert (dynamic.rope_scaling, dynamic.length_limit) == (DynamicNTK(2.0), None)
    assert stretched(cfg, "linear", 64, None).rope_scaling == PositionInterpolation(1.0)


def test_the_summary_of_a_grid_by_hand():
    rows = [
        {"series": "s", "length": n, "depth": d, "repeat": r,
         **dict.fromkeys(stage.__globals__["SCORES"], float(n == 1 or (d == 0 and r == 0)))}
        for n in (1, 2) for d in (0, 100) for r in (0, 1)
    ]  # fmt: skip
    found = summary(rows, "s", [1, 2], [0, 100], "keyword", 0.85)
    assert found["scores"]["keyword"] == [[1, 0.5], [1, 0]]
    assert found["mean"] == [1, 0.25] and found["effective_length"] == 1
    assert found["low"][1] == 0.0 and found["high"][1] == 1.0
