"""Rounds of COOL RLHF: what reads what, labels that come late, and kills at any moment."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from internlm2_jax import files
from internlm2_jax.data import preferences
from internlm2_jax.errors import UserError
from internlm2_jax.rlhf.annotation import Comparisons
from internlm2_jax.rlhf.ppo import PPOConfig
from internlm2_jax.stages import Mining, RewardTraining, cool_rlhf, ppo, reward_model
from internlm2_jax.train.checkpoint import load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    files.write_jsonl(folder / "prompts.jsonl", preferences.prompts(40, 0, "train"))
    files.write_jsonl(folder / "preferences.jsonl", preferences.pairs(60, 0, "train"))
    held_out = preferences.pairs(20, 0, "held_out")
    files.write_jsonl(folder / "preferences_validation.jsonl", held_out)
    return folder


TRAINING = RewardTraining(
    learning_rate=1e-3, steps=3, row_length=512, tokens_per_batch=2048, log_every=1,
    validate_every=0, checkpoint_every=2,
)  # fmt: skip


def run(folder, tokenizer, base, data, **options):
    settings = {
        "tokenizer": tokenizer,
        "instructions": data,
        "sft": base,
        "reward_model": functools.partial(reward_model, training=TRAINING),
        "ppo": functools.partial(
            ppo,
            iterations=3,
            warmup_iterations=1,
            batch_size=8,
            prompt_length=160,
            max_new_tokens=8,
            reward_row_length=256,
            config=PPOConfig(actor_learning_rate=2e-2, critic_learning_rate=1e-3),
            pretrain_mixture={"code": 1.0},
            checkpoint_every=1,
            samples_every=1,
        ),
        "later_training": TRAINING,
        "mining": Mining(num_prompts=24, comparisons=10, max_new_tokens=8),
        "rounds": 2,
        "judge": "rule",
    }
    cool_rlhf(folder, **{**settings, **options})


def test_settings_that_the_rounds_decide_are_refused(tmp_path, data):
    partial = functools.partial(ppo, actor=tmp_path, reward_row_length=8)
    with pytest.raises(UserError, match="cool_rlhf sets actor of ppo itself"):
        run(tmp_path, tmp_path, tmp_path, data, ppo=partial)
    with pytest.raises(UserError, match="no judge 'coin'; there are rule"):
        run(tmp_path, tmp_path, tmp_path, data, judge="coin")
    with pytest.raises(UserError, match="0 rounds"):
        run(tmp_path, tmp_path, tmp_path, data, rounds=0)


def test_which_round_reads_what(tmp_path, data, monkeypatch):
    """The pipeline that it makes, without running it."""
    from internlm2_jax.stages import cool_rlhf as module

    made = {}

    class Caught(Exception):
        pass

    def pipeline(**stages):
        made.update(stages)
        raise Caught

    monkeypatch.setattr(sys.modules["internlm2_jax.stages.cool_rlhf"], "Pipeline", pipeline)
    assert module is cool_rlhf
    with pytest.raises(Caught):
        run(tmp_path, Path("tok"), Path("sft"), data, rounds=3, label_lag=1)
    assert list(made) == [
        f"{name}_round{r}" for r in (1, 2, 3) for name in ("reward_model", "ppo", "patches")
    ]
    names = {n: s.keywords for n, s in made.items()}
    assert names["ppo_round1"]["actor"] == names["ppo_round3"]["reference"] == Path("sft")
    assert names["ppo_round3"]["actor"].stage == "ppo_round2"
    assert names["ppo_round3"]["reward"].stage == "reward_model_round3"
    assert list(names["reward_model_round3"]["rounds"]) == ["patches_round1", "patches_round2"]
    assert names["reward_model_round2"]["labelled"] == []  # they lag a round
    assert names["reward_model_round3"]["labelled"] == ["patches_round1"]
    assert names["patches_round2"]["early"].stage == "ppo_round1"


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {data_tests!r}]
from test_cool_rlhf import run
run(*map(Path, {arguments!r}))
"""


def process(*arguments):
    tests = ROOT / "tests"
    text = PROGRAM.format(
        tests=str(tests / "stages"),
        data_tests=str(tests / "data"),
        arguments=list(map(str, arguments)),
    )
    return subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


NUMBERS = ("result.json", "metrics.jsonl", "samples*.jsonl", "patch.jsonl", "batch.jsonl")


def results(folder):
    found = (p for name in (*NUMBERS, "labels/*.json", "labels.jsonl") for p in folder.rglob(name))
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(found)}


@pytest.mark.slow
def test_kills_at_random_moments_change_no_number(tokenizer_stage, base_stage, data, tmp_path):
    whole = tmp_path / "whole"
    output, _ = (child := process(whole, tokenizer_stage, base_stage, data)).communicate()
    assert child.returncode == 0, output[-3000:]
    expected = results(whole)
    assert {"reward_model_round2/labels.jsonl", "ppo_round2/metrics.jsonl"} <= expected.keys()
    mined = files.read_json(whole / "patches_round1/result.json")
    assert len(mined["patterns"]) >= 11 and mined["comparisons"] == 10
    assert len(Comparisons(whole / "patches_round2/annotation").labels()) == 10
    assert (whole / "report.html").is_file()

    cut, rng, kills = tmp_path / "cut", random.Random(0), 0
    while kills < 5:
        child = process(cut, tokenizer_stage, base_stage, data)
        try:
            child.communicate(timeout=rng.uniform(4, 11))  # seconds; importing takes three
            break  # it came to its end
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.communicate()
            kills += 1
    assert kills >= 2
    output, _ = (child := process(cut, tokenizer_stage, base_stage, data)).communicate()
    assert child.returncode == 0, output[-3000:]
    got = results(cut)
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name] != expected[name]] == []
    a, b = (load_model(folder)[1] for folder in (whole, cut))
    jax.tree.map(np.testing.assert_array_equal, a, b)
