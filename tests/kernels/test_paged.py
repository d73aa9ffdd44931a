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


@pytest.mark.parametrize("window", [None, 20, 300])
@pytest.mark.parametrize(
    "case",
    [
        {"lengths": [5, 16, 1]},
        {"lengths": [900, 7, 300], "queries": 5},
        {"lengths": [513, 512, 600], "queries": 40, "groups": 3},
        {"lengths": [700, 90], "int8": True, "page": 32},
    ],
    ids=["one block", "several", "a chunk of a prompt", "int8"],
)
def test_blocks_equal_the_definition(case, window):
    given, scales = arrays(**case)
    got = jax.jit(paged.blockwise, static_argnames="window")(*given, **scales, window=window)
    want = decode_gqa.reference(*given, **scales, window=window)
    real = given[4][:, None] - given[0].shape[1] + np.arange(given[0].shape[1]) >= 0
    np.testing.assert_allclose(got[real], want[real], atol=2e-5)


def test_other_rows_change_no_bit():
    """A row's sums are the same whether the loop ends with it or goes on for a longer row."""
    (q, keys, values, table, lengths), _ = arrays([300, 900, 40])
    attend = jax.jit(paged.blockwise)
    together = attend(q, keys, values, table, lengths)
    for row in range(3):
        short = np.ones_like(lengths)
        short[row] = lengths[row]
        np.testing.assert_array_equal(attend(q, keys, values, table, short)[row], together[row])


@pytest.mark.parametrize("int8", [False, True])
def test_append_writes_the_new_tokens_only(int8):
    random = np.random.default_rng(0)
    pages = jnp.zeros((5, 2, 4, 8), jnp.int8 if int8 else jnp.float32)
    scales = jnp.zeros((5, 2, 4)) if int8 else None
    new = jnp.asarray(random.normal(size=(2, 6, 2, 8)), jnp.float32)
    table, used = jnp.asarray([[3, 1, 0], [4, 2, 0]]), jnp.asarray([2, 7])
    got, scale = jax.jit(paged.append)(pages, scales, new, table, used, jnp.asarray([6, 1]))
    whole = got * scale[..., None] if int8 else got
    tolerance = 0.02 if int8 else 0
    for step in range(6):
        position = 2 + step
        here = whole[table[0, position // 4], :, position % 4]
        np.testing.assert_allclose(here, new[0, step], atol=tolerance)
    np.testing.assert_allclose(whole[2, :, 3], new[1, 0], atol=tolerance)
    written = np.abs(np.asarray(whole)).sum(axis=(1, 3)) > 0
    assert written.sum() == 7


def test_a_chunk_past_the_table_is_padding():
    """The last chunk of a full row is padded past its pages; nothing is written there."""
    pages, new = jnp.zeros((2, 1, 4, 2)), jnp.ones((1, 8, 1, 2))
    got, _ = paged.append(pages, None, new, jnp.asarray([[1]]), jnp.asarray([2]), jnp.asarray([2]))
    assert got[1, 0, 2:].sum() == 4 and got.sum() == 4
