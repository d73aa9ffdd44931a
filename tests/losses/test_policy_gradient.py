import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.losses.policy_gradient import entropy, masked_mean, ppo_policy_loss, value_loss


def example(seed=0, batch=3, time=6):
    rng = np.random.default_rng(seed)
    old = -rng.random((batch, time)) * 3
    new = old + rng.normal(size=(batch, time)) * 0.5
    advantages = rng.normal(size=(batch, time))
    mask = np.arange(time) < np.array([[6], [3], [1]])
    return new, old, advantages, mask


def oracle(new, old, advantages, mask, low=0.2, high=0.2, dual=None):
    total = clipped = 0.0
    for b, t in np.argwhere(mask):
        ratio, a = np.exp(new[b, t] - old[b, t]), advantages[b, t]
        kept = min(max(ratio, 1 - low), 1 + high)
        loss = -min(ratio * a, kept * a)
        flat = kept * a < ratio * a
        if dual is not None and a < 0 and loss > -dual * a:
            loss, flat = -dual * a, True
        total, clipped = total + loss, clipped + flat
    return total / mask.sum(), clipped / mask.sum()


@pytest.mark.parametrize("low,high,dual", [(0.2, None, None), (0.1, 0.4, None), (0.2, None, 1.3)])
def test_matches_a_loop(low, high, dual):
    arguments = example()
    loss, metrics = ppo_policy_loss(
        *map(jnp.asarray, arguments), clip_epsilon=low, clip_epsilon_high=high, dual_clip=dual
    )
    expected, fraction = oracle(*arguments, low, low if high is None else high, dual)
    if dual is not None:  # it reaches some token of the example
        assert expected < oracle(*arguments, low, low)[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], fraction, rtol=1e-6)


def test_gradient_matches_finite_differences():
    new, old, advantages, mask = example(1)
    grad = jax.grad(
        lambda x: ppo_policy_loss(x, jnp.asarray(old), jnp.asarray(advantages), jnp.asarray(mask))[
            0
        ]
    )(jnp.asarray(new))
    for b, t in np.ndindex(new.shape):
        step = np.zeros_like(new)
        step[b, t] = 1e-6
        up, down = (oracle(new + s * step, old, advantages, mask)[0] for s in (1, -1))
        np.testing.assert_allclose(grad[b, t], (up - down) / 2e-6, atol=1e-5)


def test_dual_clip_bounds_a_negative_advantage_alone():
    """Ye et al. 2020, by hand: ratios 0.5, 1.1, 4 under A = -1 and 4 under A = 1, with c = 3."""
    ratio, advantages = np.array([[0.5, 1.1, 4.0, 4.0]]), np.array([[-1.0, -1.0, -1.0, 1.0]])
    mask = jnp.ones((1, 4), bool)

    def loss(logprobs, c):
        return ppo_policy_loss(
            logprobs, jnp.zeros((1, 4)), jnp.asarray(advantages), mask, dual_clip=c
        )

    at = jnp.asarray(np.log(ratio))
    # -min(r A, clip(r, 0.8, 1.2) A): 0.8 (clipped), 1.1, 4, -1.2 (clipped); the 4 becomes c = 3
    assert float(loss(at, None)[0]) == pytest.approx((0.8 + 1.1 + 4.0 - 1.2) / 4)
    found, metrics = loss(at, 3.0)
    assert float(found) == pytest.approx((0.8 + 1.1 + 3.0 - 1.2) / 4)
    assert float(metrics["clip_fraction"]) == 0.75
    grads = [jax.grad(lambda x, c=c: loss(x, c)[0])(at) for c in (None, 3.0)]
    np.testing.assert_allclose(grads[0], [[0, 1.1 / 4, 4.0 / 4, 0]], atol=1e-6)
    np.testing.assert_allclose(grads[1], [[0, 1.1 / 4, 0, 0]], atol=1e-6)


