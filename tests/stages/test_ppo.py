"""A round of PPO through the stage: what it leaves behind, and how it ends when fed nonsense."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from internlm2_jax import files
from internlm2_jax.data import preferences
from internlm2_jax.errors import UserError
from internlm2_jax.rlhf import rollout
from internlm2_jax.rlhf.guards import Diverged, Guards
from internlm2_jax.rlhf.ppo import Layouts, PPOConfig, Updates
from internlm2_jax.rlhf.scoring import Scorer
from internlm2_jax.stages import ppo
from internlm2_jax.stages.reward_model import with_fresh_head
from internlm2_jax.train.checkpoint import load_model, save_model

CONFIG = PPOConfig(actor_learning_rate=1e-3, critic_learning_rate=1e-3, minibatches=2)


@pytest.fixture(scope="module")
def start(tokenizer_stage, base_stage, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts")
    files.write_jsonl(prompts / "prompts.jsonl", preferences.prompts(40, 0, "train"))
    reward = tmp_path_factory.mktemp("reward")
    model, params = with_fresh_head(base_stage, "random", seed=0)
    save_model(reward, model.cfg, "scalar", params)

    def run(folder, **options):
        settings = {
            "tokenizer": tokenizer_stage,
            "instructions": prompts,
            "actor": base_stage,
            "reference": base_stage,
            "reward": reward,
            "iterations": 4,
            "warmup_iterations": 1,
            "batch_size": 8,
            "prompt_length": 128,
            "max_new_tokens": 8,
            "reward_row_length": 192,
            "config": CONFIG,
            "pretrain_mixture": {"long/text": 0.5, "code": 0.5},
            "samples_per_prompt": 2,
            "samples_every": 2,
            "checkpoint_every": 2,
            "guards": Guards(patience=1, negative_kl=0),
        }
        ppo(folder, **{**settings, **options})
        return files.read_jsonl(folder / "metrics.jsonl")

    return run


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    start(folder)
    return folder


def test_metrics_and_samples(finished):
    rows = files.read_jsonl(finished / "metrics.jsonl")
    assert [row["warmup"] for row in rows] == [True, False, False, False]
    for row in rows:
        assert {
            "truncated",
            "zero_variance_groups",
            "response_length",
            "kl",
            "kl_signed",
        } <= row.keys()
        assert row["reward_std"] > 0 and row["value_explained"] <= 1
    for row in rows[1:]:
        assert {"ratio", "clip_share", "approx_kl", "actor_grad_norm"} <= row.keys()
        assert row["ratio_at_start"] == pytest.approx(1, abs=1e-4)
        assert row["mismatch"] < 1e-4
    samples = files.read_jsonl(finished / "samples.jsonl")
    assert {row["step"] for row in samples} == {1, 3, 4}
    assert samples[0]["prompt"] == samples[1]["prompt"] != samples[2]["prompt"]
    page = (finished / "samples.html").read_text()
    assert "24 of 24 answers" in page and "cut: it did not end by itself" in page


def test_a_round_that_was_cut_ends_in_the_same_numbers(start, finished, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    real, calls = Updates.update_critic, []

    def update_critic(self, state, batch):
        calls.append(1)
        if len(calls) == 6:  # in the middle of the third iteration
            raise Killed
        return real(self, state, batch)

    monkeypatch.setattr(Updates, "update_critic", update_critic)
    with pytest.raises(Killed):
        start(tmp_path)
    start(tmp_path)
    for name in ("metrics.jsonl", "samples.jsonl", "samples.html", "result.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    got, expected = (load_model(folder)[1] for folder in (tmp_path, finished))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_sampler_of_other_weights_is_noticed(start, tmp_path, monkeypatch):
    real = rollout.sample

    def sample(model, params, *args, **options):
        other = jax.tree.map(lambda x: 1.2 * x, params)
        return real(model, other, *args, **options)

    monkeypatch.setattr(rollout, "sample", sample)
    with pytest.raises(Diverged, match="iterations 2 to 2: sampler and trainer disagree"):
        start(tmp_path)


def test_a_reward_model_that_says_one_number_is_noticed(start, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "__call__", lambda self, params, asked: np.ones(len(asked)))
    with pytest.raises(Diverged, match="iterations 1 to 1: the scores of a batch no longer differ"):
        start(tmp_path)


def test_tokens_of_another_distribution_give_a_negative_kl(start, tmp_path, monkeypatch):
    """Every token is said to have been less likely than it was, as after a wrong mask."""
    real = rollout.sample

    def sample(*args, **options):
        sampled = real(*args, **options)
        return dataclasses.replace(sampled, logprobs=sampled.logprobs - sampled.mask)

    monkeypatch.setattr(rollout, "sample", sample)
    with pytest.raises(Diverged, match="have a negative KL to the reference"):
        start(tmp_path, guards=Guards(patience=2, mismatch=0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"samples_per_prompt": 3}, "samples_per_prompt is 3; it must divide the batch of 8"),
        ({"batch_size": 9, "samples_per_prompt": 1}, "2 minibatches do not divide a batch of 9"),
        ({"layouts": Layouts(*["fsdp=8"] * 4)}, "4 rows do not divide over 8 parts of the actor"),
        ({"pretrain_mixture": {"books": 1.0}}, "the mixture names books but the corpus has"),
    ],
)
def test_mistakes(start, tmp_path, options, match):
    with pytest.raises(UserError, match=match):
        start(tmp_path, **options)
