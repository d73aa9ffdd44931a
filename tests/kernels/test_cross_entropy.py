"""The fused linear cross-entropy against the plain loss, a float64 oracle, and on eight devices."""

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
from internlm2_jax.kernels import cross_entropy as kernel
from internlm2_jax.kernels.cross_entropy import linear_cross_entropy, linear_logprobs
from internlm2_jax.losses import language_model
from internlm2_jax.plan import hlo


def example(batch=4, time=6, dim=8, vocab=24, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, time, dim))
    weight = rng.normal(size=(dim, vocab))
    targets = rng.integers(0, vocab, (batch, time)).astype(np.int32)
    weights = rng.random((batch, time)) * (rng.random((batch, time)) < 0.7)
    return hidden.astype(dtype), weight.astype(dtype), targets, weights.astype(np.float32)


def oracle(hidden, weight, targets, weights, z_loss):
    """Float64 loss and its gradients for hidden, weight and weights."""
    h, w, c = (np.asarray(x, np.float64) for x in (hidden, weight, weights))
    logits = h @ w
    normaliser = np.log(np.exp(logits).sum(-1))
    onehot = np.eye(w.shape[1])[targets]
    losses = normaliser - (logits * onehot).sum(-1) + z_loss * normaliser**2
    softmax = np.exp(logits - normaliser[..., None])
    dlogits = ((1 + 2 * z_loss * normaliser)[..., None] * softmax - onehot) * c[..., None]
    dweight = np.einsum("btd,btv->dv", h, dlogits)
    return (losses * c).sum(), (dlogits @ w.T, dweight, losses * (c != 0))


def total(hidden, weight, targets, weights, **options):
    return linear_cross_entropy(hidden, weight, targets, weights, **options)[0]


@pytest.mark.parametrize(
    ("chunk", "z_loss"), [(None, 0.0), (None, 1e-2), (1, 1e-2), (7, 0.0), (7, 1e-2), (1000, 0.0)]
)
@pytest.mark.parametrize("parts", [1, 3, 5])
def test_matches_a_float64_oracle(chunk, z_loss, parts):
    arguments = example()
    run = functools.partial(total, z_loss=z_loss, chunk=chunk, parts=parts)
    got, grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 3)))(*arguments)
    expected, expected_grads = oracle(*arguments, z_loss)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(run)(*arguments), expected, rtol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_same_contract_as_the_plain_loss():
    hidden, weight, targets, _ = example()
    for mask in (targets % 2 == 0, np.zeros(targets.shape, bool), targets * 0.5):
        got = linear_cross_entropy(hidden, weight, targets, jnp.asarray(mask), z_loss=1e-3, chunk=7)
        plain = language_model.cross_entropy(hidden @ weight, targets, jnp.asarray(mask), 1e-3)
        np.testing.assert_allclose(got, plain, rtol=1e-5)


