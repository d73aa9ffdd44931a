"""Attention over one part of the keys, and its gradient, in plain JAX.

Twins of `flash_gqa.attend` and `flash_gqa.attend_backward` for platforms without that kernel, and
what it is tested against. Softmax over a set of keys cut into parts needs one number more than the
output of each part, the log-sum-exp of its scores (FlashAttention, arXiv 2205.14135, section 3.1):

    lse = log sum_p exp(lse_p),    out = sum_p exp(lse_p - lse) out_p

and given the log-sum-exp over all parts, the gradient of a part needs no other part.

A block of queries at a time meets all keys of the part, so memory is linear in both lengths.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

EMPTY = -1e30  # log-sum-exp of a query that sees nothing; finite, so that differences are no NaN
BLOCK = 128


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    causal: bool = True,
    window: int | None = None,
    q_offset: int = 0,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention over one set of keys, with the log-sum-exp that combines it with other sets.

    Args:
      causal: query t sees keys up to t + q_offset.
      window: query t sees keys after t + q_offset - window.
      q_offset: position of q[:, 0] relative to k[:, 0]; may be negative.

    Returns:
      The output in q's type and ln(sum(exp(scores))) in float32, `EMPTY` where nothing is seen.
    """
    groups = q.shape[2] // k.shape[2]
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def block(args):
        q, positions, ids = args
        mask = _mask(positions, k.shape[1], ids, kv_segment_ids, causal, window)
        scores = _scores(_grouped(q, groups), keys, mask)
        lse = jax.nn.logsumexp(scores, axis=-1)
        lse = jnp.where(mask.any(-1)[:, None, None], lse, EMPTY)
        weights = jnp.where(mask[:, None, None], jnp.exp(scores - lse[..., None]), 0.0)
        out = jnp.einsum(
            "bkgts,bksh->bkgth",
            weights.astype(v.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return _ungrouped(out).astype(q.dtype), lse.reshape(lse.shape[0], -1, lse.shape[-1])

    length = q.shape[1]
    positions = jnp.arange(length)[None] + q_offset
    out, lse = jax.lax.map(block, _cut(length, q, positions, q_segment_ids))
    return _join(out, length), _join(lse.swapaxes(2, 3), length).swapaxes(1, 2)


def attend_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    dout: Float[Array, "B T N H"],
    *,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    causal: bool = True,
    window: int | None = None,
    q_offset: int = 0,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients with respect to q, k and v, in float32, of one set of keys.

    Args:
      out, lse: output and log-sum-exp over *all* keys that the queries saw; `k` and `v` may be a
        part of them. The sum of the results over all parts is the whole gradient of q.
      dout: gradient with respect to `out`.
    """
    groups = q.shape[2] // k.shape[2]
    scale = 1 / math.sqrt(q.shape[3])
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    delta = jnp.einsum("btnh,btnh->btn", out, dout, preferred_element_type=jnp.float32)

    def product(spec, a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    def block(carry, args):
        dk, dv = carry
        q, dout, lse, delta, positions, ids = args
        mask = _mask(positions, k.shape[1], ids, kv_segment_ids, causal, window)
        q, dout = _grouped(q, groups), _grouped(dout.astype(q.dtype), groups)
        lse, delta = (_grouped(x[..., None], groups) for x in (lse, delta))
        weights = jnp.where(mask[:, None, None], jnp.exp(_scores(q, keys, mask) - lse), 0.0)
        gradient = weights * (product("bkgth,bksh->bkgts", dout, values) - delta) * scale
        weights, gradient = weights.astype(q.dtype), gradient.astype(q.dtype)
        dv = dv + product("bkgts,bkgth->bskh", weights, dout)
        dk = dk + product("bkgts,bkgth->bskh", gradient, q)
        return (dk, dv), _ungrouped(product("bkgts,bksh->bkgth", gradient, keys))

    length = q.shape[1]
    positions = jnp.arange(length)[None] + q_offset
    rows = (q, dout, lse.swapaxes(1, 2), delta, positions, q_segment_ids)
    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(block, (zeros, zeros), _cut(length, *rows))
    return _join(dq, length), dk, dv


def _mask(
    positions: Int[Array, "1 T"],
    keys: int,
    q_ids: Int[Array, "B T"] | None,
    kv_ids: Int[Array, "B S"] | None,
    causal: bool,
    window: int | None,
) -> Bool[Array, "#B T S"]:
    distance = positions[:, :, None] - jnp.arange(keys)
    mask = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is not None:
        mask = mask & (distance < window)
    if q_ids is not None and kv_ids is not None:
        mask = mask & (q_ids[:, :, None] == kv_ids[:, None, :])
    return mask


def _scores(q: Float[Array, "B K G T H"], keys: Float[Array, "B K S H"], mask: Array) -> Array:
    scores = jnp.einsum("bkgth,bksh->bkgts", q, keys, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None], scores / math.sqrt(q.shape[-1]), EMPTY)


def _grouped(x: Float[Array, "B T N H"], groups: int) -> Float[Array, "B K G T H"]:
    return x.reshape(*x.shape[:2], -1, groups, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _ungrouped(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    return x.transpose(0, 3, 1, 2, 4).reshape(x.shape[0], x.shape[3], -1, x.shape[4])


def _cut(length: int, *arrays: Array | None) -> tuple[Array | None, ...]:
    """Arrays [B, T, ...] as blocks [n, B, BLOCK, ...]; the last one is filled with zeros."""
    size = min(BLOCK, length)
    blocks = -(-length // size)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, blocks * size - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    return tuple(None if x is None else cut(x) for x in arrays)


def _join(x: Array, length: int) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
