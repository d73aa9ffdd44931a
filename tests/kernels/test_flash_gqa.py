"""The flash kernels in interpret mode against float64, and what they promise beyond the numbers."""

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
from internlm2_jax.kernels import flash_blocks, flash_gqa
from internlm2_jax.kernels.flash_gqa import Blocks

SMALL = Blocks(128, 128)


@dataclasses.dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    batch: int = 2
    causal: bool = True
    window: int | None = None
    q_offset: int = 0
    segments: int = 0
    sorted: bool = True
    dtype: str = "float32"
    blocks: Blocks = SMALL

    def arrays(self):
        rng = np.random.default_rng(0)
        q, k, v, dout = (
            jnp.asarray(rng.normal(size=(self.batch, length, heads, self.dim)), self.dtype)
            for length, heads in (
                (self.queries, self.heads),
                (self.keys, self.kv_heads),
                (self.keys, self.kv_heads),
                (self.queries, self.heads),
            )
        )
        ids = {"q_segment_ids": None, "kv_segment_ids": None}
        if self.segments:
            for name, length in (("q_segment_ids", self.queries), ("kv_segment_ids", self.keys)):
                drawn = rng.integers(0, self.segments, (self.batch, length)).astype(np.int32)
                ids[name] = np.sort(drawn, axis=1) if self.sorted else drawn
        return q, k, v, dout, ids

    def mask(self):
        return {"causal": self.causal, "window": self.window, "q_offset": self.q_offset}


def run(case: Case, interpret=True):
    """out, lse, dq, dk, dv of the kernels, and the oracle's."""
    q, k, v, dout, ids = case.arrays()
    settings = {**case.mask(), "interpret": interpret, "blocks": case.blocks}

    @oracle.quick
    def both(q, k, v, dout, ids):
        out, lse = flash_gqa.attend(q, k, v, **ids, **settings)
        return out, lse, *flash_gqa.attend_backward(q, k, v, out, lse, dout, **ids, **settings)

    got = both(q, k, v, dout, ids)
    assert got[0].dtype == q.dtype
    assert all(x.dtype == jnp.float32 for x in got[1:])
    return got, oracle.attention(q, k, v, dout, **ids, **case.mask())


FAST = {
    "packed documents": Case(200, 200, segments=5),
    "later queries, window, one kv head, rows that see nothing": Case(
        130, 300, 4, 1, window=100, q_offset=190, segments=3
    ),
    "no causal mask, no groups": Case(100, 290, 3, 3, 16, batch=1, causal=False),
    "queries before the keys": Case(300, 200, 8, 1, 64, batch=1, q_offset=-140),
}
WIDE = {
    "heads of 128": Case(256, 256, dim=128),
    "one row": Case(1, 1),
    "one query, many keys": Case(1, 700, q_offset=699),
    "group of 8": Case(257, 257, 8, 1, 64, segments=4),
    "group of 6": Case(150, 150, 6, 1, 128),
    "window of one": Case(300, 300, window=1),
    "window across blocks": Case(640, 640, 2, 1, window=129),
    "window without causal mask": Case(300, 300, causal=False, window=40),
    "segments in any order": Case(300, 300, segments=3, sorted=False),
    "segments, no causal mask": Case(200, 330, segments=40, causal=False),
    "keys all before the window": Case(128, 256, window=64, q_offset=1000),
    "blocks of different sizes": Case(500, 500, segments=6, blocks=Blocks(128, 256)),
    "large query blocks": Case(500, 500, segments=6, blocks=Blocks(256, 128)),
    "bfloat16": Case(300, 300, 8, 2, 64, segments=3, dtype="bfloat16"),
    "bfloat16, no segments": Case(300, 300, 4, 4, 128, window=150, dtype="bfloat16"),
}


@pytest.mark.parametrize("name", FAST)
def test_matches_float64(name):
    got, want = run(FAST[name])
    oracle.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_matches_float64_widely(name):
    got, want = run(WIDE[name])
    oracle.assert_close(got, want, WIDE[name].dtype)


@pytest.mark.slow
@settings(max_examples=12, derandomize=True)
@given(
    queries=st.integers(1, 400),
    keys=st.integers(1, 400),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 8]),
    dim=st.sampled_from([16, 64, 128]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 500),
    q_offset=st.integers(-300, 400),
    segments=st.integers(0, 6),
    sorted=st.booleans(),
)
def test_matches_float64_on_random_shapes(kv_heads, groups, **drawn):
    case = Case(heads=kv_heads * groups, kv_heads=kv_heads, batch=1, **drawn)
    oracle.assert_close(*run(case))


