import jax
import jax.numpy as jnp
import numpy as np

from internlm2_jax.rlhf.advantage import gae, whiten


def oracle(rewards, values, gamma, lam):
    """The textbook double sum, for one row without padding: sum_l (gamma lam)^l delta_{t+l}."""
    n = len(rewards)
    following = np.append(values[1:], 0.0)
    deltas = rewards + gamma * following - values
    advantages = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
    return np.array(advantages), np.array(advantages) + values


def test_numbers_of_a_peer_framework():
    """tunix's compute_gae_advantages on the same input gives these returns."""
    rewards = jnp.array([[0.0, 0.0, 1.0], [0.0, 0.5, 0.0]])
    values = jnp.array([[0.1, 0.2, 0.3], [0.4, 0.1, 0.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(returns, [[0.92675, 0.965, 1.0], [0.48, 0.5, 0.0]], rtol=1e-6)


def test_rows_of_every_length_match_the_double_sum():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(6, 7)), rng.normal(size=(6, 7))
    lengths = np.array([7, 5, 3, 2, 1, 0])
    mask = np.arange(7) < lengths[:, None]
    advantages, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=0.97, lam=0.9)
    for row, n in enumerate(lengths):
        expected = oracle(rewards[row, :n], values[row, :n], 0.97, 0.9)
        np.testing.assert_allclose(advantages[row, :n], expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(returns[row, :n], expected[1], rtol=1e-4, atol=1e-5)
        assert (advantages[row, n:] == 0).all() and (returns[row, n:] == 0).all()


def test_gaps_and_left_padding_are_stepped_over():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=4), rng.normal(size=4)
    places = [1, 2, 5, 7]
    wide = np.full((2, 1, 9), 1e6)  # whatever lies off the mask must not matter
    wide[0, 0, places], wide[1, 0, places] = rewards, values
    mask = np.zeros((1, 9), bool)
    mask[0, places] = True
    advantages, _ = gae(jnp.asarray(wide[0]), jnp.asarray(wide[1]), jnp.asarray(mask))
    expected, _ = oracle(rewards, values, 1.0, 0.99)
    np.testing.assert_allclose(np.asarray(advantages)[0, places], expected, rtol=1e-5, atol=1e-6)


def test_limits_of_lambda():
    rewards, values = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0.5, 0.25, 3.0]])
    mask = jnp.ones((1, 3), bool)
    monte_carlo, returns = gae(rewards, values, mask, lam=1.0)
    np.testing.assert_allclose(returns, [[7.0, 6.0, 4.0]])
    np.testing.assert_allclose(monte_carlo, [[6.5, 5.75, 1.0]])
    one_step, _ = gae(rewards, values, mask, lam=0.0)
    np.testing.assert_allclose(one_step, [[0.75, 4.75, 1.0]])


def test_no_gradient_flows_into_the_critic_through_its_targets():
    values = jnp.array([[0.5, 0.25]])
    grad = jax.grad(lambda v: gae(jnp.ones((1, 2)), v, jnp.ones((1, 2), bool))[1].sum())(values)
    assert (grad == 0).all()


def test_whiten_over_the_mask_only():
    values = jnp.array([[1.0, 2.0, 999.0], [3.0, 4.0, -999.0]])
    mask = jnp.array([[True, True, False], [True, True, False]])
    white = whiten(values, mask)
    kept = np.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(
        np.asarray(white)[np.asarray(mask)], (kept - 2.5) / kept.std(), rtol=1e-5
    )
    assert (np.asarray(white)[~np.asarray(mask)] == 0).all()
