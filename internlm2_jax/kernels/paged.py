"""A paged cache of keys and values in plain JAX: writing to it, and attention over it in blocks.

Pages of all layers are `[L, P, K, page, H]`; a row's table lists its pages in order. int8 pages
have a float32 scale per position and head. decode_gqa.py has the TPU's kernel over the same layout,
the definition, and the choice between them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from internlm2_jax.kernels.attention import platform

BLOCK = 256  # keys of a block: enough to pay for the turn of the loop, few enough to stay in cache
QUERIES = 256  # of a block, which skips the keys after its last query
EMPTY = -1e30  # finite, so that differences are no NaN


def storage(dtype: Any) -> np.dtype:
    """The type in which pages hold `dtype` on the platform in use.

    XLA:CPU writes to an array of bfloat16 by way of float32, all of it: there the bits are kept as
    uint16.
    """
    dtype = jnp.dtype(dtype)
    bits = dtype == jnp.bfloat16 and platform(jnp.zeros(())) == "cpu"
    return jnp.dtype(jnp.uint16) if bits else dtype


def loaded(stored: Array) -> Array:
    """The numbers that pages hold."""
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored


def append(
    pages: Num[Array, "L P K page H"],
    scales: Float[Array, "L P K page"] | None,
    new: Float[Array, "B T K H"],
    layer: Int[Array, ""],
    table: Int[Array, "B n"],
    used: Int[Array, " B"],
    counts: Int[Array, " B"],
) -> tuple[Num[Array, "L P K page H"], Float[Array, "L P K page"] | None]:
    """Writes new[b, :counts[b]] at positions used[b], used[b] + 1, ... of row b in `layer`.

    What lies at or after `counts` is written nowhere.
    """
    _, total, heads, page, _ = pages.shape
    step = jnp.arange(new.shape[1])
    position = used[:, None] + step
    place = jnp.minimum(position // page, table.shape[1] - 1)
    # An index past the last page is dropped.
    which = jnp.where(
        step < counts[:, None], jnp.take_along_axis(table, place, axis=1), jnp.int32(total)
    )
    new, within = new.swapaxes(1, 2), position % page
    if which.size * heads == 1:
        # XLA makes a slice's update of a single index, and before it copies the pages.
        new = jnp.concatenate([new, new], axis=2)
        which = jnp.concatenate([which, jnp.full_like(which, total)], axis=1)
        within = jnp.concatenate([within, within], axis=1)
    at = (*_of_heads(layer, which, heads), within[:, None])

    def write(pages: Array, new: Array) -> Array:
        if pages.dtype == jnp.uint16:
            new = jax.lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16)
        return pages.at[at].set(new.astype(pages.dtype), mode="drop")

    if scales is not None:
        new, scale = quantise(new)
        scales = write(scales, scale)
    return write(pages, new), scales


def _of_heads(layer: Int[Array, ""], pages: Int[Array, "B n"], heads: int) -> tuple[Array, ...]:
    """Index [B, K, n] of all heads of these pages of a layer.

    Pages stay in the shape they have, and nothing is transposed on its way in or out: where either
    is not so, XLA:CPU may prefer another layout inside a loop and copy all pages into it.
    """
    return layer, pages[:, None], jnp.arange(heads)[:, None]


def quantise(x: Float[Array, "... H"]) -> tuple[Num[Array, "... H"], Float[Array, ...]]:
    """int8 values and the float32 scale of each vector: x is about values * scale."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), 1e-12) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def blockwise(
    q: Float[Array, "B T N H"],
    k_pages: Num[Array, "L P K page H"],
    v_pages: Num[Array, "L P K page H"],
    layer: Int[Array, ""],
    page_table: Int[Array, "B n"],
    lengths: Int[Array, " B"],
    *,
    k_scales: Float[Array, "L P K page"] | None = None,
    v_scales: Float[Array, "L P K page"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """As `decode_gqa.reference` over the pages of `layer`, a block of pages at a time.

    A running softmax goes over the pages of a block of queries, from the first that one of them
    sees to the longest row's last, so time follows what is in the cache, memory does not, and one
    program serves every length. A block past a row's end leaves the row's sums bit for bit as they
    are: how long the other rows are changes nothing.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, page = k_pages.shape[2:4]
    per = max(1, min(page_table.shape[1], BLOCK // page))
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % per)))
    cache = _Cache(k_pages, v_pages, k_scales, v_scales, layer, table, per)
    # [B, K, G, T, H]
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    if queries <= QUERIES:
        out = _attend(grouped, cache, lengths, window)
    else:
        padding = -queries % QUERIES
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
        parts = grouped.reshape(*grouped.shape[:3], -1, QUERIES, dim)
        ends = lengths - queries + QUERIES * jnp.arange(1, parts.shape[3] + 1)[:, None]
        out = jax.lax.map(
            lambda part: _attend(part[0], cache, part[1], window), (jnp.moveaxis(parts, 3, 0), ends)
        )
        out = jnp.moveaxis(out, 0, 3).reshape(grouped.shape)[..., :queries, :]
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


class _Cache(NamedTuple):
    """Pages of one layer, `per` of them a block."""

    k_pages: Array
    v_pages: Array
    k_scales: Array | None
    v_scales: Array | None
    layer: Array
    table: Array
    per: int

    @property
    def size(self) -> int:
        """Keys of a block."""
        return self.per * self.k_pages.shape[3]

    @property
    def blocks(self) -> int:
        return self.table.shape[1] // self.per

    def block(self, pages: Array, i: Array) -> Array:
        """[B, K, size, ...] of one of the arrays."""
        ids = jax.lax.dynamic_slice_in_dim(self.table, i * self.per, self.per, axis=1)
        found = loaded(pages[_of_heads(self.layer, ids, pages.shape[2])])
        return found.reshape(*found.shape[:2], self.size, *found.shape[4:])


def _attend(
    q: Float[Array, "B K G T H"], cache: _Cache, lengths: Int[Array, " B"], window: int | None
) -> Float[Array, "B K G T H"]:
    """Queries of positions lengths - T .. lengths - 1; some of them may lie before the first."""
    queries, dim = q.shape[3:]
    position = lengths[:, None] - queries + jnp.arange(queries)
    scale = 1 / math.sqrt(dim)

    def products(i: Array) -> tuple[Array, Array]:
        """Scores [B, K, G, T, size] before scaling, and values, of all keys of a block."""
        scores = jnp.einsum(
            "bkgth,bksh->bkgts",
            q,
            cache.block(cache.k_pages, i).astype(q.dtype),
            preferred_element_type=jnp.float32,
        )
        if cache.k_scales is not None:
            scores = scores * cache.block(cache.k_scales, i)[:, :, None, None]
        values = cache.block(cache.v_pages, i).astype(q.dtype)
        if cache.v_scales is not None:
            values = (values * cache.block(cache.v_scales, i)[..., None]).astype(q.dtype)
        return scores, values

    def masked(i: Array) -> tuple[Array, Array, Array]:
        """The same where queries see some keys only, and what is seen [B, 1, 1, T, size]."""
        scores, values = products(i)
        at = i * cache.size + jnp.arange(cache.size)
        seen = at <= position[..., None]
        if window is not None:
            seen &= at > position[..., None] - window
        # What a page held before may be NaN, which no zero weight mends.
        values = jnp.where(seen.any(axis=1)[:, None, :, None], values, 0)
        seen = seen[:, None, None]
        return jnp.where(seen, scores, EMPTY), values, seen

    def add(
        carry: tuple[Array, Array, Array], scores: Array, values: Array
    ) -> tuple[Array, Array, Array]:
        # As long as a query has seen nothing, its sums are of no meaning; they fade with the
        # first key that it sees.
        highest, total, acc = carry
        higher = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.exp((scores - higher[..., None]) * scale)
        faded = jnp.exp((highest - higher) * scale)
        new = jnp.einsum(
            "bkgts,bksh->bkgth",
            weights.astype(q.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return higher, total * faded + weights.sum(axis=-1), acc * faded[..., None] + new

    if cache.blocks == 1:
        # In the order of the trainer's attention, so that bfloat16 rounds alike.
        scores, values, seen = masked(jnp.int32(0))
        weights = jnp.where(seen, jax.nn.softmax(scores * scale, axis=-1), 0.0).astype(q.dtype)
        return jnp.einsum("bkgts,bksh->bkgth", weights, values)
    shape = q.shape[:-1]
    sums = (jnp.full(shape, EMPTY), jnp.zeros(shape), jnp.zeros(q.shape))
    if window is None:  # blocks that every query of every row sees whole need no mask
        first = jnp.maximum(lengths.min() - queries + 1, 0) // cache.size
        sums = jax.lax.fori_loop(0, first, lambda i, sums: add(sums, *products(i)), sums)
    else:
        first = jnp.maximum(lengths.min() - queries - window + 1, 0) // cache.size
    last = jnp.minimum((lengths.max() + cache.size - 1) // cache.size, cache.blocks)
    sums = jax.lax.fori_loop(first, last, lambda i, sums: add(sums, *masked(i)[:2]), sums)
    _, total, acc = sums
    return acc / jnp.where(total > 0, total, 1)[..., None]
