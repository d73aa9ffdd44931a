import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.losses import preference

CHOSEN = np.array([1.2, -0.7, 3.0, 0.1, -4.0, 4.9])
REJECTED = np.array([0.3, 0.9, -3.5, 0.1, 4.0, -4.9])


def focal_oracle(chosen, rejected, gamma=2.0):
    losses = []
    for c, r in zip(chosen, rejected, strict=True):
        p = 1 / (1 + math.exp(r - c))
        losses.append(-((1 - 2 * max(0.0, p - 0.5)) ** gamma) * math.log(p))
    return np.array(losses)


def slope(function, x, h=1e-5):
    """Central difference of a float64 function, element by element."""
    return (function(x + h) - function(x - h)) / (2 * h)


def test_focal_ranking_matches_the_formula():
    for gamma in (0.0, 1.0, 2.0, 3.5):
        np.testing.assert_allclose(
            preference.focal_ranking(jnp.array(CHOSEN), jnp.array(REJECTED), gamma=gamma),
            focal_oracle(CHOSEN, REJECTED, gamma),
            rtol=1e-4,
        )


def test_hand_values():
    # Equal scores: P = 1/2, the weight is 1, the loss is log 2.
    # P = 3/4 (difference log 3): weight (1 - 1/2)^2 = 1/4.
    losses = preference.focal_ranking(jnp.array([0.0, math.log(3)]), jnp.zeros(2))
    np.testing.assert_allclose(losses, [math.log(2), 0.25 * math.log(4 / 3)], rtol=1e-6)
    np.testing.assert_allclose(preference.log_barrier(jnp.array([0.0])), -2 * math.log(5))
    np.testing.assert_allclose(
        preference.log_barrier(jnp.array([3.0])), -(math.log(8) + math.log(2)), rtol=1e-6
    )


def test_gradient_through_the_focal_weight():
    grad = jax.grad(lambda c: preference.focal_ranking(c, jnp.array(REJECTED)).sum())(
        jnp.array(CHOSEN)
    )
    numeric = slope(lambda c: focal_oracle(c, REJECTED), CHOSEN)
    away = CHOSEN != REJECTED  # the loss has a kink at a tie
    np.testing.assert_allclose(grad[away], numeric[away], rtol=2e-3, atol=1e-7)


def test_at_a_tie_the_slope_of_the_kink_counts_as_zero():
    grad = jax.grad(lambda c: preference.focal_ranking(c, jnp.zeros(())))(jnp.zeros(()))
    np.testing.assert_allclose(grad, -0.5)


def test_stopped_focal_weight_scales_the_bradley_terry_gradient():
    grad = jax.grad(
        lambda c: preference.focal_ranking(c, jnp.array(REJECTED), focal_gradient="stop").sum()
    )(jnp.array(CHOSEN))
    p = 1 / (1 + np.exp(REJECTED - CHOSEN))
    expected = ((1 - 2 * np.maximum(0, p - 0.5)) ** 2) * -(1 - p)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("difference", [-1e4, -50.0, 50.0, 1e4])
def test_extreme_scores_stay_finite(difference):
    chosen, rejected = jnp.array([difference]), jnp.zeros(1)

    def loss(c):
        return preference.RewardLoss()(c, rejected)[0]

    assert np.isfinite(loss(chosen)) and np.isfinite(jax.grad(loss)(chosen)).all()
    np.testing.assert_allclose(
        preference.bradley_terry(chosen, rejected), max(0.0, -difference), atol=1e-20
    )


def test_well_ranked_pairs_keep_their_digits():
    # 1 - 2 (P - 1/2) is exactly 0 in float32 here; the true weight is about 2 e^-20.
    loss = preference.focal_ranking(jnp.array([20.0]), jnp.zeros(1), gamma=1.0)
    np.testing.assert_allclose(loss, 2 * math.exp(-40), rtol=1e-4)


def test_bradley_terry_with_margin():
    np.testing.assert_allclose(
        preference.bradley_terry(jnp.array(CHOSEN), jnp.array(REJECTED), margin=0.5),
        np.log1p(np.exp(-(CHOSEN - REJECTED - 0.5))),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        preference.bradley_terry(jnp.array(CHOSEN), jnp.array(REJECTED)),
        preference.focal_ranking(jnp.array(CHOSEN), jnp.array(REJECTED), gamma=0.0),
        rtol=1e-6,
    )


def test_barrier_inside_matches_its_gradient():
    x = np.array([-4.9, -2.0, 0.0, 1.0, 4.5])
    for outside in ("linear", "clamp"):
        grad = jax.vmap(jax.grad(lambda s: preference.log_barrier(s, outside=outside)))(  # noqa: B023
            jnp.array(x)
        )
        np.testing.assert_allclose(grad, 1 / (5 - x) - 1 / (5 + x), rtol=1e-4, atol=1e-6)


