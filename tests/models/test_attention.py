"""Every attention implementation against a float64 loop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.kernels import attention


def oracle(q, k, v, segment_ids):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        see = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
        scores = k[b, see, n // group] @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, see, n // group]
    return out


@pytest.mark.parametrize("impl", [*attention.IMPLEMENTATIONS, "auto"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_matches_the_oracle(impl, heads, kv_heads, monkeypatch):
    monkeypatch.setattr(attention, "MIN_BLOCK", 8)  # several blocks, the last one short
    keys = jax.random.split(jax.random.key(heads), 3)
    q = jax.random.normal(keys[0], (2, 19, heads, 8))
    k, v = (jax.random.normal(key, (2, 19, kv_heads, 8)) for key in keys[1:])
    segments = np.stack([np.repeat([1, 2, 0], [7, 9, 3]), np.ones(19, int)])
    run = jax.jit(functools.partial(attention.dispatch, impl=impl))
    got = run(q, k, v, segment_ids=jnp.asarray(segments))
    np.testing.assert_allclose(got, oracle(q, k, v, segments), atol=2e-6)
    unsegmented = run(q, k, v)
    np.testing.assert_allclose(unsegmented[1], got[1], atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blockwise_gradients(dtype, monkeypatch):
    monkeypatch.setattr(attention, "MIN_BLOCK", 8)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, 21, 4, 8), (2, 21, 2, 8), (2, 21, 2, 8), (2, 21, 4, 8)]
    q, k, v, out = (jax.random.normal(a, s, dtype) for a, s in zip(keys, shapes, strict=True))
    results = []
    for implementation in (attention.reference, attention.blockwise):

        @jax.jit
        def run(q, k, v, out, implementation=implementation):
            value, pull = jax.vjp(implementation, q, k, v)
            return value, *pull(out)

        results.append(run(q, k, v, out))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance, rtol=tolerance
        )


def test_large_scores_stay_finite():
    q = jnp.full((1, 4, 2, 8), 1e4)
    out = attention.reference(q, q[:, :, :1], jnp.ones((1, 4, 1, 8)))
    np.testing.assert_allclose(out, 1.0)


def test_unknown_implementation():
    x = jnp.zeros((1, 2, 1, 2))
    with pytest.raises(UserError, match=r"'flash'.*auto, reference, blockwise"):
        attention.dispatch(x, x, x, impl="flash")
