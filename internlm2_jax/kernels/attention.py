"""Causal grouped-query attention: its definition, and the choice of an implementation.

`reference` is the definition. Query head n reads key/value head n // G: queries are viewed as
[K, G] and keys and values are never repeated. Scores and softmax are float32.

`blockwise` computes the same in blocks of queries, each against the keys up to its own end: half
the work of the full square, memory linear in the length (the backward pass makes the weights of a
block again from their log-sum-exp), and blocks that stay in a CPU's cache. On two CPU cores,
forward and backward, it takes 0.77 to 0.91 of the reference's time in rows of 128, 0.49 in rows of
512, 0.43 in rows of 1024, so `auto` takes it from 128 on. In rows of 64 it is 0.79 to 0.96, but the
forward pass by itself up to 1.25 (benchmarks/attention.py).

`flash_gqa` is our kernel for TPU (flash_gqa.py); the others are kernels that somebody keeps well
(adapters.py).

The engine's cache has kernels of its own (decode_gqa.py, paged.py).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax.errors import UserError
from internlm2_jax.kernels import adapters
from internlm2_jax.kernels.flash_gqa import flash_gqa

MASKED = -1e30  # finite: a row that may see nothing gives a mean, not NaN
MIN_BLOCK = 128
MAX_BLOCKS = 16  # blocks are unrolled in the program; more of them only lengthen compilation

logger = logging.getLogger(__name__)


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k' / sqrt(H)) v over earlier positions of the same segment."""
    length, kv_heads = q.shape[1], k.shape[2]
    mask = _mask((0, length), (0, length), segment_ids, window)
    scores = _scores(_by_group(q, kv_heads), k.swapaxes(1, 2), mask)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _by_token(_over_keys(weights, v.swapaxes(1, 2)), q.dtype)


def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """As `reference`, a block of queries at a time."""
    return _blockwise(q, k, v, segment_ids, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q, k, v, segment_ids, window):
    return _blockwise_forward(q, k, v, segment_ids, window)[0]


def _blockwise_forward(q, k, v, segment_ids, window):
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    outs, sums = [], []
    for (start, end), (first, _), mask in _blocks(q.shape[1], segment_ids, window):
        rows = _by_group(q[:, start:end], k.shape[2])
        scores = _scores(rows, keys[:, :, first:end], mask)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(axis=-1, keepdims=True)
        out = _over_keys(weights.astype(v.dtype), values[:, :, first:end]) / total
        outs.append(_by_token(out, q.dtype))
        sums.append((jnp.log(total) + peak)[..., 0])
    out = checkpoint_name(jnp.concatenate(outs, axis=1), "attention_out")
    lse = checkpoint_name(jnp.concatenate(sums, axis=-1), "attention_lse")
    return out, (q, k, v, segment_ids, out, lse)


def _blockwise_backward(window, residuals, dout):
    """The weights again from their log-sum-exp (FlashAttention, arXiv 2205.14135, section 3.1)."""
    q, k, v, segment_ids, out, lse = residuals
    kv_heads = k.shape[2]
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    delta = jnp.einsum("btnh,btnh->btn", out, dout, preferred_element_type=jnp.float32)
    delta = _by_group(delta[..., None], kv_heads)
    dq, dk, dv = [], *(jnp.zeros(keys.swapaxes(2, 3).shape, jnp.float32) for _ in range(2))
    for (start, end), (first, _), mask in _blocks(q.shape[1], segment_ids, window):
        seen = (slice(None), slice(None), slice(first, end))
        rows, drows = (_by_group(x[:, start:end], kv_heads) for x in (q, dout))
        weights = jnp.exp(_scores(rows, keys[seen], mask) - lse[..., start:end, None])
        gradient = weights * (_over_width(drows, values[seen]) - delta[..., start:end, :])
        gradient = (gradient / math.sqrt(q.shape[3])).astype(q.dtype)
        dq.append(_by_token(_over_keys(gradient, keys[seen]), q.dtype))
        dk = dk.at[..., first:end].add(_over_queries(rows, gradient))
        dv = dv.at[..., first:end].add(_over_queries(drows, weights.astype(q.dtype)))
    dk, dv = (x.transpose(0, 3, 1, 2).astype(k.dtype) for x in (dk, dv))
    return jnp.concatenate(dq, axis=1), dk, dv, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


# The queries of a group are rows of one matrix, [G T, H] or [G T, S]: no product contracts two
# axes, for which XLA:CPU would transpose the scores first.
def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _over_width(rows: Float[Array, "B K G T H"], keys: Float[Array, "B K S H"]) -> Array:
    shape = (*rows.shape[:-1], keys.shape[2])
    return _product("bkrh,bksh->bkrs", _matrix(rows), keys).reshape(shape)


def _over_keys(weights: Float[Array, "B K G T S"], values: Float[Array, "B K S H"]) -> Array:
    shape = (*weights.shape[:-1], values.shape[3])
    return _product("bkrs,bksh->bkrh", _matrix(weights), values).reshape(shape)


