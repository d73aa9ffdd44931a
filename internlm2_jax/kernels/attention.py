"""Causal grouped-query attention.

`reference` is the definition. Query head n reads key/value head n // G: queries are viewed as
[K, G] and keys and values are never repeated. Scores and softmax are float32.

`blockwise` computes the same in blocks of queries, each against the keys up to its own end: half
the work of the full square, memory linear in the length (every block is recomputed in the backward
pass), and blocks that stay in a CPU's cache. On two CPU cores, forward and backward, it takes 1.16
times the reference's time in rows of 128, 0.66 in rows of 512, 0.52 in rows of 1024
(benchmarks/attention.py), so `auto` takes it above 128.

`cached` is attention of new queries over a KV cache, for the engine.
"""

from __future__ import annotations

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax.errors import UserError

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
) -> Float[Array, "B T N H"]:
    """softmax(q k' / sqrt(H)) v over earlier positions of the same segment."""
    mask = _mask(0, q.shape[1], q.shape[1], segment_ids)
    return cached(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)


def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """As `reference`, a block of queries at a time."""
    length = q.shape[1]
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    attend = jax.checkpoint(cached)
    blocks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        mask = _mask(start, end, end, segment_ids)
        blocks.append(attend(q[:, start:end], k[:, :, :end], v[:, :, :end], mask))
    return jnp.concatenate(blocks, axis=1)


def cached(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B T N H"]:
    """Attention of T queries over S slots of keys and values, those that `mask` lets them see."""
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, keys.shape[1], heads // keys.shape[1], dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # as the products want it: a CPU gains a quarter
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores / math.sqrt(dim), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, values)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


IMPLEMENTATIONS = {"reference": reference, "blockwise": blockwise}


def dispatch(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str = "auto",
) -> Float[Array, "B T N H"]:
    """Causal attention within equal segment ids, by the implementation named `impl`.

    Args:
      impl: a name in `IMPLEMENTATIONS`, or "auto": `blockwise` for rows longer than one block,
        `reference` for shorter ones, where there is nothing to leave out.
    """
    name = impl
    if impl == "auto":
        name = "blockwise" if q.shape[1] > MIN_BLOCK else "reference"
    if name not in IMPLEMENTATIONS:
        raise UserError(
            f"no attention implementation {impl!r}; there are auto, {', '.join(IMPLEMENTATIONS)}"
        )
    _log_once(impl, name)
    return IMPLEMENTATIONS[name](q, k, v, segment_ids=segment_ids)


def _mask(
    start: int, end: int, keys: int, segment_ids: Int[Array, "B T"] | None
) -> Bool[Array, "#B T S"]:
    """Which of the first `keys` positions the queries start..end see."""
    mask = (jnp.arange(start, end)[:, None] >= jnp.arange(keys))[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, start:end, None] == segment_ids[:, None, :keys])
    return mask


@functools.cache
def _log_once(asked: str, name: str) -> None:
    logger.info("attention: %s -> %s on %s", asked, name, jax.default_backend())
