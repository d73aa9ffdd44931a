from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.infer import sampling
from internlm2_jax.infer.sampling import Sampling

DRAWS = 20_000


@pytest.fixture(scope="module")
def row() -> np.ndarray:
    return np.random.default_rng(0).normal(size=300) * 2  # not a multiple of the block


def frequencies(row: np.ndarray, **settings) -> np.ndarray:
    uniform = (jnp.arange(DRAWS) + 0.5) / DRAWS  # every quantile once: no sampling noise
    settings = {"temperature": 1.0, "top_p": None, "top_k": 0} | settings
    tokens = jax.jit(sampling.choose, static_argnums=4)(
        jnp.broadcast_to(jnp.asarray(row, jnp.float32), (DRAWS, len(row))),
        uniform,
        settings["temperature"],
        settings["top_p"],
        settings["top_k"],
    )
    return np.bincount(tokens, minlength=len(row)) / DRAWS


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(row, temperature):
    got = frequencies(row, temperature=temperature)
    np.testing.assert_allclose(got, softmax(row / temperature), atol=2 / DRAWS)


def test_top_k(row):
    kept = row >= np.sort(row)[-7]
    expected = np.where(kept, softmax(row), 0)
    np.testing.assert_allclose(frequencies(row, top_k=7), expected / expected.sum(), atol=2 / DRAWS)
    np.testing.assert_allclose(frequencies(row, top_k=999), softmax(row), atol=2 / DRAWS)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9])
def test_top_p_keeps_the_shortest_prefix(row, top_p):
    probabilities = softmax(row / 0.8)
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    expected = np.zeros_like(probabilities)
    expected[order[:count]] = probabilities[order[:count]]
    got = frequencies(row, temperature=0.8, top_p=top_p)
    np.testing.assert_allclose(got, expected / expected.sum(), atol=2 / DRAWS)


def test_edges_of_the_uniform():
    """0 takes the first token of any weight, the number below 1 the last; never an excluded one."""
    logits = jnp.full((2, 300), -jnp.inf).at[:, jnp.asarray([5, 130, 290])].set(0.0)
    uniform = jnp.asarray([0.0, np.nextafter(np.float32(1), np.float32(0))])
    assert sampling.choose(logits, uniform, jnp.float32(1), None, 0).tolist() == [5, 290]


def test_row_keys_depend_on_seed_and_row_only():
    keys = sampling.row_keys(jnp.uint32(3), jnp.arange(4))
    one = sampling.row_keys(jnp.uint32(3), jnp.asarray([2]))
    a, b = (sampling.uniforms(k, jnp.int32(7)) for k in (keys, one))
    assert a[2] == b[0]
    assert len(set(a.tolist())) == 4
    assert sampling.uniforms(one, jnp.int32(8))[0] != b[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
