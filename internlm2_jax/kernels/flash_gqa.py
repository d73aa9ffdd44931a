"""Flash attention for grouped queries on TPU: forward and backward in Pallas.

The algorithm is FlashAttention-2 (Dao 2023, arXiv:2307.08691): online softmax over blocks of keys,
no T x S matrix in memory, the backward pass recomputes the scores from the log-sum-exp. What is
particular here:

- Keys and values are read once for a whole group: the G query heads of a group stand below each
  other as the rows of one block, `[G * block_q, H]`.
- Which pairs of blocks are visited is a list made before the kernel starts (flash_blocks.py), so
  pairs that the causal mask or the window empties cost nothing, not even a grid step. Pairs that
  segment ids empty are known from the least and largest id of each block: they cost a step, and
  neither a copy nor arithmetic. Pairs that see everything skip the mask.
- The backward pass is one kernel, five products per pair instead of the seven of two kernels: the
  gradients of all keys of a head stay in VMEM as float32 while the query blocks pass by. Key sets
  too long for that are taken in slices (`BACKWARD_KEYS_BYTES`), which is exact because a slice only
  needs the log-sum-exp over all keys. Its scores are kept transposed, keys in sublanes, so that
  the statistics of a query are rows and only one of the five products needs a transpose.
- Base-2 exponentials: the scale and log2(e) are one product.

A query that sees no key gives zeros and a log-sum-exp of `EMPTY`, and no gradient.

`attend` and `attend_backward` are the two halves for callers that combine key sets (ring
attention); `flash_gqa` is the differentiable whole.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from internlm2_jax.errors import UserError
from internlm2_jax.kernels import flash_blocks as fb
from internlm2_jax.kernels.flash_blocks import EMPTY, LANES, LOG2E, Blocks, Case

__all__ = ["EMPTY", "Blocks", "attend", "attend_backward", "flash_gqa"]

# float32 gradients of keys and of values that the backward kernel holds in VMEM, together: 32,768
# keys of 128. Up to a quarter of that, the next head's have memory of their own, so that the copy
# to HBM hides behind work.
BACKWARD_KEYS_BYTES = 32 * fb.MIB


def flash_gqa(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    blocks: Blocks | None = None,
    interpret: bool | pltpu.InterpretParams | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention within equal segment ids; differentiable in q, k and v.

    Under `jax.checkpoint` the names "attention_out" and "attention_lse" can be saved; with both of
    them a backward pass does not run the forward kernel again.

    Args:
      window: positions a query sees, its own included; None for all earlier ones.
      blocks: sizes of the blocks; None for the default.
      interpret: run the kernel's program op by op on any platform; for tests.
    """
    return _flash(q, k, v, segment_ids, window, blocks, interpret or False)


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
    blocks: Blocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention over one set of keys, with the log-sum-exp that combines it with other sets.

    Args:
      causal: query t sees keys up to t + q_offset.
      window: query t sees keys after t + q_offset - window.
      q_offset: position of q[:, 0] relative to k[:, 0]; may be negative.

    Returns:
      The output in q's type and ln(sum(exp(scores))) in float32, `EMPTY` where nothing is seen.
    """
    segments = _segmented(q_segment_ids, kv_segment_ids)
    case = Case.of(q, k, segments, causal, window, q_offset, blocks)
    return _forward(case, q, k, v, q_segment_ids, kv_segment_ids, interpret)


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
    blocks: Blocks | None = None,
    dtype: Any = jnp.float32,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients with respect to q, k and v of one set of keys.

    Args:
      out, lse: output and log-sum-exp over *all* keys that the queries saw; `k` and `v` may be a
        part of them. The sum of the results over all parts is the whole gradient of q.
      dout: gradient with respect to `out`.
      dtype: of the results; float32 for those that are to be summed further.
    """
    segments = _segmented(q_segment_ids, kv_segment_ids)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    keep = max(LANES, BACKWARD_KEYS_BYTES // (8 * fb.round_up(k.shape[3], LANES)))
    starts = range(0, k.shape[1], keep)
    sum_dtype = dtype if len(starts) == 1 else jnp.float32  # of the gradient of q
    parts = []
    for start in starts:
        part = slice(start, min(start + keep, k.shape[1]))
        ids = None if kv_segment_ids is None else kv_segment_ids[:, part]
        mine, theirs = k[:, part], v[:, part]
        case = Case.of(q, mine, segments, causal, window, q_offset - start, blocks)
        queries = (lse, delta, dout, q_segment_ids)
        parts.append(_backward(case, q, mine, theirs, *queries, ids, sum_dtype, interpret))
    dq, dk, dv = zip(*parts, strict=True)
    total = functools.reduce(jnp.add, dq)
    return total.astype(dtype), *(jnp.concatenate(x, axis=1).astype(dtype) for x in (dk, dv))


def _segmented(q_segment_ids: Array | None, kv_segment_ids: Array | None) -> bool:
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise UserError("flash_gqa: segment ids are of queries and of keys, or of neither")
    return q_segment_ids is not None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _flash(q, k, v, segment_ids, window, blocks, interpret):
    return _flash_forward(q, k, v, segment_ids, window, blocks, interpret)[0]


def _flash_forward(q, k, v, segment_ids, window, blocks, interpret):
    out, lse = attend(
        q,
        k,
        v,
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        window=window,
        blocks=blocks,
        interpret=interpret,
    )
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segment_ids, out, lse)