def test_the_mean_loss_scales_its_gradient():
    hidden, weight, targets, weights = example()

    def mean(loss, *h):
        value, count = loss(*h)
        return value / count

    fused = jax.grad(
        lambda h, w: mean(functools.partial(linear_cross_entropy, chunk=5), h, w, targets, weights),
        (0, 1),
    )
    plain = jax.grad(
        lambda h, w: mean(language_model.cross_entropy, h @ w, targets, weights), (0, 1)
    )
    for a, b in zip(fused(hidden, weight), plain(hidden, weight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("chunk", "parts"), [(None, 1), (5, 1), (5, 3)])
def test_logprobs_and_their_gradient(chunk, parts):
    hidden, weight, targets, factors = example()
    cuts = {"chunk": chunk, "parts": parts}

    def fused(h, w):
        return jnp.sum(jnp.sin(linear_logprobs(h, w, targets, **cuts)) * factors)

    def plain(h, w):
        return jnp.sum(jnp.sin(language_model.token_logprobs(h @ w, targets)) * factors)

    np.testing.assert_allclose(
        jnp.exp(linear_logprobs(hidden, weight, targets, **cuts)),
        np.take_along_axis(jax.nn.softmax(hidden @ weight), targets[..., None], -1)[..., 0],
        rtol=1e-5,
    )
    for a, b in zip(
        jax.jit(jax.grad(fused, (0, 1)))(hidden, weight),
        jax.grad(plain, (0, 1))(hidden, weight),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_products_have_float32_statistics():
    hidden, weight, targets, weights = example(batch=2, time=64, dim=64, vocab=256)
    hidden, weight = hidden.astype(jnp.bfloat16), np.float32(weight / 8)
    run = jax.value_and_grad(functools.partial(total, chunk=48), argnums=(0, 1))
    got, (dh, dw) = jax.jit(run)(hidden, weight, targets, weights)
    rounded = jnp.asarray(weight, jnp.bfloat16)
    expected, (eh, ew, _) = oracle(hidden, rounded, targets, weights, 0.0)
    assert got.dtype == jnp.float32 and dh.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for a, b in ((dh, eh), (dw, ew)):
        assert np.linalg.norm(np.float64(a) - b) < 6e-3 * np.linalg.norm(b)


def test_huge_logits_and_masked_infinities_stay_finite():
    hidden = jnp.array([[[1e4, 0.0], [0.0, jnp.inf]]])
    weight = jnp.array([[1.0, -1.0], [1.0, 1.0]])
    targets, mask = jnp.zeros((1, 2), jnp.int32), jnp.array([[1.0, 0.0]])
    loss, dh = jax.value_and_grad(total)(hidden, weight, targets, mask)
    assert loss == 0.0
    np.testing.assert_array_equal(dh, np.zeros((1, 2, 2)))
    loss, dh = jax.value_and_grad(functools.partial(total, parts=2))(hidden, weight, targets, mask)
    assert loss == 0.0
    np.testing.assert_array_equal(dh, np.zeros((1, 2, 2)))
    with pytest.raises(UserError, match="chunk is 0"):
        linear_cross_entropy(hidden, weight, targets, mask, chunk=0)
    with pytest.raises(UserError, match="parts is 0"):
        linear_cross_entropy(hidden, weight, targets, mask, parts=0)


# ---------------------------------------------------------------- on a mesh
TOKENS = P(("data", "fsdp"), "context")
MESHES = {  # sizes of data, fsdp, context, tensor; how the head rests
    "fsdp": ((1, 8, 1, 1), P("fsdp", None)),
    "fsdp_tp": ((1, 4, 1, 2), P("fsdp", "tensor")),
    "fsdp_cp": ((1, 2, 4, 1), P("fsdp", None)),
    "all": ((1, 2, 2, 2), P("fsdp", "tensor")),
    "data": ((2, 2, 1, 2), P("fsdp", "tensor")),
    "zero": ((2, 2, 2, 1), P(("fsdp", "context"), None)),
    "replicated": ((2, 4, 1, 1), P(None, None)),
}


def place(mesh, spec, arguments, tokens=TOKENS):
    hidden, weight, *rows = arguments
    specs = (P(*tokens, None), spec, *(tokens,) * len(rows))
    pairs = zip((hidden, weight, *rows), specs, strict=True)
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in pairs]


def make_mesh(sizes):
    names = ("data", "fsdp", "context", "tensor")
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Explicit,) * 4)


