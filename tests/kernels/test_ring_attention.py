"""Context-parallel attention against one device's, and its plain-JAX parts against float64."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from internlm2_jax.errors import UserError
from internlm2_jax.kernels import attention, partial_attention
from internlm2_jax.kernels.ring_attention import LOOPS, ring_attention
from internlm2_jax.zigzag import unzigzag, zigzag

# Compiling these programs takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0}


def example(batch=2, length=32, heads=4, kv_heads=2, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    q, dout = (rng.normal(size=(batch, length, heads, dim)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(batch, length, kv_heads, dim)).astype(np.float32) for _ in range(2))
    # Documents of random lengths, so that they cross the borders of chunks; padding at the end.
    ends = np.sort(rng.integers(1, length, (batch, 3)), axis=1)
    ids = 1 + (np.arange(length) >= ends[:, :, None]).sum(axis=1)
    return q, k, v, dout, np.where(ids == 4, 0, ids).astype(np.int32)


def oracle(q, k, v, dout, ids=None, see=None):
    """Float64 output, log-sum-exp and gradients; `see` [B, T, S] replaces the causal mask."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    groups = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    if see is None:
        see = np.tri(q.shape[1], dtype=bool)[None]
        see = see if ids is None else see & (ids[:, :, None] == ids[:, None, :])
    scale = 1 / np.sqrt(q.shape[3])
    scores = np.where(see[:, None], np.einsum("btnh,bsnh->bnts", q, k) * scale, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(scores).sum(-1))
    p = np.where(see[:, None], np.exp(scores - np.where(np.isfinite(lse), lse, 0)[..., None]), 0)
    out = np.einsum("bnts,bsnh->btnh", p, v)
    dp = np.einsum("btnh,bsnh->bnts", dout, v)
    ds = p * (dp - np.einsum("btnh,btnh->bnt", out, dout)[..., None]) * scale
    fold = lambda x: x.reshape(*x.shape[:2], -1, groups, x.shape[3]).sum(axis=3)  # noqa: E731
    return (
        out,
        lse,
        np.einsum("bnts,bsnh->btnh", ds, k),
        fold(np.einsum("bnts,btnh->bsnh", ds, q)),
        fold(np.einsum("bnts,btnh->bsnh", p, dout)),
    )


# ---------------------------------------------------------------- parts of the keys
@pytest.mark.parametrize(
    ("causal", "window", "offset", "keys"),
    [(True, None, 0, 24), (False, None, 0, 10), (True, 7, 3, 40), (True, None, -9, 12)],
)
def test_partial_attention_matches_a_float64_oracle(causal, window, offset, keys, monkeypatch):
    monkeypatch.setattr(partial_attention, "BLOCK", 16)  # several blocks, the last one short
    q, _, _, dout, _ = example(length=24)
    rng = np.random.default_rng(1)
    k, v = (rng.normal(size=(2, keys, 2, 8)).astype(np.float32) for _ in range(2))
    q_ids, kv_ids = rng.integers(0, 3, (2, 24)), rng.integers(0, 3, (2, keys))
    distance = np.arange(24)[:, None] + offset - np.arange(keys)
    see = (distance >= 0) if causal else np.ones_like(distance, bool)
    see = see if window is None else see & (distance < window)
    see = see & (q_ids[:, :, None] == kv_ids[:, None, :])
    out, lse, *grads = oracle(q, k, v, dout, see=see)
    options = {
        "q_segment_ids": q_ids,
        "kv_segment_ids": kv_ids,
        "causal": causal,
        "window": window,
        "q_offset": offset,
    }
    got, got_lse = jax.jit(functools.partial(partial_attention.attend, **options))(q, k, v)
    np.testing.assert_allclose(got, out, atol=1e-5)
    seen = np.isfinite(lse)
    np.testing.assert_allclose(got_lse[seen], lse[seen], atol=1e-5)
    assert np.all(got_lse[~seen] == partial_attention.EMPTY) and (~seen).any()
    backward = jax.jit(functools.partial(partial_attention.attend_backward, **options))
    for a, b in zip(backward(q, k, v, got, got_lse, dout), grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


# ---------------------------------------------------------------- zig-zag order
@pytest.mark.parametrize("ways", [1, 2, 4])
def test_zigzag_round_trip(ways):
    x = np.arange(2 * 16 * 3).reshape(2, 16, 3)
    for array in (x, jnp.asarray(x)):
        there = zigzag(array, ways)
        np.testing.assert_array_equal(unzigzag(there, ways), x)
        np.testing.assert_array_equal(
            zigzag(array.swapaxes(0, 1), ways, axis=0), there.swapaxes(0, 1)
        )
    size = 16 // (2 * ways)
    for device in range(ways):
        held = zigzag(np.arange(16)[None], ways)[0].reshape(ways, -1)[device]
        low, high = device * size, (2 * ways - 1 - device) * size
        expected = [*range(low, low + size), *range(high, high + size)]
        assert held.tolist() == expected


def test_errors():
    with pytest.raises(UserError, match=r"rows of 20 tokens .* 8 chunks.*multiple of 8"):
        zigzag(np.zeros((1, 20)), 4)
    q, k, v, _, _ = example(length=20)
    with pytest.raises(UserError, match="sliding window of 4"):
        ring_attention(q, k, v, window=4)
    with pytest.raises(UserError, match="'gather'; there are ring, all_gather"):
        ring_attention(q, k, v, impl="gather")
    mesh = make_mesh(context=4, tensor=2)
    with jax.set_mesh(mesh):
        with pytest.raises(UserError, match=r"rows of 20 tokens .* 4 devices"):
            ring_attention(*place(mesh, P(None, None, None), q, k, v))
        q, k, v, _, _ = example(length=16, heads=4, kv_heads=1)
        q, k, v = place(mesh, P(None, None, "tensor"), q), *place(mesh, P(), k, v)
        with pytest.raises(UserError, match=r"1 kv heads do not divide .*tensor.* of 2"):
            ring_attention(q[0], k, v)


# ---------------------------------------------------------------- on a mesh
def make_mesh(data=1, fsdp=1, context=1, tensor=1):
    sizes, names = (data, fsdp, context, tensor), ("data", "fsdp", "context", "tensor")
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, (AxisType.Explicit,) * 4, devices=devices)