@pytest.mark.slow
def test_in_a_simulated_tpu():
    case = Case(200, 300, 4, 2, 128, batch=1, segments=4, q_offset=50)
    oracle.assert_close(*run(case, oracle.SIMULATED))


def test_user_facing_gradients():
    """`flash_gqa` is attend and attend_backward with one set of ids, in the inputs' types."""
    q, k, v, dout, ids = Case(150, 150, segments=3, dtype="bfloat16").arrays()
    segments = jnp.asarray(ids["q_segment_ids"])

    @oracle.quick
    def run(q, k, v, dout):
        attention = functools.partial(
            flash_gqa.flash_gqa, segment_ids=segments, window=90, blocks=SMALL, interpret=True
        )
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(dout)

    got = run(q, k, v, dout)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    out, _, *gradients = oracle.attention(
        q, k, v, dout, q_segment_ids=segments, kv_segment_ids=segments, window=90
    )
    names = ("out", "dq", "dk", "dv")
    oracle.assert_close(got, (out, *gradients), "bfloat16", names)


def test_parts_of_the_keys_add_up(monkeypatch):
    """What ring attention relies on: the log-sum-exp of all keys makes gradients of parts exact."""
    case = Case(128, 256, 2, 1, q_offset=128, batch=1)
    q, k, v, dout, _ = case.arrays()
    want = oracle.attention(q, k, v, dout, **case.mask())

    @oracle.quick
    def run(q, k, v, dout):
        settings = {"interpret": True, "blocks": SMALL}
        outs, lses = [], []
        for start in (0, 128):
            part = slice(start, start + 128)
            out, lse = flash_gqa.attend(q, k[:, part], v[:, part], q_offset=128 - start, **settings)
            outs.append(out)
            lses.append(lse)
        lse = jnp.logaddexp(*lses)
        out = sum(
            jnp.exp(part - lse).swapaxes(1, 2)[..., None] * o
            for o, part in zip(outs, lses, strict=True)
        )
        # The same slicing happens inside when the keys' gradients would not fit in VMEM.
        monkeypatch.setattr(flash_gqa, "BACKWARD_KEYS_BYTES", 8 * 128 * 128)
        gradients = flash_gqa.attend_backward(q, k, v, out, lse, dout, q_offset=128, **settings)
        return out, lse, *gradients

    oracle.assert_close(run(q, k, v, dout), want)


def check_visits(queries, keys, causal, window, q_offset, blocks, segments=0, sorted=True):
    """Every pair with a visible score is visited, unmasked ones are whole, no static one more."""
    rng = np.random.default_rng(queries * keys)
    ids = [None, None]
    if segments:
        ids = [rng.integers(0, segments, (2, n)).astype(np.int32) for n in (queries, keys)]
        ids = [np.sort(x, axis=1) for x in ids] if sorted else ids
    mask = {"causal": causal, "window": window, "q_offset": q_offset}
    shape = np.zeros((2, queries, 1, 16)), np.zeros((2, keys, 1, 16))
    case = flash_blocks.Case.of(*shape, segments > 0, causal, window, q_offset, blocks)
    query, words = flash_blocks.steps(case, *ids)
    query = np.asarray(query)
    words = np.broadcast_to(np.asarray(words).reshape(-1, query.size), (2, query.size))
    seen = np.broadcast_to(oracle.visible(queries, keys, *ids, **mask), (2, queries, keys))
    static = oracle.visible(queries, keys, **mask)[0]
    for b in range(2):
        visited = {}
        for i, word in zip(query, words[b], strict=True):
            if word & flash_blocks.VISIBLE:
                visited[i, word >> flash_blocks.FLAG_BITS] = bool(word & flash_blocks.EDGE)
        for i in range(case.query_blocks):
            steps = words[b][query == i]
            assert steps[0] & flash_blocks.FIRST and steps[-1] & flash_blocks.LAST
            assert not any(w & flash_blocks.FIRST for w in steps[1:])
            assert not any(w & flash_blocks.LAST for w in steps[:-1])
            for j in range(case.key_blocks):
                at = (
                    slice(i * blocks.queries, (i + 1) * blocks.queries),
                    slice(j * blocks.keys, (j + 1) * blocks.keys),
                )
                if seen[b][at].any():
                    assert (i, j) in visited
                if not static[at].any():
                    assert (i, j) not in visited
                if not visited.get((i, j), True):
                    whole = seen[b][at]
                    assert whole.all() and whole.shape[1] == blocks.keys


