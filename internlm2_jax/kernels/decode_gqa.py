"""Attention of a few new queries over a paged cache of keys and values: decoding on TPU.

Decoding is bound by the bandwidth of HBM, so the kernel is built around its copies:

- A page holds all key/value heads of its positions, `[K, page, H]`, contiguous; it is read once for
  all G query heads of a group and all T new positions (T > 1 is speculation).
- Only pages that some query of the row can see are read: none beyond the row's length, none before
  its window.
- Work is a flat list of (row, chunk) steps, made from the lengths before the kernel starts. The
  copies of a step start during the step before it, also across rows, so short rows leave no gap.
  There are no steps for the empty rest of the page table.
- Pages may be int8 with a float32 scale per position and head. The scales multiply scores and
  weights, not the keys and values themselves.

A contiguous cache `[B, K, S, H]` is the case of one page a row: `page_table = arange(B)[:, None]`.

`reference` is the same in plain JAX: it gathers the pages and computes the whole square.
`paged.blockwise` goes over the pages in blocks, on any platform and for any number of queries.
`dispatch` chooses.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from internlm2_jax.errors import UserError
from internlm2_jax.kernels.attention import platform
from internlm2_jax.kernels.paged import EMPTY, blockwise, loaded

LANES = 128
LOG2E = math.log2(math.e)
MAX_QUERIES = 16
# Keys of one chunk, with their values, twice (one being read, one in use).
BUFFER_BYTES = 8 * 2**20
# v5p has two cores a chip: each takes half of the heads of every page.
CORES = 2


def reference(
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
    """What `decode_gqa` computes."""
    batch, queries, _, dim = q.shape
    kv_heads = k_pages.shape[1]

    def gather(pages: Array, scales: Array | None) -> Float[Array, "B K S H"]:
        pages = pages[page_table].astype(jnp.float32)  # [B, n, K, page, H]
        if scales is not None:
            pages = pages * scales[page_table][..., None]
        return pages.swapaxes(1, 2).reshape(batch, kv_heads, -1, dim)

    keys, values = gather(k_pages, k_scales), gather(v_pages, v_scales)
    at = jnp.arange(keys.shape[2])
    position = lengths[:, None] - queries + jnp.arange(queries)
    seen = at <= position[..., None]
    if window is not None:
        seen &= at > position[..., None] - window
    grouped = q.reshape(batch, queries, kv_heads, -1, dim)
    scores = jnp.einsum(
        "btkgh,bksh->bktgs", grouped, keys, preferred_element_type=jnp.float32, precision="highest"
    )
    scores = jnp.where(seen[:, None, :, None], scores / math.sqrt(dim), -jnp.inf)
    weights = jnp.exp(scores - jnp.maximum(scores.max(axis=-1, keepdims=True), EMPTY))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    # Memory beyond a row's length holds anything, NaN too.
    values = jnp.where(seen.any(axis=1)[:, None, :, None], values, 0)
    out = jnp.einsum("bktgs,bksh->btkgh", weights, values, precision="highest")
    return out.reshape(q.shape).astype(q.dtype)


def decode_gqa(
    q: Float[Array, "B T N H"],
    k_pages: Num[Array, "P K page H"],
    v_pages: Num[Array, "P K page H"],
    page_table: Int[Array, "B n"],
    lengths: Int[Array, " B"],
    *,
    k_scales: Float[Array, "P K page"] | None = None,
    v_scales: Float[Array, "P K page"] | None = None,
    window: int | None = None,
    chunk: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T N H"]:
    """Causal attention of the last T positions of each row over the row's pages.

    Args:
      q: queries of positions `lengths - T .. lengths - 1`; at most `MAX_QUERIES` of them.
      k_pages, v_pages: the new positions' own keys and values are already in them.
      page_table: pages of each row in order; entries beyond the row's length are not looked at.
      lengths: positions in each row, the T new ones included; a row of length 0 gives zeros.
      k_scales, v_scales: what int8 pages are multiplied with, per position and head.
      window: positions a query sees, its own included; None for all earlier ones.
      chunk: positions per step of the kernel; None for what fits `BUFFER_BYTES`.
      interpret: run the kernel's program op by op on any platform; for tests.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, page = k_pages.shape[1:3]
    groups = heads // kv_heads
    _check(q, k_pages, k_scales, v_scales)
    parts = CORES if kv_heads % CORES == 0 else 1
    part_heads = kv_heads // parts
    capacity = page_table.shape[1] * page
    chunk = chunk or _chunk(part_heads, page, dim, k_pages.dtype.itemsize, capacity)
    if max(chunk, page) % min(chunk, page):
        raise UserError(
            f"chunks of {chunk} positions and pages of {page} do not divide: change one"
        )

    # A block of bfloat16 has a multiple of 16 rows.
    rows = -(-queries * groups // 16) * 16
    grouped = q.reshape(batch, queries, kv_heads, groups, dim).transpose(0, 2, 1, 3, 4)
    grouped = grouped.reshape(batch, kv_heads, queries * groups, dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, rows - queries * groups), (0, 0)))
    lengths = lengths.astype(jnp.int32)
    row, number, total = _steps(lengths, queries, window, chunk, capacity)

    heads_spec = pl.BlockSpec(
        (None, part_heads, rows, dim), lambda part, step, row, *_: (row[step], part, 0, 0)
    )
    memory = pl.BlockSpec(memory_space=pl.ANY)
    buffer = pltpu.VMEM((2, part_heads, chunk, dim), k_pages.dtype)
    scale_buffer = None if k_scales is None else pltpu.VMEM((2, part_heads, chunk), jnp.float32)
    scale_memory = None if k_scales is None else memory
    tokens = batch * capacity
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            queries=queries,
            groups=groups,
            page=page,
            chunk=chunk,
            table_width=page_table.shape[1],
            window=window,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(parts, total),
            in_specs=[heads_spec, memory, memory, scale_memory, scale_memory],
            out_specs=heads_spec,
            scratch_shapes=[
                buffer,
                buffer,
                scale_buffer,
                scale_buffer,
                pltpu.VMEM((part_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((part_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((part_heads, rows, dim), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(
            grouped.shape, q.dtype, manual_axis_type=jax.typeof(q).manual_axis_type
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=4 * BUFFER_BYTES,
        ),
        # As if every row filled its pages: lengths are not known when this is compiled.
        cost_estimate=pl.CostEstimate(
            flops=4 * tokens * kv_heads * rows * dim,
            bytes_accessed=2 * tokens * kv_heads * dim * k_pages.dtype.itemsize,
            transcendentals=tokens * kv_heads * rows,
        ),
        interpret=interpret,
        name="decode_gqa",
    )(
        row,
        number,
        lengths,
        page_table.astype(jnp.int32).reshape(-1),
        grouped,
        k_pages,
        v_pages,
        k_scales,
        v_scales,
    )
    out = out[:, :, : queries * groups].reshape(batch, kv_heads, queries, groups, dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape)


IMPLEMENTATIONS = ("reference", "blockwise", "decode_gqa")


def dispatch(
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
    impl: str = "auto",
) -> Float[Array, "B T N H"]:
    """Attention over the pages of one layer of a cache.

    `decode_gqa` on TPU, `blockwise` elsewhere and for a chunk of a prompt, or as `impl` says.
    """
    on = platform(q)
    name = impl
    if impl == "auto":
        name = "decode_gqa" if on == "tpu" and q.shape[1] <= MAX_QUERIES else "blockwise"
    if name not in IMPLEMENTATIONS:
        raise UserError(
            f"no decoding attention {impl!r}; there are auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if name == "decode_gqa" and on != "tpu":
        raise UserError(f"decoding attention 'decode_gqa' runs on tpu, not on {on}; use auto")
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    if name == "blockwise":
        return blockwise(q, k_pages, v_pages, layer, page_table, lengths, window=window, **scales)

    def joined(x: Array) -> Array:
        """All layers as one row of pages, so that none of them is cut out and copied."""
        return loaded(x.reshape(-1, *x.shape[2:]))

    function = decode_gqa if name == "decode_gqa" else reference
    scales = {name: None if x is None else joined(x) for name, x in scales.items()}
    table = page_table + layer * k_pages.shape[1]
    return function(q, joined(k_pages), joined(v_pages), table, lengths, window=window, **scales)


def _check(q: Array, k_pages: Array, k_scales: Array | None, v_scales: Array | None) -> None:
    queries, heads = q.shape[1:3]
    kv_heads, page = k_pages.shape[1:3]
    if heads % kv_heads:
        raise UserError(f"{heads} query heads do not divide into {kv_heads} key/value heads")
    if queries > MAX_QUERIES:
        raise UserError(
            f"decode_gqa takes up to {MAX_QUERIES} new positions, got {queries}: use flash_gqa"
        )
    quantised = k_pages.dtype == jnp.int8
    if quantised != (k_scales is not None) or quantised != (v_scales is not None):
        raise UserError(f"scales belong to int8 pages and to no others; pages are {k_pages.dtype}")
    least = LANES if quantised else 16
    if page % least:
        raise UserError(
            f"pages of {page} positions: {k_pages.dtype} pages hold a multiple of {least}"
        )


def _chunk(kv_heads: int, page: int, dim: int, itemsize: int, capacity: int) -> int:
    """Positions of a step: a power of two of pages, or a part of one that divides it."""
    most = BUFFER_BYTES // (4 * kv_heads * max(dim, LANES) * itemsize)
    most = min(most, 512, capacity)  # more is wasted on short rows
    if page > most:
        return math.gcd(page, 1 << (most.bit_length() - 1))
    return page << ((most // page).bit_length() - 1)


def _steps(
    lengths: Int[Array, " B"], queries: int, window: int | None, chunk: int, capacity: int
) -> tuple[Int[Array, " S"], Int[Array, " S"], Int[Array, ""]]:
    """Row and chunk of each step, and how many steps there are; a row has at least one."""
    first, last = _visible_chunks(lengths, queries, window, chunk)
    ends = jnp.cumsum(last - first + 1)
    step = jnp.arange(lengths.shape[0] * -(-capacity // chunk))
    row = jnp.searchsorted(ends, step, side="right")
    row = jnp.minimum(row, lengths.shape[0] - 1).astype(jnp.int32)
    number = last[row] - (ends[row] - 1 - step)
    return row, number.astype(jnp.int32), ends[-1].astype(jnp.int32)


def _visible_chunks(length, queries: int, window: int | None, chunk: int):
    """The first and the last chunk that some query of a row sees."""
    # lax.div, not //, which asks for the sign of what is never negative and does not lower.
    first = jax.lax.div(_start(length, queries, window), jnp.int32(chunk))
    return first, jax.lax.div(jnp.maximum(length - 1, 0), jnp.int32(chunk))


def _start(length, queries: int, window: int | None):
    """The first position that some query of a row sees."""
    return 0 * length if window is None else jnp.maximum(length - queries - window + 1, 0)


def _kernel(
    row_ref,
    number_ref,
    lengths_ref,
    table_ref,
    q_ref,  # [K, rows, H], rows ordered by position, then head of the group
    k_pages_ref,  # in HBM
    v_pages_ref,
    k_scales_ref,
    v_scales_ref,
    out_ref,  # [K, rows, H]
    k_ref,  # [2, K, chunk, H]
    v_ref,
    k_scale_ref,  # [2, K, chunk]
    v_scale_ref,
    max_ref,  # [K, rows, LANES], equal in all lanes; in the units of raw scores
    sum_ref,
    acc_ref,  # [K, rows, H]
    arrived_ref,  # a semaphore per slot
    *,
    queries: int,
    groups: int,
    page: int,
    chunk: int,
    table_width: int,
    window: int | None,
) -> None:
    part, step = pl.program_id(0), pl.program_id(1)
    part_heads, rows, dim = q_ref.shape
    slot = jax.lax.rem(step, 2)
    unit = min(page, chunk)
    heads = pl.ds(part * part_heads, part_heads)
    buffers = [(k_pages_ref, k_ref), (v_pages_ref, v_ref)]
    if k_scales_ref is not None:
        buffers += [(k_scales_ref, k_scale_ref), (v_scales_ref, v_scale_ref)]

    def copies(step, slot, act) -> None:
        """Starts or awaits the copies of the pages that a step needs."""
        row, number = row_ref[step], number_ref[step]
        length = lengths_ref[row]
        start = _start(length, queries, window)
        for i in range(chunk // unit):
            at = number * chunk + i * unit

            @pl.when((at < length) & (at + unit > start))
            def _(i=i, at=at):
                source = table_ref[row * table_width + jax.lax.div(at, page)]
                within = pl.ds(pl.multiple_of(jax.lax.rem(at, page), unit), unit)
                for pages, buffer in buffers:
                    act(
                        pltpu.make_async_copy(
                            pages.at[source, heads, within],
                            buffer.at[slot, :, pl.ds(i * unit, unit)],
                            arrived_ref.at[slot],
                        )
                    )

    @pl.when(step == 0)
    def _():
        copies(step, slot, lambda copy: copy.start())

    @pl.when(step + 1 < pl.num_programs(1))
    def _():
        copies(step + 1, 1 - slot, lambda copy: copy.start())

    row, number = row_ref[step], number_ref[step]
    length = lengths_ref[row]
    start = _start(length, queries, window)
    first, last = _visible_chunks(length, queries, window, chunk)

    @pl.when(number == first)
    def _():
        max_ref[...] = jnp.full_like(max_ref, EMPTY)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    copies(step, slot, lambda copy: copy.wait())
    low = number * chunk

    # What was not copied, or lies beyond the row's length, may be NaN; zero weights do not mend it.
    @pl.when((low < start) | (low + chunk > length))
    def _():
        at = low + jax.lax.broadcasted_iota(jnp.int32, (chunk, dim), 0)
        inside = (at >= start) & (at < length)
        for head in range(part_heads):
            values = v_ref[slot, head].astype(jnp.float32)
            v_ref[slot, head] = jnp.where(inside, values, 0.0).astype(v_ref.dtype)

    scale = 1 / math.sqrt(dim)
    q, k, v = q_ref[...], k_ref[slot].astype(q_ref.dtype), v_ref[slot].astype(q_ref.dtype)
    scores = _dot(q, k, ((2,), (2,)))
    if k_scales_ref is not None:
        scores = scores * k_scale_ref[slot][:, None]
    shape = (rows, chunk)
    at = low + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    position = (
        length
        - queries
        + jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, shape, 0), jnp.int32(groups))
    )
    seen = at <= jnp.minimum(position, length - 1)
    if window is not None:
        seen &= at > position - window
    scores = jnp.where(seen[None], scores, EMPTY)
    before = max_ref[...]
    now = jnp.maximum(before, scores.max(axis=2, keepdims=True))
    weights = jnp.exp2((scores - now[..., :1]) * (scale * LOG2E))
    decay = jnp.exp2((before - now) * (scale * LOG2E))
    max_ref[...] = now
    sum_ref[...] = sum_ref[...] * decay + weights.sum(axis=2, keepdims=True)
    if v_scales_ref is not None:
        # Scales that were not copied may be NaN as well; the weights there are zero.
        weights = jnp.where(seen[None], weights * v_scale_ref[slot][:, None], 0.0)
    product = _dot(weights.astype(v.dtype), v, ((2,), (1,)))
    acc_ref[...] = acc_ref[...] * decay[..., :1] + product

    @pl.when(number == last)
    def _():
        seen = max_ref[..., :1] > EMPTY / 2
        out = acc_ref[...] / jnp.where(seen, sum_ref[..., :1], 1.0)
        out_ref[...] = jnp.where(seen, out, 0.0).astype(out_ref.dtype)


def _dot(a: Array, b: Array, contract: tuple) -> Array:
    highest = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (contract, ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST if highest else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