def _flash_backward(window, blocks, interpret, residuals, dout):
    q, k, v, segment_ids, out, lse = residuals
    gradients = attend_backward(
        q,
        k,
        v,
        out,
        lse,
        dout,
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        window=window,
        blocks=blocks,
        dtype=q.dtype,
        interpret=interpret,
    )
    return *gradients, None


_flash.defvjp(_flash_forward, _flash_backward)


def _forward_kernel(
    query_ref,
    words_ref,
    q_ref,  # [G, block_q, H]
    k_ref,  # [block_k, H]
    v_ref,
    q_ids_ref,  # [1, block_q]
    kv_ids_ref,  # [1, block_k]
    out_ref,  # [G, block_q, H]
    lse_ref,  # [1, G * block_q]
    max_ref,  # [G * block_q, LANES], equal in all lanes; in the units of raw scores
    sum_ref,
    acc_ref,  # [G * block_q, H]
    q_column_ref,  # [block_q, LANES]
    *,
    case: Case,
    precision: Any,
) -> None:
    batch, step = pl.program_id(0), pl.program_id(2)
    word = words_ref[fb.word_index(case, query_ref.shape[0], batch, step)]
    size_q, size_k, dim = case.blocks.queries, case.blocks.keys, case.dim
    scale = 1 / math.sqrt(dim)

    @pl.when(word & fb.FIRST != 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, EMPTY)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        if case.segments:
            q_column_ref[...] = fb.column(q_ids_ref[...])

    def accumulate(masked: bool) -> None:
        q = q_ref[...].reshape(case.rows, dim)
        scores = fb.dot(q, k_ref[...], ((1,), (1,)), precision)
        if masked:
            ids = (q_column_ref[...], kv_ids_ref[...]) if case.segments else (None, None)
            at = (query_ref[step], word >> fb.FLAG_BITS)
            bias = fb.bias(case, *at, *ids, keys_first=False)
            scores = scores.reshape(case.groups, size_q, size_k) + bias
            scores = scores.reshape(case.rows, size_k)
        before = max_ref[...]
        now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        weights = jnp.exp2((scores - fb.lanes(now, size_k)) * (scale * LOG2E))
        decay = jnp.exp2((before - now) * (scale * LOG2E))
        max_ref[...] = now
        sum_ref[...] = sum_ref[...] * decay + weights.sum(axis=1, keepdims=True)
        product = fb.dot(weights.astype(v_ref.dtype), v_ref[...], ((1,), (0,)), precision)
        acc_ref[...] = acc_ref[...] * fb.lanes(decay, dim) + product

    fb.by_flags(word, accumulate)

    @pl.when(word & fb.LAST != 0)
    def _():
        highest, total = max_ref[...], sum_ref[...]
        # A row that saw nothing has summed weights of 1, or nothing at all.
        inverse = jnp.where(highest > EMPTY / 2, 1 / total, 0.0)
        out = acc_ref[...] * fb.lanes(inverse, dim)
        out_ref[...] = out.reshape(out_ref.shape).astype(out_ref.dtype)
        highest, total = highest.T[:1], total.T[:1]
        lse_ref[...] = jnp.where(highest > EMPTY / 2, highest * scale + jnp.log(total), EMPTY)


def _forward(case: Case, q, k, v, q_ids, kv_ids, interpret):
    rows, dim = case.rows, case.dim
    query, words = fb.steps(case, q_ids, kv_ids)
    specs = fb.Specs(case, query.size)
    inputs = [fb.heads_first(q, case), fb.keys_first(k, case), fb.keys_first(v, case)]
    lse_shape = (case.batch, case.kv_heads, case.query_blocks, 1, rows)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, case=case, precision=fb.precision(q)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(case.batch, case.kv_heads, query.size),
            in_specs=[specs.q, specs.k, specs.k, specs.q_ids, specs.kv_ids],
            out_specs=[specs.q, specs.row],
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, dim), jnp.float32),
                pltpu.VMEM((case.blocks.queries, LANES), jnp.int32),
            ],
        ),
        out_shape=[fb.like(q, inputs[0].shape, q.dtype), fb.like(q, lse_shape, jnp.float32)],
        compiler_params=fb.compiler_params(),
        cost_estimate=fb.cost(case, q.dtype.itemsize, products=2, q_arrays=2, k_arrays=0),
        interpret=interpret,
        name="flash_gqa_forward",
    )(
        query,
        words,
        *inputs,
        fb.ids_row(q_ids, case.blocks.queries),
        fb.ids_row(kv_ids, case.blocks.keys),
    )
    return fb.heads_last(out, case), fb.from_rows(lse, case)