@given(
    queries=st.integers(1, 900),
    keys=st.integers(1, 900),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 700),
    q_offset=st.integers(-500, 900),
    blocks=st.sampled_from([Blocks(128, 128), Blocks(256, 128), Blocks(128, 256)]),
)
@settings(max_examples=60)
def test_visits_what_the_mask_leaves(**drawn):
    check_visits(**drawn)


@pytest.mark.parametrize("segments", [1, 3, 40])
@pytest.mark.parametrize("sorted", [True, False])
def test_visits_what_segments_leave(segments, sorted):
    check_visits(640, 500, True, 300, 50, Blocks(128, 256), segments, sorted)


def test_causal_cost_is_that_of_the_lower_triangle():
    q, k = np.zeros((1, 4096, 8, 128)), np.zeros((1, 4096, 2, 128))
    blocks = Blocks(256, 256)
    triangle = flash_blocks.Case.of(q, k, False, True, None, 0, blocks)
    square = flash_blocks.Case.of(q, k, False, False, None, 0, blocks)
    costs = [
        flash_blocks.cost(case, 2, products=2, q_arrays=2, k_arrays=0)
        for case in (triangle, square)
    ]
    assert costs[1].flops == 4 * 4096 * 4096 * 8 * 128
    assert costs[0].flops * 32 == costs[1].flops * 17  # 16 * 17 / 2 of 16 * 16 pairs
    assert costs[0].transcendentals * 32 == costs[1].transcendentals * 17


@pytest.mark.parametrize("segmented", [False, True])
def test_under_shard_map(segmented):
    """Rows and heads over a mesh of four, with JAX's check of what varies over which axis."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    q, k, v, _, ids = Case(128, 128, segments=2).arrays()
    spec = jax.P("data", None, "tensor")
    specs = (spec, spec, spec, jax.P("data"))
    segments = jnp.asarray(ids["q_segment_ids"]) if segmented else None

    def local(q, k, v, segments, interpret):
        attention = functools.partial(flash_gqa.flash_gqa, blocks=SMALL, interpret=interpret)
        out, pull = jax.vjp(functools.partial(attention, segment_ids=segments), q, k, v)
        return out, *pull(out)

    def sharded(interpret, check_vma):
        function = functools.partial(local, interpret=interpret)
        return jax.shard_map(function, in_specs=specs, out_specs=spec, check_vma=check_vma)

    with jax.set_mesh(mesh):
        arrays = [
            x if x is None else jax.device_put(x, jax.NamedSharding(mesh, spec))
            for x, spec in zip((q, k, v, segments), specs, strict=True)
        ]
        jax.jit(sharded(False, True)).trace(*arrays).lower(lowering_platforms=("tpu",))
        # JAX's interpreter itself fails the check when prefetched scalars vary.
        got = oracle.quick(sharded(True, not segmented))(*arrays)
    out, _, *gradients = oracle.attention(
        q, k, v, got[0], q_segment_ids=segments, kv_segment_ids=segments
    )
    oracle.assert_close(got, (out, *gradients), names=("out", "dq", "dk", "dv"))


def test_bad_input():
    q, k = jnp.zeros((1, 128, 4, 32)), jnp.zeros((1, 128, 3, 32))
    with pytest.raises(UserError, match="4 query heads do not divide into 3"):
        flash_gqa.flash_gqa(q, k, k)
    with pytest.raises(UserError, match="multiples of 128"):
        flash_gqa.flash_gqa(q, q, q, blocks=Blocks(100, 128))
    with pytest.raises(UserError, match="of queries and of keys"):
        flash_gqa.attend(q, q, q, q_segment_ids=jnp.zeros((1, 128), jnp.int32))
    long = jax.ShapeDtypeStruct((1, 2**18, 8, 128), jnp.bfloat16)
    with pytest.raises(UserError, match="do not fit in SMEM"):
        jax.eval_shape(functools.partial(flash_gqa.flash_gqa, blocks=SMALL), long, long, long)
