"""Group advantages, token weights and GRPO's loss against sums written out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from internlm2_jax.errors import UserError
from internlm2_jax.rlhf.group_loss import grpo_loss, token_weights
from internlm2_jax.rlhf.groups import group_advantages, overlong_penalty, spread

REWARDS = np.array([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0.5, 0, 0, 0]], np.float32)
ALL = np.ones((4, 4), bool)


def test_advantages_by_hand():
    found = group_advantages(REWARDS, ALL, epsilon=0.0)
    sample = np.sqrt(1 / 3)  # of two ones and two zeros, n - 1 below
    np.testing.assert_allclose(found[0], np.array([0.5, -0.5, -0.5, 0.5]) / sample, rtol=1e-6)
    np.testing.assert_allclose(found[2], np.array([-0.25, -0.25, 0.75, -0.25]) / 0.5, rtol=1e-6)


def test_without_the_deviation_easy_and_hard_prompts_keep_their_scale():
    found = group_advantages(REWARDS, ALL, scale="none")
    np.testing.assert_allclose(found, REWARDS - REWARDS.mean(axis=1, keepdims=True), rtol=1e-6)


def test_a_group_that_fares_alike_says_nothing():
    for scale in ("std", "none"):
        assert not group_advantages(REWARDS[1:2], ALL[:1], scale=scale).any()
    assert spread(REWARDS, ALL).tolist() == [True, False, True, True]


def test_what_could_not_be_judged_takes_no_part():
    rewards = np.array([[1.0, 0, 777, 0]], np.float32)
    valid = np.array([[True, True, False, True]])
    for scale in ("std", "none"):
        found = group_advantages(rewards, valid, scale=scale)
        assert found[0, 2] == 0
        alone = group_advantages(rewards[:, [0, 1, 3]], ALL[:1, :3], scale=scale)
        np.testing.assert_allclose(found[0, [0, 1, 3]], alone[0], rtol=1e-6)
    for valid in ([True, False, False, False], [False] * 4):
        assert not group_advantages(rewards, np.array([valid])).any()
        assert not spread(rewards, np.array([valid])).any()
    assert not spread(np.array([[1.0, 1, 0]]), np.array([[True, True, False]])).any()


@given(
    arrays.arrays(np.float32, (3, 5), elements=st.sampled_from([0.0, 0.25, 1.0, -1.0])),
    arrays.arrays(bool, (3, 5)),
    st.sampled_from(["std", "none"]),
)
def test_advantages_of_a_group_sum_to_nothing(rewards, valid, scale):
    found = group_advantages(rewards, valid, scale=scale)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-4)
    assert not found[~valid].any() and np.isfinite(found).all()
    shifted = group_advantages(rewards + 3, valid, scale=scale)
    np.testing.assert_allclose(found, shifted, atol=1e-5)


def test_length_costs_near_the_limit():
    lengths = np.array([[0, 10, 12, 14, 16]])
    found = overlong_penalty(lengths, longest=16, buffer=4)
    np.testing.assert_allclose(found, [[0, 0, 0, -0.5, -1]])  # DAPO, equation 13
    assert not overlong_penalty(lengths, longest=16, buffer=0).any()


# ------------------------------------------------------------------------------------- loss

RNG = np.random.default_rng(0)
MASK = np.arange(6) < np.array([6, 2, 4, 0])[:, None]
NEW, OLD, REFERENCE = (RNG.normal(-2, 0.3, (4, 6)).astype(np.float32) for _ in range(3))
ADVANTAGES = np.array([1.0, -0.5, 2.0, 9.0], np.float32)


def by_hand(aggregate, low, high, beta):
    """The formulas of the papers as loops."""
    sums, counts = [], []
    for row in range(4):
        total, tokens = 0.0, int(MASK[row].sum())
        for t in np.flatnonzero(MASK[row]):
            ratio = np.exp(float(NEW[row, t]) - float(OLD[row, t]))
            clipped = min(max(ratio, 1 - low), 1 + high)
            d = float(REFERENCE[row, t]) - float(NEW[row, t])
            k3 = np.exp(d) - d - 1
            a = float(ADVANTAGES[row])
            total += -min(ratio * a, clipped * a) + beta * k3
        sums.append(total)
        counts.append(tokens)
    heard = [i for i in range(4) if counts[i]]
    if aggregate == "token":
        return sum(sums) / sum(counts)
    if aggregate == "sequence":
        return sum(sums[i] / counts[i] for i in heard) / len(heard)
    return sum(sums) / (len(heard) * 10)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "fixed"])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.5)])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_by_hand(aggregate, low, high, beta):
    loss, metrics = grpo_loss(
        NEW, OLD, ADVANTAGES, MASK, clip_low=low, clip_high=high, aggregate=aggregate,
        longest=10, reference_logprobs=REFERENCE, kl_coefficient=beta,
    )  # fmt: skip
    assert float(loss) == pytest.approx(by_hand(aggregate, low, high, beta), rel=1e-5)
    assert float(metrics["policy_loss"]) == pytest.approx(
        by_hand(aggregate, low, high, 0), rel=1e-5
    )
    assert float(metrics["kl_loss"]) > 0


def test_clip_higher_lets_a_rare_token_grow():
    up = jnp.log(jnp.array([[1.25]]))
    mask, advantage = jnp.ones((1, 1), bool), jnp.ones(1)

    def slope(high):
        return jax.grad(lambda new: grpo_loss(new, jnp.zeros((1, 1)), advantage, mask,
                                              clip_low=0.2, clip_high=high)[0])(up)  # fmt: skip

    assert float(slope(0.2)[0, 0]) == 0 and float(slope(0.28)[0, 0]) == pytest.approx(-1.25)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "fixed"])
def test_what_is_masked_has_no_gradient(aggregate):
    old = jnp.where(MASK, OLD, -jnp.inf)
    reference = jnp.where(MASK, REFERENCE, jnp.nan)
    grad = jax.grad(
        lambda new: grpo_loss(new, old, ADVANTAGES, MASK, aggregate=aggregate, longest=10,
                              reference_logprobs=reference, kl_coefficient=0.1)[0]
    )(jnp.where(MASK, NEW, -jnp.inf))  # fmt: skip
    assert np.isfinite(np.asarray(grad)).all()
    assert not np.asarray(grad)[~MASK].any() and np.asarray(grad)[MASK].all()


def test_weights_of_an_empty_batch_are_no_nan():
    for aggregate in ("token", "sequence", "fixed"):
        loss, _ = grpo_loss(
            NEW, OLD, ADVANTAGES, np.zeros_like(MASK), aggregate=aggregate, longest=10
        )
        assert float(loss) == 0


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no reference"):
        grpo_loss(NEW, OLD, ADVANTAGES, MASK, kl_coefficient=0.1)
    with pytest.raises(UserError, match="choose 'token'"):
        token_weights(jnp.asarray(MASK), "word", 10)
