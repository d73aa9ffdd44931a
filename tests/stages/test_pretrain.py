"""Phases, mixtures and schedules through the stage itself: numbers, kills, mistakes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import yaml

from internlm2_jax import files
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.errors import UserError
from internlm2_jax.evals.verifiable import completion_accuracy
from internlm2_jax.models.config import preset
from internlm2_jax.stages import Phase, pretrain

VOCAB = 512
COMMON = {"rope_theta": 1e4, "learning_rate": 1e-2}
PHASES = [
    Phase(
        name="short", steps=6, sequence_length=32, batch_size=8, ramp=[(3, 4)],
        accumulate=4, schedule="wsd", decay_steps=2, decay="sqrt", warmup=1, final_ratio=0.5,
        mixture={"code": 3, "text": 1}, epochs={"code": 1}, z_loss=1e-4, **COMMON,
    ),
    Phase(
        name="long", steps=3, sequence_length=128, batch_size=2, final_ratio=0.1, clip_norm=0.5,
        mixture={"short/code": 1, "long/text": 1}, short_length=16, **COMMON,
    ),
    Phase(
        name="enhancement", steps=2, sequence_length=128, batch_size=1,
        mixture={"stem": 0.65, "text": 0.35}, weight_decay=0.0, **COMMON,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tokenizer_stage):
    return tokenizer_stage


def train(folder, tokenizer, phases=PHASES, **options):
    pretrain(
        folder,
        tokenizer=tokenizer,
        model=preset("tiny"),
        phases=phases,
        **{"validation_tokens": 256, "checkpoint_every": 4, "log_every": 1, **options},
    )
    return files.read_jsonl(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    # A source of more than 3000 tokens stays on the disk: code and text.
    return folder, train(folder, tokenizer, in_memory_tokens=3000, window_tokens=500, windows=2)


def test_phases_follow_each_other_with_their_own_settings(whole):
    folder, rows = whole
    rows = [row for row in rows if row["split"] == "train"]
    assert [row["phase"] for row in rows] == ["short"] * 6 + ["long"] * 3 + ["enhancement"] * 2
    assert [row["batch_size"] for row in rows] == [4, 4, 4, 8, 8, 8, 2, 2, 2, 1, 1]
    peak, half = 1e-2, 0.5
    decay = [1, 1 - half * np.sqrt(0.5)]
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * k / 3)) / 2 for k in range(3)]
    wanted = [0, 1, 1, 1, *decay, *cosine, 1, 1]
    np.testing.assert_allclose(
        [r["learning_rate"] for r in rows], np.multiply(peak, wanted), rtol=1e-5
    )
    result = files.read_json(folder / "result.json")
    assert result["tokens_seen"] == 32 * (3 * 4 + 3 * 8) + 128 * (3 * 2 + 2)
    assert [p["name"] for p in result["phases"]] == ["short", "long", "enhancement"]
    for phase in result["phases"]:
        assert sum(phase["shares"].values()) == pytest.approx(1)
        for name, limit in phase["epochs"].items():
            assert phase["passes"][name] <= limit


def test_loss_of_each_source_is_logged(whole):
    _, rows = whole
    first = next(row for row in rows if row["split"] == "train" and row["batch_size"] == 8)
    assert {key for key in first if key.startswith("loss/")} == {"loss/code", "loss/text"}
    means = [first["loss/code"], first["loss/text"]]
    assert min(means) <= first["loss"] <= max(means)
    last = [row for row in rows if row["split"] == "train"][-1]
    assert {key for key in last if key.startswith("loss/")} == {"loss/stem", "loss/text"}


def test_a_quick_suite_runs_with_each_validation(tokenizer, tmp_path):
    phase = dataclasses.replace(PHASES[1], steps=2)
    suite = functools.partial(completion_accuracy, num_tasks=5, max_new_tokens=3)
    rows = train(tmp_path, tokenizer, [phase], validate_every=1, suites={"tasks": suite})
    measured = [row for row in rows if row["split"] == "validation"]
    assert [row["step"] for row in measured] == [1, 2]
    assert all(0 <= row["tasks/all"] <= 1 for row in measured)
    families = {key for key in measured[0] if key.startswith("tasks/")} - {"tasks/all"}
    assert families


@pytest.mark.slow
def test_suites_of_the_evaluation_score_alike_on_a_mesh(tokenizer, tmp_path, own_suites):
    phase = dataclasses.replace(PHASES[1], steps=1, batch_size=4)
    scores = []
    for number, layout in enumerate(["", "fsdp=4,tensor=2"]):
        rows = train(
            tmp_path / str(number), tokenizer, [phase], validate_every=1, suites=own_suites,
            layout=layout,
        )  # fmt: skip
        (row,) = (row for row in rows if row["split"] == "validation")
        scores.append([row["likelihood/score"], row["generation/score"]])
    assert scores[0] == scores[1]
    assert scores[0][0] in {0, 0.25, 0.5, 0.75, 1}


def test_a_suite_that_cannot_be_read_is_said_before_training(tokenizer, tmp_path, own_suites):
    for wrong, message in (
        ({"suite": "no_such"}, "no suite 'no_such'"),
        ({"data": "/nowhere"}, "/nowhere is neither a folder"),
        ({"items": 3}, "items"),
    ):
        suites = {"mine": {**own_suites["likelihood"], **wrong}}
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", tokenizer, suites=suites)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_answers_longer_than_the_shortest_phase_are_said_before_training(
    tokenizer, tmp_path, own_suites
):
    shortest = min(phase.sequence_length for phase in PHASES)
    suite = yaml.safe_load(Path(own_suites["generation"]["suite"]).read_text())
    (settings,) = suite.values()
    settings["max_new_tokens"] = shortest
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(suite))
    long = {**own_suites["generation"], "suite": str(tmp_path / "long.yaml")}
    for options, message in (
        ({"suites": {"mine": long}}, f"{shortest} tokens of an answer leave no room"),
        ({"prompts": ["a"], "sample_tokens": shortest}, rf"prompts\.0 has .* {shortest} positions"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", tokenizer, **options)
    assert not (tmp_path / "run" / "checkpoints").exists()


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_killed_and_continued_is_the_same(whole, tokenizer, tmp_path, monkeypatch):
    folder, _ = whole
    options = {"in_memory_tokens": 3000, "window_tokens": 500, "windows": 2}
    real, calls = Batches.__call__, []

    def dying(self, *arguments):
        calls.append(arguments)
        if len(calls) > 7:
            raise Killed
        return real(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Batches, "__call__", dying)
        train(tmp_path / "run", tokenizer, **options)
    train(tmp_path / "run", tokenizer, **options, prefetch=1)
    for name in ("metrics.jsonl", "result.json"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_eight_devices_train_alike(tokenizer, tmp_path):
    phase = dataclasses.replace(PHASES[0], ramp=(), accumulate=1, steps=3)
    one, eight = (
        train(tmp_path / str(number), tokenizer, [phase], layout=layout, in_memory_tokens=3000)
        for number, layout in enumerate(["", "fsdp=8"])
    )
    for row, other in zip(one, eight, strict=True):
        for name in ("loss", "loss/code", "loss/text"):
            if row.get(name) is not None:
                assert other[name] == pytest.approx(row[name], rel=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "step"}, "phase 'short': schedule is 'step'; cosine or wsd"),
        ({"schedule": "cosine"}, "decay_steps need schedule='wsd'"),
        ({"ramp": [(9, 2)]}, "its ramp is longer than its 6 steps"),
    ],
)
def test_mistakes_in_a_phase(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PHASES[0], **change)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"ramp": [(1, 6)], "accumulate": 3}, {}, "8 rows does not divide into 3 parts"),
        ({"ramp": [(1, 3)], "accumulate": 1}, {"layout": "fsdp=4,tensor=2"}, "batch_size: 3 does"),
        ({"mixture": {"books": 1}, "epochs": {}}, {}, "finds none of its sources"),
        ({"mixture": {"special": 1}, "epochs": {}}, {}, "names special, which .* give corpus and"),
        ({"epochs": {"code": 1e-3}, "when_short": "error"}, {}, "phase 'short': 'code' .* missing"),
    ],
)
def test_mistakes_of_a_run(tokenizer, tmp_path, change, options, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, tokenizer, [dataclasses.replace(PHASES[0], **change)], **options)


def test_an_absent_source_is_said(tokenizer, tmp_path, caplog):
    phase = dataclasses.replace(PHASES[2], mixture={"stem": 1, "books": 1}, steps=1)
    train(tmp_path, tokenizer, [phase])
    assert "the corpus has no books; the other sources take its share" in caplog.text


@pytest.mark.slow
def test_mup_changes_the_start(tokenizer, tmp_path):
    phase = dataclasses.replace(PHASES[2], steps=1)
    width = preset("tiny").embed_dim
    same, narrow = (
        train(tmp_path / str(base), tokenizer, [phase], mup_base_width=base)
        for base in (width, width // 4)
    )
    assert narrow[0]["loss"] != same[0]["loss"]
