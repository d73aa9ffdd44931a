"""What the flash kernels visit and how their arrays are cut: plain JAX and numpy around Pallas.

The kernels run over a grid (batch, kv head, step). A step is one visited pair of a query block and
a key block. `steps` makes the list of them before a kernel starts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax.errors import UserError

EMPTY = -1e30  # score of a key that is not seen, log-sum-exp of a query that sees nothing; finite,
# so that differences are no NaN
LANES = 128
LOG2E = math.log2(math.e)
MIB = 2**20
# v5e and v6e have 128 MiB of VMEM a core, v5p 64.
VMEM_LIMIT_BYTES = 56 * MIB
# The list of steps is in SMEM, 1 MiB.
SMEM_STEPS_BYTES = 896 * 2**10

# Bits of a step's word; the key block is above them.
FIRST, LAST, VISIBLE, EDGE = 1, 2, 4, 8
FLAG_BITS = 4


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Positions per block; multiples of 128. Rows of a query block are `queries * G`."""

    queries: int
    keys: int

    @classmethod
    def default(cls, groups: int, queries: int, keys: int) -> Blocks:
        """About 1024 rows against 512 keys: 2 MiB of float32 scores."""
        rows = max(LANES, 1024 // groups // LANES * LANES)
        return cls(min(rows, round_up(queries, LANES)), min(512, round_up(keys, LANES)))


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything static about one call."""

    batch: int
    queries: int
    keys: int
    kv_heads: int
    groups: int
    dim: int
    causal: bool
    window: int | None
    q_offset: int
    segments: bool
    blocks: Blocks

    @classmethod
    def of(
        cls,
        q: Any,
        k: Any,
        segments: bool,
        causal: bool,
        window: int | None,
        q_offset: int,
        blocks: Blocks | None,
    ) -> Case:
        """Of arrays q `[B, T, N, H]` and k `[B, S, K, H]`."""
        batch, queries, heads, dim = q.shape
        keys, kv_heads = k.shape[1:3]
        if heads % kv_heads:
            raise UserError(f"{heads} query heads do not divide into {kv_heads} key/value heads")
        groups = heads // kv_heads
        blocks = blocks or Blocks.default(groups, queries, keys)
        if blocks.queries % LANES or blocks.keys % LANES:
            raise UserError(f"{blocks}: blocks are multiples of {LANES}")
        return cls(
            batch,
            queries,
            keys,
            kv_heads,
            groups,
            dim,
            causal,
            window,
            q_offset,
            segments,
            blocks,
        )

    @property
    def rows(self) -> int:
        """Rows of a query block."""
        return self.groups * self.blocks.queries

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.blocks.queries)

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.blocks.keys)

    @property
    def padded_keys(self) -> int:
        return self.key_blocks * self.blocks.keys


# Which pairs of blocks are visited


@functools.lru_cache(maxsize=64)
def schedule(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query block, key block and flags of each step: pairs that the static mask leaves non-empty.

    Pairs are in order of the query block, whose steps are bounded by FIRST and LAST. A query block
    that sees nothing has one step without VISIBLE, so that its output is written. EDGE says that
    some score of the pair is masked.
    """
    size_q, size_k = case.blocks.queries, case.blocks.keys
    parts = []
    key_block = np.arange(case.key_blocks)
    low_k = key_block * size_k
    high_k = np.minimum(low_k + size_k, case.keys) - 1
    for block in range(case.query_blocks):
        low_q = case.q_offset + block * size_q
        high_q = case.q_offset + min((block + 1) * size_q, case.queries) - 1
        visible = np.ones_like(key_block, bool)
        edge = low_k + size_k > case.keys
        if case.causal:
            visible &= low_k <= high_q
            edge |= high_k > low_q
        if case.window is not None:
            visible &= high_k > low_q - case.window
            edge |= low_k <= high_q - case.window
        seen = np.flatnonzero(visible)
        flags = VISIBLE + EDGE * edge[seen]
        if not seen.size:
            seen, flags = np.array([0]), np.array([0])
        flags[0] += FIRST
        flags[-1] += LAST
        parts.append((np.full(seen.size, block), seen, flags))
    query, key, flags = (np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True))
    return query, key, flags


