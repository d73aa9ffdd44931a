"""No mesh, one device and eight devices in every layout: the same logits, gradients and tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.infer import engine
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.sharding import Layout

CFG = preset("tiny", initializer_range=0.2, bias=True)
MODEL = build(CFG)
LAYOUTS = ["fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2", "data=8"]


def loss(params, tokens, segments):
    logits = MODEL.logits(params, tokens, segment_ids=segments, remat="full")
    columns = jax.lax.broadcasted_iota(tokens.dtype, logits[:, :-1].shape, 2)
    columns = sharding.constrain(columns, "batch", "length", "vocab")
    chosen = jnp.where(columns == tokens[:, 1:, None], logits[:, :-1], 0).sum(axis=-1)
    return (jax.nn.logsumexp(logits[:, :-1], axis=-1) - chosen).mean(), logits


@pytest.fixture(scope="module")
def batch():
    tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, CFG.vocab_size)
    return tokens, jnp.where(
        jnp.arange(12) < 5, 1, jnp.where(jnp.arange(12) < 10, 2, 0)
    ) + 0 * tokens


@pytest.fixture(scope="module")
def expected(batch):
    params = MODEL.init(jax.random.key(0))
    return params, jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *batch)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("layout", ["", *LAYOUTS])
def test_sharded_equals_unsharded(layout, batch, expected):
    params, ((value, logits), grads) = expected
    layout = Layout.parse(layout)
    mesh = layout.mesh(jax.devices()[: layout.num_devices])
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, params, sharding.shardings(MODEL.axes, mesh))
        rows = [jax.device_put(x, P(("data", "fsdp"))) for x in batch]
        (got, got_logits), got_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            placed, *rows
        )
        close(got, value)
        close(got_logits, logits, 1e-4)
        jax.tree.map(close, got_grads, grads)
        same = jax.tree.map(lambda g, p: g.sharding.spec == p.sharding.spec, got_grads, placed)
        assert all(jax.tree.leaves(same)), same  # a gradient rests where its parameter does


def test_init_on_a_mesh(expected):
    mesh = Layout(fsdp=4, tensor=2).mesh()
    places = sharding.shardings(MODEL.axes, mesh)
    with jax.set_mesh(mesh):
        params = jax.jit(MODEL.init, out_shardings=places)(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected[0])
    gate = params["layers"]["mlp"]["gate"]["weight"]
    assert gate.sharding.spec == P(None, ("fsdp", "context"), "tensor")
    assert gate.addressable_shards[0].data.shape == (2, 8, 32)


@pytest.mark.parametrize("layout", LAYOUTS[1:2])
def test_generation_on_a_mesh(layout, expected):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    settings = {"max_new_tokens": 6, "sampling": Sampling(1.0, top_p=0.9), "seed": 3}
    alone = engine.generate(MODEL, expected[0], prompts, **settings)
    mesh = Layout.parse(layout).mesh()
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, expected[0], sharding.shardings(MODEL.axes, mesh))
        spread = engine.generate(MODEL, placed, prompts, **settings)
    assert spread.tokens == alone.tokens
    for a, b in zip(spread.logprobs, alone.logprobs, strict=True):
        close(a, b, 1e-4)


def test_layout_text():
    assert Layout.parse("fsdp=16, tensor=4") == Layout(fsdp=16, tensor=4)
    assert str(Layout.parse("tensor=4,fsdp=16")) == "fsdp=16,tensor=4"
    assert Layout.parse("").num_devices == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensr=2", r"no mesh axis 'tensr' \(did you mean 'tensor'\?\); there are data, fsdp"),
        ("fsdp=two", "fsdp has size 'two'"),
        ("fsdp=0", "fsdp has size '0'"),
        ("fsdp=2,fsdp=4", "fsdp is given twice"),
    ],
)
def test_bad_layouts(text, message):
    with pytest.raises(UserError, match=message):
        Layout.parse(text)


def test_layouts_that_do_not_divide():
    with pytest.raises(UserError, match="fsdp=16 needs 16 devices, there are 8"):
        Layout(fsdp=16).mesh()
    check = {"axes": MODEL.axes, "abstract": MODEL.abstract}
    with pytest.raises(
        UserError, match=r"layers/attention/k/.*: 2 does not divide over tensor = 8"
    ):
        Layout(tensor=8).check(**check)
    with pytest.raises(UserError, match="batch_size: 6 does not divide over data x fsdp = 4"):
        Layout(data=2, fsdp=2).check(**check, batch=6)
    with pytest.raises(UserError, match="sequence_length: 9 does not divide over context x tensor"):
        Layout(context=2).check(**check, length=9)
    Layout(fsdp=4, tensor=2).check(**check, batch=8, length=12)


@pytest.mark.parametrize("layout", ["", "fsdp=4,context=2", "context=8", "fsdp=2,tensor=4"])
def test_tokens_in_parts_change_nothing(layout):
    """A function of single tokens gives the same values and gradients on parts of their axis."""
    x = jax.random.normal(jax.random.key(0), (4, 64, 16))
    w = jax.random.normal(jax.random.key(1), (16, 16))
    seen = []

    def total(x, w, most):
        def function(part):
            seen.append(part.shape)
            return jnp.sin(sharding.contract(part, w, 1, ("batch", "length", "norm")))

        x = sharding.constrain(x, "batch", "length", None)
        y = sharding.in_parts(function, x, most, most)
        return jnp.sum(jnp.square(y)), y

    with sharding.use(layout):
        grad = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=2)
        whole, parts = (grad(x, w, most) for most in (10**6, 16))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    if "tensor" not in layout:
        assert seen[-1][1] < 64
