"""A paged cache of keys and values in plain JAX: writing to it, and attention over it in blocks.

Pages are `[P, K, page, H]`; a row's table lists its pages in order. int8 pages have a float32 scale
per position and head. decode_gqa.py has the TPU's kernel over the same layout, the definition, and
the choice between them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

BLOCK = 256  # keys of a block: enough to pay for the turn of the loop, few enough to stay in cache
EMPTY = -1e30  # finite, so that differences are no NaN


def append(
    pages: Num[Array, "P K page H"],
    scales: Float[Array, "P K page"] | None,
    new: Float[Array, "B T K H"],
    table: Int[Array, "B n"],
    used: Int[Array, " B"],
    counts: Int[Array, " B"],
) -> tuple[Num[Array, "P K page H"], Float[Array, "P K page"] | None]:
    """Writes new[b, :counts[b]] at positions used[b], used[b] + 1, ... of row b.

    What lies at or after `counts` is written nowhere.
    """
    total, _, page, _ = pages.shape
    step = jnp.arange(new.shape[1])
    position = used[:, None] + step
    place = jnp.minimum(position // page, table.shape[1] - 1)
    # An index past the last page is dropped.
    which = jnp.where(
        step < counts[:, None], jnp.take_along_axis(table, place, axis=1), jnp.int32(total)
    )
    within = position % page
    if scales is not None:
        new, scale = quantise(new)
        scales = scales.at[which, :, within].set(scale, mode="drop")
    return pages.at[which, :, within].set(new.astype(pages.dtype), mode="drop"), scales


def quantise(x: Float[Array, "... H"]) -> tuple[Num[Array, "... H"], Float[Array, ...]]:
    """int8 values and the float32 scale of each vector: x is about values * scale."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), 1e-12) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def blockwise(
    q: Float[Array, "B T N H"],
    k_pages: Num[Array, "P K page H"],
    v_pages: Num[Array, "P K page H"],
    page_table: Int[Array, "B n"],
    lengths: Int[Array, " B"],
    *,
    k_scales: Float[Array, "P K page"] | None = None,
    v_scales: Float[Array, "P K page"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """As `decode_gqa.reference`, a block of pages at a time with a running softmax.

    The loop ends at the longest row's last block, so time follows what is in the cache, memory
    does not, and one program serves every length. A block past a row's end leaves the row's sums
    bit for bit as they are: how long the other rows are changes nothing.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, page = k_pages.shape[1:3]
    per = max(1, min(page_table.shape[1], BLOCK // page))
    size, most = per * page, -(-page_table.shape[1] // per)
    table = jnp.pad(page_table, ((0, 0), (0, most * per - page_table.shape[1])))
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    position = lengths[:, None] - queries + jnp.arange(queries)

    def block(i: Array) -> tuple[Array, Array, Array]:
        """Masked scores [B, K, G, T, size], what is seen [B, 1, 1, T, size], values."""
        ids = jax.lax.dynamic_slice_in_dim(table, i * per, per, axis=1)
        scores = jnp.einsum(
            "bkgth,bksh->bkgts",
            grouped,
            gather(k_pages, ids).astype(q.dtype),
            preferred_element_type=jnp.float32,
        ) / math.sqrt(dim)
        if k_scales is not None:
            scores = scores * gather(k_scales, ids)[:, :, None, None]
        at = i * size + jnp.arange(size)
        seen = at <= position[..., None]
        if window is not None:
            seen &= at > position[..., None] - window
        values = gather(v_pages, ids).astype(q.dtype)
        if v_scales is not None:
            values = (values * gather(v_scales, ids)[..., None]).astype(q.dtype)
        # What a page held before may be NaN, which no zero weight mends.
        values = jnp.where(seen.any(axis=1)[:, None, :, None], values, 0)
        seen = seen[:, None, None]
        return jnp.where(seen, scores, EMPTY), seen, values

    def gather(pages: Array, ids: Array) -> Array:  # [B, K, size, ...]
        pages = pages[ids].swapaxes(1, 2)
        return pages.reshape(batch, kv_heads, size, *pages.shape[4:])

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, acc = carry
        scores, seen, values = block(i)
        higher = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        faded = jnp.exp(highest - higher)
        new = jnp.einsum(
            "bkgts,bksh->bkgth",
            weights.astype(q.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return higher, total * faded + weights.sum(axis=-1), acc * faded[..., None] + new

    if most == 1:
        # In the order of the trainer's attention, so that bfloat16 rounds alike.
        scores, seen, values = block(jnp.int32(0))
        weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0).astype(q.dtype)
        out = jnp.einsum("bkgts,bksh->bkgth", weights, values)
    else:
        shape = grouped.shape[:-1]
        start = (jnp.full(shape, EMPTY), jnp.zeros(shape), jnp.zeros(grouped.shape))
        first = jnp.int32(0)
        if window is not None:
            first = jnp.maximum(lengths.min() - queries - window + 1, 0) // size
        last = jnp.minimum((lengths.max() + size - 1) // size, most)
        _, total, acc = jax.lax.fori_loop(first, last, body, start)
        out = acc / jnp.where(total > 0, total, 1)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