def place(mesh, spec, *arrays):
    return [jax.device_put(x, NamedSharding(mesh, P(*spec[: x.ndim]))) for x in arrays]


def run(mesh, arrays, ids, **options):
    """Output and gradients, in natural order, of arrays in natural order."""
    ways = mesh.shape["context"]
    spec = P("fsdp", "context", "tensor")
    q, k, v, dout = place(mesh, spec, *(zigzag(x, ways) for x in arrays))

    def loss(q, k, v, ids):
        out = ring_attention(q, k, v, segment_ids=ids, **options)
        return jnp.sum(out * dout), out

    with jax.set_mesh(mesh):
        ids = None if ids is None else place(mesh, P("fsdp", "context"), zigzag(ids, ways))[0]
        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)
        grads, out = grad(q, k, v, ids)
        for gradient, x in zip(grads, (q, k, v), strict=True):
            assert gradient.sharding.is_equivalent_to(x.sharding, x.ndim)
    return [unzigzag(np.asarray(x), ways) for x in (out, *grads)]


CASES = [
    ("ring", {"context": 1}, True),
    ("ring", {"context": 2, "fsdp": 2}, True),
    ("ring", {"context": 4, "tensor": 2}, True),
    ("ring", {"context": 8}, True),
    ("ring", {"context": 4}, False),
    ("all_gather", {"context": 4, "tensor": 2}, True),
    ("all_gather", {"context": 2}, False),
]


