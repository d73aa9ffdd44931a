"""Grouped-query attention and its gradients in float64 numpy, written from the definition."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

EMPTY = -1e30

# A kernel in interpret mode is one big program, and compiling it is what takes the time.
QUICK = {"xla_backend_optimization_level": 0}


def quick(function):
    """`jax.jit` for a kernel in interpret mode."""
    return jax.jit(function, compiler_options=QUICK)


# A TPU's memories, copies and cores, simulated: what was never written is NaN, a copy happens when
# somebody waits for it, and parallel dimensions of the grid are split over two cores.
SIMULATED = pltpu.InterpretParams(dma_execution_mode="on_wait", num_cores_or_threads=2)


def visible(
    queries, keys, q_segment_ids=None, kv_segment_ids=None, causal=True, window=None, q_offset=0
):
    """Boolean [B, T, S]; B is 1 without segment ids."""
    distance = np.arange(queries)[:, None] + q_offset - np.arange(keys)
    seen = np.ones((1, queries, keys), bool)
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    if q_segment_ids is not None:
        q_ids, kv_ids = np.asarray(q_segment_ids), np.asarray(kv_segment_ids)
        seen = seen & (q_ids[:, :, None] == kv_ids[:, None])
    return seen


def attention(q, k, v, dout, **mask):
    """out, log-sum-exp, dq, dk, dv; a query that sees nothing gives 0, EMPTY and no gradient."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    per_head = [np.repeat(x, heads // kv_heads, axis=2) for x in (k, v)]
    seen = visible(queries, keys, **mask)[:, None]
    scores = np.einsum("btnh,bsnh->bnts", q, per_head[0]) / np.sqrt(dim)
    scores = np.where(seen, scores, -np.inf)
    highest = np.maximum(scores.max(axis=-1, keepdims=True), EMPTY)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    lse = np.where(total > 0, highest + np.log(np.where(total > 0, total, 1)), EMPTY)[..., 0]
    out = np.einsum("bnts,bsnh->btnh", weights, per_head[1])
    dweights = np.einsum("btnh,bsnh->bnts", dout, per_head[1])
    dscores = weights * (dweights - (dweights * weights).sum(axis=-1, keepdims=True))
    dscores = dscores / np.sqrt(dim)
    dq = np.einsum("bnts,bsnh->btnh", dscores, per_head[0])
    of_group = (batch, keys, kv_heads, heads // kv_heads, dim)
    dk = np.einsum("bnts,btnh->bsnh", dscores, q).reshape(of_group).sum(axis=3)
    dv = np.einsum("bnts,btnh->bsnh", weights, dout).reshape(of_group).sum(axis=3)
    return out, lse, dq, dk, dv


def assert_close(got, want, dtype="float32", names=("out", "lse", "dq", "dk", "dv")):
    """Arrays against the oracle's, with an error relative to the largest value of each array."""
    tolerance = {"float32": 3e-6, "bfloat16": 2e-2}[str(np.dtype(dtype))]
    for name, a, b in zip(names, got, want, strict=True):
        a = np.asarray(a, np.float64)
        assert a.shape == b.shape, name
        assert np.isfinite(a).all(), name
        scale = max(1.0, np.abs(b[np.abs(b) < -EMPTY / 2]).max(initial=0))
        worst = (
            np.abs(a - b) / np.maximum(scale, np.where(np.abs(b) < -EMPTY / 2, 0, np.abs(b)))
        ).max()
        assert worst <= tolerance, f"{name}: off by {worst:.2e} of {scale:.3g}"