def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient():
    _, old, advantages, mask = map(jnp.asarray, example())
    loss, metrics = ppo_policy_loss(old, old, advantages, mask)
    grad = jax.grad(lambda x: ppo_policy_loss(x, old, advantages, mask)[0])(old)
    np.testing.assert_allclose(loss, -masked_mean(advantages, mask), rtol=1e-6)
    np.testing.assert_allclose(grad, -advantages * mask / mask.sum(), rtol=1e-5)
    assert metrics["ratio"] == 1 and metrics["approx_kl"] == 0 and metrics["clip_fraction"] == 0


@pytest.mark.parametrize("dirt", [-np.inf, np.nan])
def test_masked_tokens_cannot_leak_whatever_they_hold(dirt):
    new, old, advantages, mask = example()
    dirty = np.where(mask, new, dirt)

    def loss(x):
        return ppo_policy_loss(x, jnp.asarray(old), jnp.asarray(advantages), jnp.asarray(mask))[0]

    np.testing.assert_allclose(loss(jnp.asarray(dirty)), loss(jnp.asarray(new)))
    grad = jax.grad(loss)(jnp.asarray(dirty))
    assert np.isfinite(grad).all() and (np.asarray(grad)[~mask] == 0).all()


def test_the_mean_is_over_tokens_not_sequences():
    advantages = jnp.array([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    mask = jnp.array([[True, True, True], [True, False, False]])
    zeros = jnp.zeros((2, 3))
    assert ppo_policy_loss(zeros, zeros, advantages, mask)[0] == -2.0  # (3 + 5) / 4, not (1 + 5)/2


def test_no_gradient_reaches_advantages_or_the_old_policy():
    arguments = [jnp.asarray(x) for x in example()]
    grads = jax.grad(lambda o, a: ppo_policy_loss(arguments[0], o, a, arguments[3])[0], (0, 1))(
        arguments[1], arguments[2]
    )
    assert all((g == 0).all() for g in grads)


def test_value_loss():
    values, returns = jnp.array([[1.0, 2.0, 9.0]]), jnp.array([[0.0, 4.0, 0.0]])
    mask = jnp.array([[True, True, False]])
    assert value_loss(values, returns, mask) == 0.5 * (1 + 4) / 2
    # Old value 0.5, clip 0.2: prediction 1.0 counts as 0.7, the plain error is the worse one.
    # Old value 3.5: prediction 2.0 counts as 3.3 (error 0.7), the plain error 2 is the worse one.
    old = jnp.array([[0.5, 3.5, 0.0]])
    assert value_loss(values, returns, mask, old_values=old, clip_epsilon=0.2) == 0.5 * 5 / 2
    # Old value 2.0 for a return of 0: prediction 1.0 counts as 1.8, now the clipped one is worse.
    old = jnp.array([[2.0, 2.0, 0.0]])
    np.testing.assert_allclose(
        value_loss(values, returns, mask, old_values=old, clip_epsilon=0.2), 0.5 * (3.24 + 4) / 2
    )
    grad = jax.grad(lambda v: value_loss(v, returns, mask))(values)
    np.testing.assert_allclose(grad, [[0.5, -1.0, 0.0]])


def test_empty_mask_gives_zero_and_bad_options_are_named():
    x, none = jnp.ones((1, 2)), jnp.zeros((1, 2), bool)
    assert ppo_policy_loss(x, x, x, none)[0] == 0 and value_loss(x, x * 2, none) == 0
    with pytest.raises(UserError, match=r"dual_clip=0\.5"):
        ppo_policy_loss(x, x, x, none, dual_clip=0.5)
    with pytest.raises(UserError, match="go together"):
        value_loss(x, x, none, clip_epsilon=0.2)


def test_entropy():
    p = np.array([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(p) + 7.0)[None]
    got = entropy(logits)
    np.testing.assert_allclose(got, [[1.5 * np.log(2), 0.0]], atol=1e-6)
