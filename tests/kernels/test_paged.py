"""Attention over pages in blocks against the definition; writing to pages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.kernels import decode_gqa, paged


def arrays(lengths, *, queries=1, page=16, groups=2, seed=0, int8=False):
    """Random pages, shuffled, with NaN in every page that no row has."""
    random = np.random.default_rng(seed)
    rows, per_row = len(lengths), -(-max(lengths) // page)
    order = random.permutation(rows * per_row + 3)
    shape = (len(order), 2, page, 8)
    keys, values = (random.normal(size=shape).astype(np.float32) for _ in range(2))
    table = order[: rows * per_row].reshape(rows, per_row).astype(np.int32)
    q = random.normal(size=(rows, queries, 2 * groups, 8)).astype(np.float32)
    scales = {}
    if int8:
        (keys, k_scales), (values, v_scales) = paged.quantise(keys), paged.quantise(values)
        scales = {"k_scales": k_scales, "v_scales": v_scales}
    else:
        keys[order[rows * per_row :]] = np.nan
    return (q, keys, values, table, np.asarray(lengths, np.int32)), scales


def in_blocks(q, keys, values, table, lengths, k_scales=None, v_scales=None, window=None):
    """`blockwise` over the second of two layers; the first is NaN where it can be."""

    def second(x):
        other = jnp.zeros_like(x) if x.dtype == jnp.int8 else jnp.full_like(x, jnp.nan)
        return jnp.stack([other, x])

    scales = {"k_scales": k_scales, "v_scales": v_scales}
    scales = {name: None if x is None else second(x) for name, x in scales.items()}
    return paged.blockwise(
        q, second(keys), second(values), jnp.int32(1), table, lengths, window=window, **scales
    )


@pytest.mark.parametrize("window", [None, 20, 300])
@pytest.mark.parametrize(
    "case",
    [
        {"lengths": [5, 16, 1]},
        {"lengths": [900, 7, 300], "queries": 5},
        {"lengths": [513, 512, 600], "queries": 40, "groups": 3},
        {"lengths": [1100, 301, 290], "queries": 300, "groups": 1},
        {"lengths": [700, 90], "int8": True, "page": 32},
    ],
    ids=["one block", "several", "a chunk of a prompt", "blocks of queries", "int8"],
)
def test_blocks_equal_the_definition(case, window):
    given, scales = arrays(**case)
    got = jax.jit(in_blocks, static_argnames="window")(*given, **scales, window=window)
    want = decode_gqa.reference(*given, **scales, window=window)
    real = given[4][:, None] - given[0].shape[1] + np.arange(given[0].shape[1]) >= 0
    np.testing.assert_allclose(got[real], want[real], atol=2e-5)


def test_other_rows_change_no_bit():
    """A row's sums are the same whether the loop ends with it or goes on for a longer row."""
    (q, keys, values, table, lengths), _ = arrays([300, 900, 40])
    attend = jax.jit(in_blocks)
    together = attend(q, keys, values, table, lengths)
    for row in range(3):
        short = np.ones_like(lengths)
        short[row] = lengths[row]
        np.testing.assert_array_equal(attend(q, keys, values, table, short)[row], together[row])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_append_writes_the_new_tokens_only(kind):
    random, int8 = np.random.default_rng(0), kind == "int8"
    pages = jnp.zeros((2, 5, 2, 4, 8), paged.storage(kind))
    scales = jnp.zeros((2, 5, 2, 4)) if int8 else None
    new = jnp.asarray(random.normal(size=(2, 6, 2, 8)), jnp.float32)
    table, used = jnp.asarray([[3, 1, 0], [4, 2, 0]]), jnp.asarray([2, 7])
    counts = jnp.asarray([6, 1])
    got, scale = jax.jit(paged.append)(pages, scales, new, jnp.int32(1), table, used, counts)
    whole = np.asarray(got * scale[..., None] if int8 else paged.loaded(got), np.float32)
    assert not whole[0].any()
    whole = whole[1]
    tolerance = {"float32": 0, "bfloat16": 0.01, "int8": 0.02}[kind]
    for step in range(6):
        position = 2 + step
        here = whole[table[0, position // 4], :, position % 4]
        np.testing.assert_allclose(here, new[0, step], atol=tolerance)
    np.testing.assert_allclose(whole[2, :, 3], new[1, 0], atol=tolerance)
    assert (np.abs(whole).sum(axis=(1, 3)) > 0).sum() == 7


def test_a_chunk_past_the_table_is_padding():
    """The last chunk of a full row is padded past its pages; nothing is written there."""
    pages, new = jnp.zeros((1, 2, 1, 4, 2)), jnp.ones((1, 8, 1, 2))
    at = (jnp.int32(0), jnp.asarray([[1]]), jnp.asarray([2]), jnp.asarray([2]))
    got, _ = paged.append(pages, None, new, *at)
    assert got[0, 1, 0, 2:].sum() == 4 and got.sum() == 4


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("rows", "new", "heads"), [(1, 1, 1), (1, 1, 2), (3, 1, 1), (1, 20, 1)])
def test_a_loop_copies_no_pages(kind, rows, new, heads):
    """XLA:CPU has copied all pages at every step: for one index, one head, or bfloat16."""
    layers, page, dim = 2, 16, 8
    shape = (layers, 2000, heads, page, dim)
    pages = [jnp.zeros(shape, paged.storage(kind))] * 2
    pages += [jnp.zeros(shape[:-1])] * 2 if kind == "int8" else [None, None]
    table = jnp.arange(rows * 40, dtype=jnp.int32).reshape(rows, -1)
    counts = jnp.full(rows, new)

    def layer(number, carry, used):
        x, keys, values, k_scales, v_scales = carry
        keys, k_scales = paged.append(keys, k_scales, x, number, table, used, counts)
        values, v_scales = paged.append(values, v_scales, x, number, table, used, counts)
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        x = x + paged.blockwise(x, keys, values, number, table, used + new, **scales)
        return x, keys, values, k_scales, v_scales

    def run(pages, x):
        def step(i, carry):
            used = jnp.full(rows, new * i)
            return jax.lax.fori_loop(0, layers, lambda j, c: layer(j, c, used), carry)

        return jax.lax.fori_loop(0, 4, step, (x, *pages))

    x = jnp.zeros((rows, new, heads, dim))
    compiled = jax.jit(run, donate_argnums=0).lower(pages, x).compile()
    smallest = min(x.nbytes for x in pages if x is not None)
    assert compiled.memory_analysis().temp_size_in_bytes < smallest / 2