def _backward_kernel(
    query_ref,
    words_ref,
    q_ref,  # [G, block_q, H]
    k_ref,  # [block_k, H]
    v_ref,
    dout_ref,  # [G, block_q, H]
    lse_ref,  # [1, G * block_q], times log2(e)
    delta_ref,  # [1, G * block_q]
    q_ids_ref,  # [1, block_q]
    kv_ids_ref,  # [1, block_k]
    dq_ref,  # [G, block_q, H]
    dk_ref,  # [S, H], all keys of the head; without the scale
    dv_ref,
    dq_acc_ref,  # [G * block_q, H]
    *,
    case: Case,
    precision: Any,
) -> None:
    batch, step = pl.program_id(0), pl.program_id(2)
    word = words_ref[fb.word_index(case, query_ref.shape[0], batch, step)]
    step_k, size_k = word >> fb.FLAG_BITS, case.blocks.keys
    scale = 1 / math.sqrt(case.dim)

    @pl.when(step == 0)
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    @pl.when(word & fb.FIRST != 0)
    def _():
        dq_acc_ref[...] = jnp.zeros_like(dq_acc_ref)

    def accumulate(masked: bool) -> None:
        q = q_ref[...].reshape(case.rows, case.dim)
        dout = dout_ref[...].reshape(case.rows, case.dim)
        k, v = k_ref[...], v_ref[...]
        scores = fb.dot(k, q, ((1,), (1,)), precision)  # [block_k, rows]
        if masked:
            ids = (q_ids_ref[...], fb.column(kv_ids_ref[...])) if case.segments else (None, None)
            bias = fb.bias(case, query_ref[step], step_k, *ids, keys_first=True)
            scores = scores + jnp.concatenate([bias] * case.groups, axis=1)
        weights = jnp.exp2(scores * (scale * LOG2E) - lse_ref[...])
        gradient = weights * (fb.dot(v, dout, ((1,), (1,)), precision) - delta_ref[...])
        weights, gradient = weights.astype(q.dtype), gradient.astype(q.dtype)
        at = pl.ds(pl.multiple_of(step_k * size_k, size_k), size_k)
        dv_ref[at] += fb.dot(weights, dout, ((1,), (0,)), precision)
        dk_ref[at] += fb.dot(gradient, q, ((1,), (0,)), precision)
        dq_acc_ref[...] += fb.dot(gradient, k, ((0,), (0,)), precision)

    fb.by_flags(word, accumulate)

    @pl.when(word & fb.LAST != 0)
    def _():
        dq_ref[...] = (dq_acc_ref[...] * scale).reshape(dq_ref.shape).astype(dq_ref.dtype)


def _backward(case: Case, q, k, v, lse, delta, dout, q_ids, kv_ids, dtype, interpret):
    rows, dim = case.rows, case.dim
    query, words = fb.steps(case, q_ids, kv_ids)
    specs = fb.Specs(case, query.size)
    # A query that saw nothing must get no weight anywhere: exp(score - huge) = 0.
    lse = jnp.where(lse > EMPTY / 2, lse * LOG2E, -EMPTY)
    inputs = [
        fb.heads_first(q, case),
        fb.keys_first(k, case),
        fb.keys_first(v, case),
        fb.heads_first(dout.astype(q.dtype), case),
        fb.to_rows(lse, case, fill=-EMPTY),
        fb.to_rows(delta, case, fill=0),
    ]
    of_keys = fb.like(q, (case.batch, case.kv_heads, case.padded_keys, dim), jnp.float32)
    keys_bytes = 8 * case.padded_keys * fb.round_up(dim, LANES)
    all_keys = specs.all_keys(buffers=2 if keys_bytes <= BACKWARD_KEYS_BYTES // 4 else 1)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, case=case, precision=fb.precision(q)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(case.batch, case.kv_heads, query.size),
            in_specs=[
                specs.q,
                specs.k,
                specs.k,
                specs.q,
                specs.row,
                specs.row,
                specs.q_ids,
                specs.kv_ids,
            ],
            out_specs=[specs.q, all_keys, all_keys],
            scratch_shapes=[pltpu.VMEM((rows, dim), jnp.float32)],
        ),
        out_shape=[fb.like(q, inputs[0].shape, dtype), of_keys, of_keys],
        compiler_params=fb.compiler_params(),
        cost_estimate=fb.cost(case, q.dtype.itemsize, products=5, q_arrays=3, k_arrays=2),
        interpret=interpret,
        name="flash_gqa_backward",
    )(
        query,
        words,
        *inputs,
        fb.ids_row(q_ids, case.blocks.queries),
        fb.ids_row(kv_ids, case.blocks.keys),
    )
    dk = dk * (1 / math.sqrt(dim))
    return fb.heads_last(dq, case), fb.keys_last(dk, case), fb.keys_last(dv, case)
