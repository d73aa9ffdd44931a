from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.infer import sampling
from internlm2_jax.infer.sampling import Rows, Sampling

DRAWS = 5_000


@pytest.fixture(scope="module")
def row() -> np.ndarray:
    return np.random.default_rng(0).normal(size=300) * 2  # not a multiple of the block


def rows_of(count: int, vocab: int, *, seen=None, mask=None, **settings) -> Rows:
    """`count` rows of one Sampling."""
    return Rows.of(
        [Sampling(**settings)] * count,
        [0] * count,
        list(range(count)),
        np.zeros((count, vocab), bool) if seen is None else np.tile(seen, (count, 1)),
        np.full((count, sampling.words(vocab)), -1, np.int32)
        if mask is None
        else np.tile(mask, (count, 1)),
    )


@jax.jit
def drawn(logits, uniform, rows):
    return sampling.choose(sampling.truncated(logits, rows), uniform, rows.temperature == 0)


def frequencies(row: np.ndarray, **settings) -> np.ndarray:
    uniform = (jnp.arange(DRAWS) + 0.5) / DRAWS  # every quantile once: no sampling noise
    many = jnp.broadcast_to(jnp.asarray(row, jnp.float32), (DRAWS, len(row)))
    tokens = drawn(many, uniform, rows_of(DRAWS, len(row), **settings))
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


@pytest.mark.parametrize("min_p", [0.02, 0.5, 1.0])
def test_min_p(row, min_p):
    probabilities = softmax(row / 1.5)
    expected = np.where(probabilities >= min_p * probabilities.max() * 0.999999, probabilities, 0)
    got = frequencies(row, temperature=1.5, min_p=min_p)
    np.testing.assert_allclose(got, expected / expected.sum(), atol=2 / DRAWS)


def test_repetition_penalty(row):
    seen = np.arange(300) % 3 == 0
    expected = np.where(seen, np.where(row > 0, row / 1.7, row * 1.7), row)
    got = frequencies(row, seen=seen, repetition_penalty=1.7)
    np.testing.assert_allclose(got, softmax(expected), atol=2 / DRAWS)


def test_masks_allow_and_forbid(row):
    allowed = np.random.default_rng(1).random(300) < 0.3
    bits = np.packbits(np.pad(allowed, (0, 20)), bitorder="little").view(np.int32)
    expected = np.where(allowed, softmax(row), 0)
    got = frequencies(row, mask=bits)
    np.testing.assert_allclose(got, expected / expected.sum(), atol=2 / DRAWS)


def test_rows_of_all_kinds_share_a_batch(row):
    """A row's token and probabilities are the same whatever the other rows ask for."""
    kinds = [
        Sampling(0.0),
        Sampling(0.7),
        Sampling(1.0, top_k=5),
        Sampling(1.3, top_p=0.8),
        Sampling(0.9, min_p=0.1),
        Sampling(1.0, repetition_penalty=1.3),
    ]
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(6, 300)) * 2, jnp.float32)
    uniform = jnp.linspace(0.1, 0.9, 6)
    seen = np.tile(np.arange(300) % 2 == 0, (6, 1))
    mask = np.full((6, sampling.words(300)), -1, np.int32)
    truncate = jax.jit(sampling.truncated)
    mixed = Rows.of(kinds, [0] * 6, [0] * 6, seen, mask)
    together = np.asarray(truncate(logits, mixed))
    for i, kind in enumerate(kinds):
        alike = Rows.of([kind] * 6, [0] * 6, [0] * 6, seen, mask)
        np.testing.assert_array_equal(truncate(logits, alike)[i], together[i])
        assert drawn(logits, uniform, alike)[i] == drawn(logits, uniform, mixed)[i]
    assert drawn(logits, uniform, mixed)[0] == logits[0].argmax()


def test_the_smallest_temperature_is_greedy(row):
    assert frequencies(row, temperature=1e-6)[row.argmax()] == 1


def test_edges_of_the_uniform():
    """0 takes the first token of any weight, the number below 1 the last; never an excluded one."""
    logits = jnp.full((2, 300), -jnp.inf).at[:, jnp.asarray([5, 130, 290])].set(0.0)
    uniform = jnp.asarray([0.0, np.nextafter(np.float32(1), np.float32(0))])
    assert sampling.choose(logits, uniform, jnp.zeros(2, bool)).tolist() == [5, 290]


def test_row_keys_depend_on_seed_and_row_only():
    three = jnp.full(4, 3, jnp.uint32)
    keys = sampling.row_keys(three, jnp.arange(4, dtype=jnp.uint32))
    one = sampling.row_keys(three[:1], jnp.asarray([2], jnp.uint32))
    a, b = sampling.uniforms(keys, jnp.full(4, 7)), sampling.uniforms(one, jnp.full(1, 7))
    assert a[2] == b[0]
    assert len(set(a.tolist())) == 4
    assert sampling.uniforms(one, jnp.full(1, 8))[0] != b[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
