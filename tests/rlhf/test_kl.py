import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.rlhf.kl import adapted, k1, k2, k3


def test_numbers_of_a_peer_framework():
    """tunix's compute_kl_divergence on the same input gives these."""
    policy, reference = jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0])
    np.testing.assert_allclose(k1(policy, reference), [0.5, -1.0])
    np.testing.assert_allclose(k2(policy, reference), [0.125, 0.5])
    np.testing.assert_allclose(k3(policy, reference), [0.10653, 0.71828], rtol=1e-4)


def test_k1_and_k3_are_unbiased_over_the_policy():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(50)), rng.dirichlet(np.ones(50))
    exact = (p * np.log(p / q)).sum()
    for estimator in (k1, k3):
        mean = (p * np.asarray(estimator(jnp.log(p), jnp.log(q)), np.float64)).sum()
        np.testing.assert_allclose(mean, exact, rtol=1e-4)


def test_k3_keeps_the_digits_of_a_small_difference_and_survives_a_large_one():
    difference = jnp.array([1e-2, -1e-2, -200.0])
    values = k3(difference, jnp.zeros(3))
    np.testing.assert_allclose(values[:2], [4.98337e-5, 5.01671e-5], rtol=1e-3)
    assert np.isfinite(values).all() and (values >= 0).all()


def test_results_are_float32():
    for estimator in (k1, k2, k3):
        assert estimator(jnp.zeros(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32


def test_the_coefficient_is_steered_to_the_target():
    """Ziegler et al. 2019: proportional, clipped at a fifth, by the share of the horizon."""
    for measured, factor in ((6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98)):
        got = adapted(jnp.float32(0.2), measured, target=6.0, horizon=1000.0, count=100)
        assert float(got) == pytest.approx(0.2 * factor, rel=1e-6)
