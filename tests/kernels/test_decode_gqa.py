"""Decoding over pages: the kernel in interpret mode and its plain twin against float64."""

from __future__ import annotations

import dataclasses
import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2_jax.errors import UserError
from internlm2_jax.kernels import decode_gqa


@dataclasses.dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    queries: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    page: int = 16
    table: int = 6  # pages a row has room for
    window: int | None = None
    chunk: int | None = None
    dtype: str = "float32"

    def arrays(self):
        """Pages are in any order, and NaN wherever nothing may be read."""
        rng = np.random.default_rng(sum(self.lengths))
        batch = len(self.lengths)
        pages = batch * self.table + 2
        shape = (pages, self.kv_heads, self.page, self.dim)
        k, v = rng.normal(size=(2, *shape)).astype(np.float32)
        table = rng.permutation(pages)[: batch * self.table].reshape(batch, self.table)
        scales = {"k_scales": None, "v_scales": None}
        if self.dtype == "int8":
            scales = {name: np.abs(x).max(-1) / 127 for name, x in zip(scales, (k, v), strict=True)}
            k, v = (
                np.round(x / s[..., None]).astype(np.int8)
                for x, s in zip((k, v), scales.values(), strict=True)
            )
        spoiled = [k, v] if self.dtype != "int8" else list(scales.values())
        for x in spoiled:
            read = np.zeros((pages, self.page), bool)
            for row, length in zip(table, self.lengths, strict=True):
                at = np.arange(length)
                read[row[at // self.page], at % self.page] = True
            x.swapaxes(1, 2)[~read] = np.nan
        q = rng.normal(size=(batch, self.queries, self.heads, self.dim)).astype(np.float32)
        if self.dtype == "bfloat16":
            q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
        # Entries beyond a row's pages point anywhere.
        used = -(-np.array(self.lengths) // self.page)
        table = np.where(np.arange(self.table) < used[:, None], table, 10**6)
        return q, k, v, table.astype(np.int32), np.array(self.lengths, np.int32), scales

    def expected(self, q, k, v, table, lengths, scales):
        out = np.zeros(q.shape)
        for b, length in enumerate(self.lengths):
            if not length:
                continue
            pages = table[b, : -(-length // self.page)]
            keys, values = (
                (np.asarray(x[pages], np.float64) * (1 if s is None else s[pages][..., None]))
                .swapaxes(1, 2)
                .reshape(-1, self.kv_heads, self.dim)[None, :length]
                for x, s in zip((k, v), scales.values(), strict=True)
            )
            row = np.asarray(q[b : b + 1], np.float64)
            mask = {"window": self.window, "q_offset": length - self.queries}
            out[b] = oracle.attention(row, keys, values, row, **mask)[0][0]
        return out


def check(case: Case, interpret=True) -> None:
    arrays = case.arrays()
    *positional, scales = arrays
    want = case.expected(*arrays)
    kernel = functools.partial(
        decode_gqa.decode_gqa, window=case.window, chunk=case.chunk, interpret=interpret
    )
    twin = functools.partial(decode_gqa.reference, window=case.window)
    dtype = "bfloat16" if case.dtype == "bfloat16" else "float32"
    for function in (twin, kernel):
        got = oracle.quick(function)(*positional, **scales)
        assert got.dtype == positional[0].dtype
        oracle.assert_close([got], [want], dtype, names=["out"])


FAST = {
    "short, full and empty rows": Case((40, 96, 0, 1), chunk=32),
    "speculation, window, pages of more than a chunk": Case(
        (3, 200, 128), 3, 8, 1, page=128, table=2, window=50, chunk=64
    ),
    "int8": Case((130, 256), 2, dim=64, page=128, table=2, dtype="int8"),
}
WIDE = {
    "many short rows": Case(tuple(range(1, 40)), page=32, table=2),
    "sixteen queries": Case((16, 90, 45), 16, 6, 3),
    "group of 8, three heads": Case((77, 33), 1, 24, 3, 128, page=32),
    "window of one": Case((77, 33, 1), window=1, chunk=32),
    "window longer than rows": Case((77, 33, 1), window=1000, chunk=32),
    "window in late chunks": Case((512, 300), 4, page=64, table=8, window=70, chunk=64),
    "one contiguous page a row": Case((300, 512), page=512, table=1, chunk=128),
    "bfloat16": Case((77, 33, 96), dim=128, dtype="bfloat16"),
    "int8, window, chunks of a page": Case(
        (384, 140, 0), 4, page=128, table=3, window=100, chunk=128, dtype="int8"
    ),
}


@pytest.mark.parametrize("name", FAST)
def test_matches_float64(name):
    check(FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_matches_float64_widely(name):
    check(WIDE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_in_a_simulated_tpu(name):
    check(FAST[name], oracle.SIMULATED)


@pytest.mark.slow
@settings(max_examples=10, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 128), min_size=1, max_size=5),
    queries=st.integers(1, 5),
    groups=st.sampled_from([1, 2, 4, 8]),
    kv_heads=st.integers(1, 4),
    window=st.none() | st.integers(1, 130),
    pages=st.sampled_from([(16, 8), (32, 4), (64, 2), (128, 1)]),
    chunk=st.sampled_from([None, 32, 64, 128]),
)
def test_matches_float64_on_random_shapes(lengths, queries, groups, kv_heads, pages, **drawn):
    lengths = tuple(0 if n < queries else n for n in lengths)
    page, table = pages
    heads = {"heads": groups * kv_heads, "kv_heads": kv_heads}
    check(Case(lengths, queries, page=page, table=table, **heads, **drawn))


@given(
    lengths=st.lists(st.integers(0, 1024), min_size=4, max_size=4),
    queries=st.integers(1, 16),
    window=st.none() | st.integers(1, 300),
    chunk=st.sampled_from([64, 256]),
)
@settings(max_examples=25)
def test_steps_are_the_chunks_that_are_seen(lengths, queries, window, chunk):
    lengths = [max(n, queries) if n else 0 for n in lengths]
    row, number, total = decode_gqa._steps(jnp.asarray(lengths), queries, window, chunk, 1024)
    got = list(zip(row.tolist(), number.tolist(), strict=True))[: int(total)]
    want = []
    for b, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - queries - window + 1)
        chunks = range(first // chunk, max(length - 1, 0) // chunk + 1)
        want += [(b, c) for c in chunks]
    assert got == want


@pytest.mark.parametrize("page", [16, 64, 128, 4096, 32768])
@pytest.mark.parametrize("kv_heads", [1, 8, 40])
def test_default_chunk_divides_pages_and_fits(page, kv_heads):
    chunk = decode_gqa._chunk(kv_heads, page, 128, 2, 32768)
    assert max(chunk, page) % min(chunk, page) == 0
    assert chunk % 16 == 0
    assert 2 * 2 * chunk * kv_heads * 128 * 2 <= decode_gqa.BUFFER_BYTES


def test_bad_input():
    def call(queries=1, page=16, dtype=jnp.bfloat16, heads=4, **keywords):
        q = jax.ShapeDtypeStruct((1, queries, heads, 64), jnp.bfloat16)
        pages = jax.ShapeDtypeStruct((4, 2, page, 64), dtype)
        ints = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 4), (1,))]
        function = functools.partial(decode_gqa.decode_gqa, **keywords)
        return jax.eval_shape(function, q, pages, pages, *ints)

    assert call().shape == (1, 1, 4, 64)
    with pytest.raises(UserError, match="up to 16 new positions, got 17"):
        call(queries=17)
    with pytest.raises(UserError, match="pages of 20 positions"):
        call(page=20)
    with pytest.raises(UserError, match="scales belong to int8 pages"):
        call(dtype=jnp.int8)
    with pytest.raises(UserError, match="5 query heads do not divide into 2"):
        call(heads=5)
    with pytest.raises(UserError, match="chunks of 24 positions"):
        call(chunk=24)


def test_dispatch():
    q, k, v, table, lengths, scales = Case((20, 7)).arrays()
    arrays = [jnp.asarray(x) for x in (q, k, v, table, lengths)]
    alone = decode_gqa.reference(*arrays, **scales)
    # The second of two layers.
    arrays[1:3] = (jnp.stack([jnp.full_like(x, jnp.nan), x]) for x in arrays[1:3])
    arrays.insert(3, jnp.int32(1))
    got = decode_gqa.dispatch(*arrays, **scales)
    np.testing.assert_array_equal(got, decode_gqa.dispatch(*arrays, **scales, impl="blockwise"))
    plain = decode_gqa.dispatch(*arrays, **scales, impl="reference")
    np.testing.assert_allclose(got, plain, atol=1e-5)
    np.testing.assert_array_equal(plain, alone)
    with pytest.raises(UserError, match="runs on tpu, not on cpu"):
        decode_gqa.dispatch(*arrays, impl="decode_gqa")
    with pytest.raises(UserError, match="no decoding attention 'paged'; there are auto, reference"):
        decode_gqa.dispatch(*arrays, impl="paged")