def test_beyond_the_border_linear_pulls_back_and_clamp_does_not():
    x = jnp.array([-7.0, 6.0, 5.0])
    clamp = jax.vmap(jax.grad(lambda s: preference.log_barrier(s, outside="clamp")))(x)
    linear = jax.vmap(jax.grad(preference.log_barrier))(x)
    np.testing.assert_array_equal(clamp, 0.0)
    tangent = 1 / 0.01 - 1 / 9.99
    np.testing.assert_allclose(linear, [-tangent, tangent, tangent], rtol=1e-4)
    # The line meets the barrier: same value on both sides of the border.
    value = preference.log_barrier(jnp.array([4.98999, 4.99001]))
    np.testing.assert_allclose(value[1] - value[0], tangent * 2e-5, rtol=0.1)


def test_the_pull_of_the_default_beats_the_ranking_loss():
    """A pair whose rejected score is higher, both outside: each score must still come home."""
    grads = jax.grad(lambda c, r: preference.RewardLoss()(c, r)[0], argnums=(0, 1))(
        jnp.array([5.5]), jnp.array([6.5])
    )
    assert grads[0][0] > 0 and grads[1][0] > 0


def test_penalty_is_summed_over_scores_and_divided_by_pairs():
    chosen, rejected = jnp.array([1.0, 2.0]), jnp.array([0.0, -3.0])
    loss, metrics = preference.RewardLoss()(chosen, rejected)
    barrier = [-(math.log(5 + x) + math.log(5 - x)) for x in (1.0, 2.0, 0.0, -3.0)]
    np.testing.assert_allclose(metrics["penalty"], sum(barrier) / 2, rtol=1e-6)
    ranking = focal_oracle(np.array([1.0, 2.0]), np.array([0.0, -3.0])).mean()
    np.testing.assert_allclose(loss, ranking + 0.02 * sum(barrier) / 2, rtol=1e-5)


def test_xtuner_settings_reproduce_its_loss():
    """Scores beyond the bound, border 1e-3 inside it, weight 0.01, as xtuner computes it."""
    chosen, rejected = np.array([6.0, 1.0]), np.array([-0.5, -9.0])
    clipped = np.clip(np.concatenate([chosen, rejected]), -5 + 1e-3, 5 - 1e-3)
    penalty = (-np.log(5 - clipped) - np.log(clipped + 5)).sum() / 2
    expected = focal_oracle(chosen, rejected).mean() + 0.01 * penalty
    loss, metrics = preference.RewardLoss(penalty_weight=0.01, outside="clamp", edge=1e-3)(
        jnp.array(chosen), jnp.array(rejected)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert metrics["outside"] == 0.5


def test_zero_weight_pairs_do_not_count():
    chosen, rejected = jnp.array([1.0, 0.2, 99.0]), jnp.array([0.0, 0.4, -99.0])
    padded, padded_metrics = preference.RewardLoss()(chosen, rejected, weights=jnp.array([1, 1, 0]))
    plain, metrics = preference.RewardLoss()(chosen[:2], rejected[:2])
    np.testing.assert_allclose(padded, plain, rtol=1e-6)
    assert padded_metrics["accuracy"] == metrics["accuracy"] == 0.5


def test_baselines():
    chosen, rejected = np.array([1.0, -0.5]), np.array([0.5, 2.0])
    margins = np.array([3.0, 1.0])
    arrays = jnp.array(chosen), jnp.array(rejected)

    def softplus(x):
        return np.log1p(np.exp(x))

    plain = preference.RewardLoss(ranking="bradley_terry", penalty="none")
    np.testing.assert_allclose(plain(*arrays)[0], softplus(rejected - chosen).mean(), rtol=1e-6)
    led = preference.RewardLoss(ranking="margin", penalty="l2", margin=0.5, penalty_weight=0.1)
    expected = softplus(rejected - chosen + 0.5 * margins).mean()
    expected += 0.1 * (chosen**2 + rejected**2).mean()
    loss, metrics = led(*arrays, margins=jnp.array(margins))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["pairs"] == 2


def test_unknown_choices_are_named():
    x = jnp.zeros(1)
    with pytest.raises(UserError, match="ranking='dpo' is unknown; choose one of focal"):
        preference.RewardLoss(ranking="dpo")
    with pytest.raises(UserError, match="penalty='l1' is unknown"):
        preference.RewardLoss(penalty="l1")
    with pytest.raises(UserError, match="outside='clip' is unknown; choose one of linear, clamp"):
        preference.log_barrier(x, outside="clip")
    with pytest.raises(UserError, match="focal_gradient"):
        preference.focal_ranking(x, x, focal_gradient="yes")
    with pytest.raises(UserError, match="edge=5"):
        preference.log_barrier(x, edge=5)
