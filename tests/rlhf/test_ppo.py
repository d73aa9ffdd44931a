"""PPO's updates do what their names say, on a tiny model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.rlhf import rollout
from internlm2_jax.rlhf.ppo import PPOConfig, Updates, next_token_logprobs

CFG = preset("tiny")
ACTOR, CRITIC = build(CFG), build(CFG, head="scalar")
PARAMS, VALUES = ACTOR.init(jax.random.key(0)), CRITIC.init(jax.random.key(1))
PROMPTS = [[1, 5, 9], [1, 7], [1, 2, 3, 4, 5], [1, 8, 8, 8]]
CONFIG = PPOConfig(actor_learning_rate=1e-2, critic_learning_rate=1e-2, pretrain_coefficient=0.0)


@pytest.fixture(scope="module")
def sampled():
    return rollout.sample(
        ACTOR,
        PARAMS,
        PROMPTS,
        prompt_length=6,
        max_new_tokens=8,
        sampling=Sampling(temperature=1.0),
        seed=3,
        stop_ids=(2,),
        pad_id=2,
    )


def batch_of(sampled, advantages):
    return {
        "tokens": sampled.tokens,
        "mask": sampled.mask,
        "logprobs": sampled.logprobs,
        "advantages": np.where(sampled.mask, advantages, 0).astype(np.float32),
        "returns": np.where(sampled.mask, 0.7, 0).astype(np.float32),
    }


def pretrain_batch():
    tokens = np.random.default_rng(0).integers(3, 50, (2, 16), dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape),
        "loss_mask": np.ones(tokens.shape, np.float32),
    }


def mean_logprob(params, sampled):
    logprobs = next_token_logprobs(ACTOR, params, jnp.asarray(sampled.tokens))
    return float(jnp.sum(jnp.where(sampled.mask, logprobs, 0)) / sampled.mask.sum())


def test_rollout_lies_beside_its_prompt(sampled):
    for row, prompt in enumerate(PROMPTS):
        response = sampled.responses[row]
        whole = [*prompt, *response]
        assert sampled.tokens[row, : len(whole)].tolist() == whole
        spoken = np.flatnonzero(sampled.mask[row]) + 1
        assert sampled.tokens[row, spoken].tolist() == response
        assert sampled.lengths[row] == len(response)
    assert not sampled.logprobs[~sampled.mask].any()


def test_sampler_and_trainer_agree(sampled):
    logprobs = next_token_logprobs(ACTOR, PARAMS, jnp.asarray(sampled.tokens))
    np.testing.assert_allclose(
        np.where(sampled.mask, logprobs, 0), sampled.logprobs, atol=1e-5, rtol=0
    )


def test_a_prompt_that_does_not_fit_is_named():
    from internlm2_jax.errors import UserError

    with pytest.raises(UserError, match="a prompt of 5 tokens exceeds prompt_length 4"):
        rollout.sample(
            ACTOR,
            PARAMS,
            PROMPTS,
            prompt_length=4,
            max_new_tokens=2,
            sampling=Sampling(),
            seed=0,
            stop_ids=(),
            pad_id=2,
        )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_actor_moves_with_the_sign_of_the_advantage(sampled, sign):
    updates = Updates(ACTOR, CRITIC, CONFIG)
    state, metrics = updates.update_actor(
        updates.init(PARAMS, VALUES), batch_of(sampled, sign), pretrain_batch()
    )
    assert float(metrics["ratio"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["clip_share"]) == 0
    moved = mean_logprob(state["params"], sampled) - mean_logprob(PARAMS, sampled)
    assert moved * sign > 0.01


def test_pretraining_loss_alone_trains_the_actor(sampled):
    config = dataclasses.replace(CONFIG, pretrain_coefficient=0.5, actor_learning_rate=1e-3)
    updates = Updates(ACTOR, CRITIC, config)
    state, losses = updates.init(PARAMS, VALUES), []
    for _ in range(5):
        state, metrics = updates.update_actor(state, batch_of(sampled, 0.0), pretrain_batch())
        losses.append(float(metrics["pretrain_loss"]))
        assert float(metrics["policy_loss"]) == pytest.approx(0, abs=1e-6)
    assert losses == sorted(losses, reverse=True)


def test_critic_learns_the_returns_and_nothing_else_moves(sampled):
    updates = Updates(ACTOR, CRITIC, CONFIG)
    state, losses = updates.init(PARAMS, VALUES), []
    for _ in range(20):
        state, metrics = updates.update_critic(state, batch_of(sampled, 0.0))
        losses.append(float(metrics["value_loss"]))
    assert losses[-1] < 0.2 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, state["params"], PARAMS)


def test_what_the_state_was_made_from_survives_donation(sampled):
    updates = Updates(ACTOR, CRITIC, CONFIG)
    updates.update_critic(updates.init(PARAMS, VALUES), batch_of(sampled, 0.0))
    assert np.isfinite(np.asarray(VALUES["norm"]["weight"])).all()
    assert np.isfinite(np.asarray(PARAMS["norm"]["weight"])).all()


def test_kl_and_score_reach_the_advantages(sampled):
    updates = Updates(ACTOR, CRITIC, CONFIG)
    reference, values = updates.assess(PARAMS, VALUES, sampled.tokens)
    zeros = jnp.zeros_like(values)
    scores = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    advantages, returns = updates.estimate(
        scores, sampled.logprobs, reference, zeros, sampled.mask, np.ones(4, bool)
    )
    first = [int(np.flatnonzero(row)[0]) for row in sampled.mask]
    lengths = sampled.lengths
    # values 0, no KL: the advantage of the first token is the score, discounted by lambda
    expected = np.asarray(scores) * CONFIG.gae_lambda ** (lengths - 1)
    got = np.asarray(advantages)[np.arange(4), first]
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert not np.asarray(returns)[~sampled.mask].any()


def test_minibatches_cover_every_row_in_every_epoch(sampled):
    updates = Updates(ACTOR, CRITIC, dataclasses.replace(CONFIG, epochs=3, minibatches=2))
    parts = list(updates.minibatches(batch_of(sampled, 1.0)))
    assert len(parts) == 6
    for epoch in range(3):
        rows = np.concatenate([p["tokens"] for p in parts[2 * epoch : 2 * epoch + 2]])
        np.testing.assert_array_equal(rows, sampled.tokens)