def _over_queries(rows: Float[Array, "B K G T H"], weights: Float[Array, "B K G T S"]) -> Array:
    # The narrow matrix first, [H, S] the result: the other way takes XLA:CPU 1.6 times as long.
    return _product("bkrh,bkrs->bkhs", _matrix(rows), _matrix(weights))


def _matrix(x: Float[Array, "B K G T X"]) -> Float[Array, "B K G*T X"]:
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def _scores(
    rows: Float[Array, "B K G T H"], keys: Float[Array, "B K S H"], mask: Bool[Array, "#B T S"]
) -> Float[Array, "B K G T S"]:
    scores = _over_width(rows, keys) / math.sqrt(rows.shape[-1])
    return jnp.where(mask[:, None, None], scores, MASKED)


def _by_group(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K G T H"]:
    x = x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3])
    return x.transpose(0, 2, 3, 1, 4)


def _by_token(x: Float[Array, "B K G T H"], dtype: Any) -> Float[Array, "B T N H"]:
    batch, _, _, length, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, dim).astype(dtype)


def _blocks(
    length: int, segment_ids: Int[Array, "B T"] | None, window: int | None
) -> Iterator[tuple[tuple[int, int], tuple[int, int], Bool[Array, "#B T S"]]]:
    """(first, end) of a block of queries, of the keys it may see, and which of those each sees."""
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        yield (start, end), (first, end), _mask((start, end), (first, end), segment_ids, window)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A function with the signature of `reference`, and the platforms it runs on (None: all)."""

    function: Callable[..., Array]
    platforms: tuple[str, ...] | None = None


GPU = ("gpu", "cuda", "rocm")

IMPLEMENTATIONS = {
    "reference": Implementation(reference),
    "blockwise": Implementation(blockwise),
    "flash_gqa": Implementation(flash_gqa, ("tpu",)),
    "splash": Implementation(adapters.splash, ("tpu",)),
    "cudnn": Implementation(adapters.cudnn, GPU),
    "mosaic_gpu": Implementation(adapters.mosaic_gpu, GPU),
    "tokamax": Implementation(adapters.tokamax),
}


def dispatch(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    impl: str = "auto",
) -> Float[Array, "B T N H"]:
    """Causal attention within equal segment ids, by the implementation named `impl`.

    Args:
      window: positions a query sees, its own included; None for all earlier ones.
      impl: a name in `IMPLEMENTATIONS`, or "auto" for the choice of `choose`.

    Raises:
      UserError: there is no such implementation, or it cannot do this on this platform.
    """
    if q.shape[2] % k.shape[2]:
        raise UserError(f"{q.shape[2]} query heads do not divide into {k.shape[2]} key/value heads")
    if window is not None and window < 1:
        raise UserError(f"window={window}: a query sees at least its own position; use 1 or more")
    on = platform(q)
    name = choose(q, segment_ids, on) if impl == "auto" else impl
    if name not in IMPLEMENTATIONS:
        raise UserError(
            f"no attention implementation {impl!r}; there are auto, {', '.join(IMPLEMENTATIONS)}"
        )
    chosen = IMPLEMENTATIONS[name]
    if chosen.platforms is not None and on not in chosen.platforms:
        raise UserError(f"attention {name!r} runs on {chosen.platforms[0]}, not on {on}; use auto")
    _log_once(impl, name, on)
    return chosen.function(q, k, v, segment_ids=segment_ids, window=window)


def choose(q: Float[Array, "B T N H"], segment_ids: Int[Array, "B T"] | None, on: str) -> str:
    """The implementation that "auto" means for these arrays on the platform `on`."""
    if on == "tpu":
        return "flash_gqa"
    whole = segment_ids is None and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    if on in GPU and whole and q.dtype in adapters.HALF:
        return "cudnn"
    return "blockwise" if q.shape[1] >= MIN_BLOCK else "reference"


def platform(x: Array) -> str:
    """The platform that a computation with `x` is compiled for: "cpu", "tpu", "gpu" or "cuda".

    The devices of the mesh in use say it, or those of the mesh that `x` is sharded over, so that a
    program for a TPU that is not here gets the TPU's kernel. Without a mesh it is the default one.
    """
    for mesh in (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh):
        if mesh.abstract_device is not None:
            return mesh.abstract_device.platform
    return jax.default_backend()


def _mask(
    queries: tuple[int, int],
    keys: tuple[int, int],
    segment_ids: Int[Array, "B T"] | None,
    window: int | None,
) -> Bool[Array, "#B T S"]:
    """Which of the positions of `keys` (first, end) the queries (first, end) see."""
    distance = jnp.arange(*queries)[:, None] - jnp.arange(*keys)
    mask = (distance >= 0)[None]
    if window is not None:
        mask = mask & (distance < window)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, slice(*queries), None] == segment_ids[:, None, slice(*keys)])
    return mask


@functools.cache
def _log_once(asked: str, name: str, on: str) -> None:
    logger.info("attention: %s -> %s on %s", asked, name, on)
