"""PPO's updates do what their names say, on a tiny model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.rlhf import rollout
from internlm2_jax.rlhf.ppo import Layouts, PPOConfig, Updates, next_token_logprobs

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
        "reference": sampled.logprobs,
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


# ------------------------------------------------------------------------------- alternatives


def options(**changed):
    return Updates(ACTOR, CRITIC, dataclasses.replace(CONFIG, **changed))


def actor_metrics(updates, sampled, advantages=0.0, **more):
    batch = batch_of(sampled, advantages) | more
    return updates.update_actor(updates.init(PARAMS, VALUES), batch, pretrain_batch())


def test_kl_in_the_loss_pulls_towards_the_reference(sampled):
    """With no advantage, a step lowers the measured KL to a reference that likes other tokens."""
    own = np.asarray(next_token_logprobs(ACTOR, PARAMS, jnp.asarray(sampled.tokens)))
    rng = np.random.default_rng(0)
    reference = (own + rng.normal(0, 0.5, own.shape)).astype(np.float32)
    updates = options(kl_in="loss", kl_estimator="k2", kl_coefficient=1.0, actor_learning_rate=1e-3)
    state, first = actor_metrics(updates, sampled, reference=reference)
    expected = (0.5 * (own - reference) ** 2)[sampled.mask].mean()
    assert float(first["kl_loss"]) == pytest.approx(expected, rel=1e-4)
    batch = batch_of(sampled, 0.0) | {"reference": reference}
    _, second = updates.update_actor(state, batch, pretrain_batch())
    assert float(second["kl_loss"]) < float(first["kl_loss"])


def test_entropy_bonus_spreads_the_policy(sampled):
    sharp = jax.tree.map(lambda x: 8 * x, PARAMS["head"])
    updates = options(entropy_coefficient=1.0)
    state = updates.init({**PARAMS, "head": sharp}, VALUES)
    batch, found = batch_of(sampled, 0.0), []
    for _ in range(3):
        state, metrics = updates.update_actor(state, batch, pretrain_batch())
        found.append(float(metrics["entropy"]))
    assert found == sorted(found) and found[-1] > found[0]


def test_dual_clip_reaches_the_actor(sampled):
    """The actor likes every token e times more than the sampler did, and all were bad."""
    own = np.asarray(next_token_logprobs(ACTOR, PARAMS, jnp.asarray(sampled.tokens)))
    batch = {"logprobs": np.where(sampled.mask, own - 1, 0).astype(np.float32)}
    _, plain = actor_metrics(options(), sampled, -1.0, **batch)
    _, dual = actor_metrics(options(dual_clip=2.0), sampled, -1.0, **batch)
    assert float(plain["policy_loss"]) == pytest.approx(np.e, rel=1e-4)
    assert float(plain["clip_share"]) == 0 and float(dual["clip_share"]) == 1
    assert float(dual["policy_loss"]) == pytest.approx(2.0, rel=1e-6)


def test_value_clipping_holds_the_critic_near_its_old_values(sampled):
    updates = options(value_clip=0.01)
    old = np.asarray(CRITIC.scores(VALUES, jnp.asarray(sampled.tokens[:, :-1])))
    batch = batch_of(sampled, 0.0)
    batch["returns"] = np.where(sampled.mask, old + 1, 0).astype(np.float32)
    # The critic has moved by 0.1 already: further is no gain, so the clipped loss counts.
    batch["values"] = (old - 0.1).astype(np.float32)
    _, metrics = updates.update_critic(updates.init(PARAMS, VALUES), batch)
    assert float(metrics["value_loss"]) == pytest.approx(0.5 * (1.1 - 0.01) ** 2, rel=1e-4)


def test_scores_are_normalised_clipped_and_the_coefficient_adapts():
    updates = options(
        reward_normalisation="running", reward_clip=1.0, kl_target=2.0, kl_horizon=40.0
    )
    state = updates.init(PARAMS, VALUES)
    state, paid = updates.steer(state, np.array([1.0, 3.0, 5.0, 31.0], np.float32), 4.0)
    assert paid.max() == 1.0 and paid[0] == pytest.approx(-9 / np.std([1, 3, 5, 31]), rel=1e-4)
    assert float(state["control"]["kl_coefficient"]) == pytest.approx(0.01 * 1.02)
    plain = options()
    state, paid = plain.steer(plain.init(PARAMS, VALUES), np.array([7.5, -2.0]), 4.0)
    np.testing.assert_array_equal(paid, np.float32([7.5, -2.0]))
    assert float(state["control"]["kl_coefficient"]) == np.float32(0.01)


def test_whitened_advantages(sampled):
    reference = np.asarray(sampled.logprobs)
    zeros = np.zeros_like(reference)
    advantages, returns = options(whiten_advantages=True).estimate(
        jnp.asarray([1.0, 2.0, 3.0, 4.0]), sampled.logprobs, reference, zeros, sampled.mask,
        np.ones(4, bool),
    )  # fmt: skip
    inside = np.asarray(advantages)[sampled.mask]
    assert inside.mean() == pytest.approx(0, abs=1e-5) and inside.std() == pytest.approx(
        1, rel=1e-3
    )
    assert np.asarray(returns)[sampled.mask].min() > 0.9  # the critic's targets stay as they were


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'; it is one of k1, k2, k3"),
        ({"kl_in": "loss"}, "k1 in the loss has a gradient of expectation 0"),
        ({"kl_in": "sky", "kl_estimator": "k2"}, "kl_in is 'sky'"),
        ({"reward_clip": -1.0}, "reward_clip is -1.0; it must be above 0"),
        ({"minibatches": 0}, "minibatches is 0"),
    ],
)
def test_wrong_settings_are_named(wrong, match):
    with pytest.raises(UserError, match=match):
        PPOConfig(**wrong)


# ----------------------------------------------------------------------------------- layouts


@pytest.mark.slow  # half a minute of compiling for eight devices
def test_every_model_in_its_own_layout_gives_the_numbers_of_one_device(sampled):
    layouts = Layouts(
        actor="fsdp=2,tensor=4", critic="data=4,fsdp=2", reference="tensor=8", reward="fsdp=8"
    )
    config = dataclasses.replace(CONFIG, pretrain_coefficient=0.5, kl_in="loss", kl_estimator="k3")
    eight = {name: np.concatenate([part, part]) for name, part in batch_of(sampled, 1.0).items()}
    extra = {name: np.concatenate([x] * 4) for name, x in pretrain_batch().items()}

    def run(layouts):
        cfg = dataclasses.replace(CFG, num_layers=1, num_heads=8, num_kv_heads=8)
        actor, critic = build(cfg), build(cfg, head="scalar")
        with layouts.use("actor"):
            params = sharding.create(actor.init, actor.axes, jax.random.key(0))
        with layouts.use("reference"):
            reference = sharding.create(actor.init, actor.axes, jax.random.key(2))
        with layouts.use("critic"):
            values = sharding.create(critic.init, critic.axes, jax.random.key(1))
        updates = Updates(actor, critic, config, layouts)
        logprobs, estimates = updates.assess(reference, values, eight["tokens"])
        batch = {**eight, "reference": logprobs, "values": estimates}
        state = updates.init(params, values)
        state, one = updates.update_critic(state, batch)
        state, two = updates.update_actor(state, batch, extra)
        with layouts.use("actor"):
            norm = float(sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(state["params"])))
        numbers = {k: float(v) for k, v in (one | two).items()}
        return logprobs, estimates, numbers | {"norm": norm}

    alone, together = run(Layouts()), run(layouts)
    for a, b in zip(alone[:2], together[:2], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
    assert together[2] == pytest.approx(alone[2], rel=1e-3, abs=1e-5)


def test_layouts_that_do_not_go_together():
    with pytest.raises(UserError, match="they take actor 8, critic 1, reference 1, reward 1"):
        Layouts(actor="fsdp=8")
    with pytest.raises(UserError, match="critic has context=2"):
        Layouts(critic="context=2")