@pytest.mark.parametrize(("impl", "sizes", "segments"), CASES)
def test_equals_attention_on_one_device(impl, sizes, segments):
    *arrays, ids = example(length=48)
    got = run(make_mesh(**sizes), arrays, ids if segments else None, impl=impl)
    out, _, *grads = oracle(*arrays, ids if segments else None)
    for a, b in zip(got, (out, *grads), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)
    q, k, v, _ = map(jnp.asarray, arrays)
    reference = attention.reference(q, k, v, segment_ids=jnp.asarray(ids) if segments else None)
    np.testing.assert_allclose(got[0], reference, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_of_query_heads(groups):
    *arrays, ids = example(length=16, heads=2 * groups, kv_heads=2)
    got = run(make_mesh(context=2), arrays, ids)
    out, _, *grads = oracle(*arrays, ids)
    for a, b in zip(got, (out, *grads), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_without_a_mesh():
    q, k, v, _, ids = example(length=19)
    np.testing.assert_allclose(
        ring_attention(*map(jnp.asarray, (q, k, v)), segment_ids=jnp.asarray(ids)),
        attention.reference(*map(jnp.asarray, (q, k, v)), segment_ids=jnp.asarray(ids)),
        atol=1e-5,
    )


def test_bfloat16_is_merged_in_float32():
    *arrays, ids = example(length=64)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    got = run(make_mesh(context=8), [np.asarray(x) for x in rounded], ids)
    out, _, *grads = oracle(*(np.float64(x) for x in rounded), ids)
    for a, b in zip(got, (out, *grads), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float64(a) - b) < 1e-2 * np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("impl", LOOPS)
def test_with_the_pallas_kernel_interpreted(impl):
    *arrays, ids = example(length=512, dim=16)
    got = run(make_mesh(context=2), arrays, ids, impl=impl, interpret=True)
    out, _, *grads = oracle(*arrays, ids)
    for a, b in zip(got, (out, *grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_no_product_is_masked_out(ways, monkeypatch):
    """Pairs computed by all devices are the pairs of the causal triangle, equally many on each."""
    calls = []
    attend = partial_attention.attend

    def counting(q, k, v, *, causal, **options):
        pairs = q.shape[1] * k.shape[1]
        calls.append(pairs if not causal else (pairs + q.shape[1]) // 2)
        return attend(q, k, v, causal=causal, **options)

    monkeypatch.setattr(partial_attention, "attend", counting)
    length, mesh = 16 * ways, make_mesh(context=ways)
    q, k, v, _, _ = example(length=length)
    with jax.set_mesh(mesh):
        arrays = place(mesh, P(None, "context"), q, k, v)
        text = str(jax.make_jaxpr(ring_attention)(*arrays))
    own, *hops = calls
    hops = {a + b for a, b in zip(hops[::2], hops[1::2], strict=True)}
    assert own == 8 * 17 and hops == {2 * 8 * 8}
    assert ways * (own + (ways - 1) * hops.pop()) == length * (length + 1) // 2
    assert "cond[" not in text  # no device takes another path


def collectives(text):
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= [^=]*? ({names})(?:-start)?\(", text)
    return {name: found.count(name) for name in set(found)}


@pytest.mark.parametrize("impl", LOOPS)
def test_only_keys_travel(impl):
    *arrays, ids = example(length=32)
    mesh = make_mesh(context=8)
    q, k, v, dout = place(mesh, P(None, "context"), *arrays)
    ids = place(mesh, P(None, "context"), ids)[0]
    with jax.set_mesh(mesh):
        grad = jax.grad(
            lambda q, k, v: jnp.sum(ring_attention(q, k, v, segment_ids=ids, impl=impl) * dout),
            argnums=(0, 1, 2),
        )
        text = jax.jit(grad).lower(q, k, v).compile().as_text()
    seen = collectives(text)
    if impl == "ring":
        # k, v and ids travel for the first hop, the second, and those of the loop, in both passes
        # (the compiler may find that the first two hops are the same in both); dk and dv in the
        # loop, for the last hop, and home.
        assert set(seen) == {"collective-permute"}
        assert seen["collective-permute"] in (3 * 2 + 3 * 2 + 2 * 3, 3 * 3 * 2 + 2 * 3)
    else:
        assert seen in ({"all-gather": n * 3, "reduce-scatter": 2} for n in (1, 2))


@pytest.mark.slow
def test_compiled_for_a_tpu_the_keys_travel_while_products_run(monkeypatch):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    names = ("fsdp", "context")
    mesh = jax.make_mesh((2, 4), names, (AxisType.Explicit,) * 2, devices=devices)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(*names)))

    def step(q, k, v, ids, dout):
        out, vjp = jax.vjp(lambda *qkv: ring_attention(*qkv, segment_ids=ids), q, k, v)
        return out, vjp(dout)

    temporaries = []
    for length in (65536, 131072):  # what is shorter stays in on-chip memory
        query, key = shape(2, length, 8, 128), shape(2, length, 2, 128)
        with jax.set_mesh(mesh):
            ids = shape(2, length, dtype=jnp.int32)
            compiled = jax.jit(step).lower(query, key, key, ids, query).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    text = compiled.as_text()
    assert not re.search(r" (all-gather|all-reduce|reduce-scatter|collective-permute)\(", text)
    assert "collective-permute-start(" in text
    # In the order of the schedule, a kernel runs between the start of a transfer and its end.
    assert re.search(r"collective-permute-start\((?:(?!-done\().)*flash_gqa_\w+", text, re.DOTALL)

    assert temporaries[1] < 2.2 * temporaries[0]  # linear in the length