def steps(
    case: Case, q_ids: Int[Array, "B T"] | None, kv_ids: Int[Array, "B S"] | None
) -> tuple[Int[Array, " P"], Int[Array, " W"]]:
    """The schedule as kernels read it: query block per step; key block and flags in one word.

    With segment ids there is a list of words per row of the batch, one after the other: steps whose
    blocks share no id lose VISIBLE and name the key block of the step before, so that nothing is
    copied for them.
    """
    query, key, flags = schedule(case)
    lists = 1 + (case.batch if case.segments else 1)
    if 4 * lists * query.size > SMEM_STEPS_BYTES:
        raise UserError(
            f"flash_gqa: {query.size} pairs of blocks in {lists - 1} lists do not fit in SMEM; use "
            f"larger blocks than {case.blocks} or more context parallelism"
        )
    if q_ids is None or kv_ids is None:
        return jnp.asarray(query), jnp.asarray(key << FLAG_BITS | flags)
    least_q, most_q = (x[:, query] for x in _id_range(q_ids, case.blocks.queries))
    least_k, most_k = (x[:, key] for x in _id_range(kv_ids, case.blocks.keys))
    visible = (flags & VISIBLE != 0) & (least_q <= most_k) & (least_k <= most_q)
    one_id = (least_q == most_q) & (least_k == most_k) & (least_q == least_k)
    edge = (flags & EDGE != 0) | ~one_id
    latest = jax.lax.cummax(jnp.where(visible, jnp.arange(query.size), 0), axis=1)
    words = jnp.asarray(key)[latest] << FLAG_BITS | (flags & (FIRST | LAST))
    words = words | jnp.where(visible, VISIBLE, 0) | jnp.where(edge, EDGE, 0)
    return jnp.asarray(query), words.astype(jnp.int32).reshape(-1)


def _id_range(ids: Int[Array, "B T"], size: int) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    ids = pad(ids, size, mode="edge").reshape(ids.shape[0], -1, size)
    return ids.min(axis=2), ids.max(axis=2)


def word_index(case: Case, count: int, batch: Any, step: Any) -> Any:
    """Where the word of a step is, `count` being the number of steps."""
    return batch * count + step if case.segments else step


def cost(case: Case, itemsize: int, *, products: int, q_arrays: int, k_arrays: int) -> Any:
    """What the visited pairs cost; segment ids can only make it less.

    Args:
      itemsize: bytes of an element of any array.
      products: matrix products a pair.
      q_arrays: arrays of the shape of q that are read or written once.
      k_arrays: arrays of the shape of k that are written once; k and v are read at every pair.
    """
    flags = schedule(case)[2]
    pairs = int(np.count_nonzero(flags & VISIBLE)) * case.batch * case.kv_heads
    rows, keys, dim = case.rows, case.blocks.keys, case.dim
    heads = case.batch * case.kv_heads
    moved = q_arrays * heads * case.query_blocks * rows * dim
    moved += k_arrays * heads * case.padded_keys * dim + pairs * 2 * keys * dim
    return pl.CostEstimate(
        flops=products * 2 * pairs * rows * keys * dim,
        bytes_accessed=itemsize * moved,
        transcendentals=pairs * rows * keys,
    )


# How arrays are laid out and cut


class Specs:
    """The blocks of a step; index maps get the prefetched lists of `steps` after the grid."""

    def __init__(self, case: Case, count: int) -> None:
        size_q, size_k, groups, dim = (
            case.blocks.queries,
            case.blocks.keys,
            case.groups,
            case.dim,
        )

        def key(batch: Any, step: Any, words: Any) -> Any:
            return words[word_index(case, count, batch, step)] >> FLAG_BITS

        self.q = pl.BlockSpec(
            (None, None, groups, size_q, dim), lambda b, h, s, query, words: (b, h, 0, query[s], 0)
        )
        self.row = pl.BlockSpec(
            (None, None, None, 1, case.rows), lambda b, h, s, query, words: (b, h, query[s], 0, 0)
        )
        self.k = pl.BlockSpec(
            (None, None, size_k, dim), lambda b, h, s, query, words: (b, h, key(b, s, words), 0)
        )
        self._all_keys = (None, None, case.padded_keys, dim)
        self.q_ids = self.kv_ids = None
        if case.segments:
            self.q_ids = pl.BlockSpec(
                (None, 1, size_q), lambda b, h, s, query, words: (b, 0, query[s])
            )
            self.kv_ids = pl.BlockSpec(
                (None, 1, size_k), lambda b, h, s, query, words: (b, 0, key(b, s, words))
            )

    def all_keys(self, buffers: int) -> pl.BlockSpec:
        """All keys of a head, in one buffer or in two."""
        return pl.BlockSpec(
            self._all_keys,
            lambda b, h, s, query, words: (b, h, 0, 0),
            pipeline_mode=pl.Buffered(buffers),
        )


def heads_first(x: Float[Array, "B T N H"], case: Case) -> Float[Array, "B K G T H"]:
    x = pad(x, case.blocks.queries)
    x = x.reshape(case.batch, -1, case.kv_heads, case.groups, case.dim)
    return x.transpose(0, 2, 3, 1, 4)