@pytest.mark.parametrize(("name", "parts"), [(n, 1) for n in MESHES] + [("all", 3), ("zero", 5)])
def test_on_eight_devices(name, parts):
    sizes, spec = MESHES[name]
    arguments = example(batch=8, time=8)
    expected, expected_grads = oracle(*arguments, 1e-2)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        placed = place(mesh, spec, arguments)
        run = functools.partial(total, z_loss=1e-2, chunk=3, parts=parts)
        got, grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 3)))(*placed)
        for a, b, x in zip(grads, expected_grads, (*placed[:2], placed[3]), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)
            assert a.sharding == x.sharding
        np.testing.assert_allclose(jax.jit(run)(*placed), expected, rtol=1e-5)

        def logprobs(h, w):
            return jnp.sum(linear_logprobs(h, w, placed[2], chunk=3, parts=parts) * placed[3])

        value, grads = jax.jit(jax.value_and_grad(logprobs, (0, 1)))(*placed[:2])
    plain, plain_grads = oracle(*arguments, 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(value, -plain, rtol=1e-5)
    for a, b in zip(grads, plain_grads[:2], strict=True):
        np.testing.assert_allclose(a, -b, atol=2e-5, rtol=1e-5)


def test_sequence_parallel_hidden_states():
    """Rows cut over the vocabulary's axis as well give way to it."""
    arguments = example(batch=2, time=8)
    expected, expected_grads = oracle(*arguments, 0.0)
    mesh = make_mesh((1, 2, 2, 2))
    with jax.set_mesh(mesh):
        placed = place(
            mesh, P("fsdp", "tensor"), arguments, P(("data", "fsdp"), ("context", "tensor"))
        )
        got, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*placed)
        assert [g.sharding for g in grads] == [x.sharding for x in placed[:2]]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for a, b in zip(grads, expected_grads[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_a_batch_too_small_for_its_mesh():
    """Tokens are not cut over fsdp, the head is: its gradient must not count them four times."""
    arguments = example(batch=1, time=8)
    expected, expected_grads = oracle(*arguments, 0.0)
    mesh = make_mesh((1, 4, 1, 2))
    with jax.set_mesh(mesh):
        placed = place(mesh, P("fsdp", "tensor"), arguments, P(None, None))
        got, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(*placed)
        assert grads[1].sharding == placed[1].sharding
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for a, b in zip(grads, expected_grads[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_collectives_do_not_grow_with_the_chunks(name):
    """The head is gathered once and scattered once, outside the loop; logits never travel."""
    sizes, spec = MESHES[name]
    tokens, dim, vocab = 8 * 64, 8, 24
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        placed = place(mesh, spec, example(batch=8, time=64))
        run = jax.value_and_grad(functools.partial(total, chunk=8), argnums=(0, 1))
        text = jax.jit(run).lower(*placed).compile().as_text()
    gathers = re.findall(r" = f32\[([\d,]*)\]\S* all-gather\(", text)
    assert gathers == [f"{dim},{vocab // sizes[3]}"]
    reduced = re.findall(r" = f32\[([\d,]*)\]\S* all-reduce\(", text)
    assert all(np.prod([int(n) for n in s.split(",") if n] or [1]) <= max(
        tokens // (sizes[0] * sizes[1] * sizes[2]) * dim, dim * vocab
    ) for s in reduced)  # fmt: skip
    assert len(re.findall(r"reduce-scatter\(", text)) == 1


def test_never_holds_the_logits_of_a_batch():
    hidden, weight, targets, weights = example(batch=4, time=512, dim=16, vocab=4096)
    run = jax.jit(jax.value_and_grad(functools.partial(total, chunk=128), argnums=(0, 1)))
    compiled = run.lower(hidden, weight, targets, weights).compile()
    logits = 4 * 512 * 4096 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 3


def test_default_chunk_keeps_to_its_budget(monkeypatch):
    monkeypatch.setitem(kernel.CHUNK_BYTES, "cpu", 24 * 4 * 10)
    monkeypatch.setattr(kernel, "PART_BYTES", 8 * 24 * 4 // 2)
    hidden, weight, _, _ = map(jnp.asarray, example())

    def cuts(layout, *given):
        found = kernel._cuts(layout, hidden, weight, *given)
        return found.chunk, found.parts

    whole, gathered = kernel._Layout(), kernel._Layout(embed=("fsdp",))
    assert cuts(whole, None, None) == (8, 1)
    assert cuts(whole, 100, None) == (24, 1)
    assert cuts(whole, 23, None) == (12, 1)
    assert cuts(whole, None, 2) == (12, 2)
    assert cuts(gathered, None, None) == (12, 2)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4])
def test_compiled_for_a_tpu(monkeypatch, parts):
    """Temporaries are a part of the head, of its gradient, and one chunk; the loop over chunks has
    no collective."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    mesh = jax.make_mesh((8,), ("fsdp",), (AxisType.Explicit,), devices=devices)
    tokens, dim, vocab, chunk = 4096, 512, 32768, 512

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P("fsdp")))

    rows = shape(jnp.int32, 8, tokens), shape(jnp.float32, 8, tokens)
    with jax.set_mesh(mesh):
        run = functools.partial(total, chunk=chunk, parts=parts)
        run = jax.value_and_grad(run, argnums=(0, 1))
        arguments = shape(jnp.bfloat16, 8, tokens, dim), shape(jnp.float32, dim, vocab)
        compiled = jax.jit(run).lower(*arguments, *rows).compile()
    head = dim * vocab
    most = ((2 + 4 + 2) * head + (4 + 2) * chunk * vocab) / parts + 2 * 2 * tokens * dim
    if parts > 1:  # those that travel meanwhile
        most += 2 * 2 * 2 * head / parts + 4 * tokens * dim
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * most < 4 * tokens * vocab
    text = compiled.as_text()
    events = hlo.read(text, {"fsdp": 8}).walk()
    moves = [
        (e, n) for e, n in events if isinstance(e, hlo.Collective) and e.payload > head / parts
    ]
    # Each part of the head, again where its normalisers came first, and of the gradient.
    assert sum(n for _, n in moves) == (2 if parts == 1 else 3 * parts)
    assert {e.payload for e, _ in moves} == {2 * head / parts}  # bfloat16