def heads_last(x: Float[Array, "B K G T H"], case: Case) -> Float[Array, "B T N H"]:
    x = x.transpose(0, 3, 1, 2, 4)[:, : case.queries]
    return x.reshape(case.batch, case.queries, case.kv_heads * case.groups, case.dim)


def keys_first(x: Float[Array, "B S K H"], case: Case) -> Float[Array, "B K S H"]:
    return pad(x, case.blocks.keys).swapaxes(1, 2)


def keys_last(x: Float[Array, "B K S H"], case: Case) -> Float[Array, "B S K H"]:
    return x.swapaxes(1, 2)[:, : case.keys]


def to_rows(x: Float[Array, "B N T"], case: Case, fill: float) -> Float[Array, "B K n 1 R"]:
    """One number per query as the kernels hold it: per query block, a row of G * block_q."""
    size, blocks = case.blocks.queries, case.query_blocks
    x = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * size - case.queries)), constant_values=fill)
    x = x.reshape(case.batch, case.kv_heads, case.groups, blocks, size).swapaxes(2, 3)
    return x.reshape(case.batch, case.kv_heads, blocks, 1, case.rows)


def from_rows(x: Float[Array, "B K n 1 R"], case: Case) -> Float[Array, "B N T"]:
    size, blocks = case.blocks.queries, case.query_blocks
    x = x.reshape(case.batch, case.kv_heads, blocks, case.groups, size).swapaxes(2, 3)
    return x.reshape(case.batch, case.kv_heads * case.groups, -1)[..., : case.queries]


def ids_row(ids: Int[Array, "B T"] | None, size: int) -> Int[Array, "B 1 T"] | None:
    return None if ids is None else pad(ids.astype(jnp.int32), size)[:, None]


def pad(x: Array, size: int, mode: str = "constant") -> Array:
    """Axis 1 filled up to a multiple of `size`."""
    extra = -x.shape[1] % size
    if not extra:
        return x
    widths = [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, mode=mode)


def like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result that varies over the same mesh axes as `x` under `jax.shard_map`."""
    varying = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def precision(q: Array) -> jax.lax.Precision:
    """float32 inputs are multiplied as float32, not as the MXU's default, one bfloat16 pass."""
    return jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
    )


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


# What both kernels compute with


def by_flags(word: Any, accumulate: Any) -> None:
    """Calls `accumulate(masked)` if the pair is visible."""
    pl.when(word & (VISIBLE | EDGE) == VISIBLE)(lambda: accumulate(False))
    pl.when(word & (VISIBLE | EDGE) == VISIBLE | EDGE)(lambda: accumulate(True))


def bias(
    case: Case, step_q: Any, step_k: Any, q_ids: Any, kv_ids: Any, *, keys_first: bool
) -> Float[Array, "x y"]:
    """0 where a query sees a key, EMPTY where not: one block, the same for all heads.

    Args:
      q_ids, kv_ids: the ids along lanes as `[1, n]`, the others as `[n, LANES]`; or None.
      keys_first: keys are in sublanes and queries in lanes, not the other way round.
    """
    size_q, size_k = case.blocks.queries, case.blocks.keys
    shape = (size_k, size_q) if keys_first else (size_q, size_k)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0 if keys_first else 1)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, 1 if keys_first else 0)
    # Position of the query minus that of the key.
    distance = query - key + (step_q * size_q + case.q_offset - step_k * size_k)
    conditions: list[Bool[Array, "x y"]] = []
    if case.causal:
        conditions.append(distance >= 0)
    if case.window is not None:
        conditions.append(distance < case.window)
    if case.keys % size_k:
        conditions.append(key < case.keys - step_k * size_k)
    if q_ids is not None:
        by_row, by_lane = (kv_ids, q_ids) if keys_first else (q_ids, kv_ids)
        conditions.append(lanes(by_row, shape[1]) == by_lane)
    if not conditions:
        return jnp.zeros(shape, jnp.float32)
    return jnp.where(functools.reduce(jnp.logical_and, conditions), 0.0, EMPTY)


def lanes(x: Array, width: int) -> Array:
    """`[n, LANES]`, equal in all lanes, as `[n, width]`."""
    whole, rest = divmod(width, LANES)
    parts = [x] * whole + ([x[:, :rest]] if rest else [])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def column(row: Array) -> Array:
    """`[1, n]` as `[n, LANES]`, equal in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def dot(a: Array, b: Array, contract: tuple, precision: Any) -> Array:
    """The product over the dimensions `contract`, summed in float32."""
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
