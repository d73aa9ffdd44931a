"""No mesh, one device and eight devices: the same logits, gradients and tokens."""

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

CFG = preset("tiny", initializer_range=0.2, bias=True)
MODEL = build(CFG)
CASES = [("single", 1, 1), ("fsdp", 8, 1), ("fsdp_tp", 4, 2)]


def loss(params, tokens, segments):
    logits = MODEL.logits(params, tokens, segment_ids=segments, remat=True)
    chosen = sharding.take_last(logits[:, :-1], tokens[:, 1:])
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


@pytest.mark.parametrize(("layout", "data", "model"), CASES)
def test_sharded_equals_unsharded(layout, data, model, batch, expected):
    params, ((value, logits), grads) = expected
    mesh = sharding.make_mesh(data, model)
    places = sharding.shardings(MODEL.axes, mesh, layout, MODEL.abstract)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, params, places)
        rows = [jax.device_put(x, P("data")) for x in batch]
        (got, got_logits), got_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            placed, *rows
        )
        close(got, value)
        close(got_logits, logits, 1e-4)
        jax.tree.map(close, got_grads, grads)
        same = jax.tree.map(lambda g, p: g.sharding.spec == p.sharding.spec, got_grads, placed)
        assert all(jax.tree.leaves(same)), same  # a gradient rests where its parameter does


def test_init_on_a_mesh(expected):
    mesh = sharding.make_mesh(4, 2)
    places = sharding.shardings(MODEL.axes, mesh, "fsdp_tp", MODEL.abstract)
    with jax.set_mesh(mesh):
        params = jax.jit(MODEL.init, out_shardings=places)(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected[0])
    gate = params["layers"]["mlp"]["gate"]["weight"]
    assert gate.sharding.spec == P(None, "data", "model")
    assert gate.addressable_shards[0].data.shape == (2, 8, 32)


@pytest.mark.parametrize(("layout", "data", "model"), CASES[1:3])
def test_generation_on_a_mesh(layout, data, model, expected):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    settings = {"max_new_tokens": 6, "sampling": Sampling(1.0, top_p=0.9), "seed": 3}
    alone = engine.generate(MODEL, expected[0], prompts, **settings)
    mesh = sharding.make_mesh(data, model)
    places = sharding.shardings(MODEL.axes, mesh, layout)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, expected[0], places)
        spread = engine.generate(MODEL, placed, prompts, **settings)
    assert spread.tokens == alone.tokens
    for a, b in zip(spread.logprobs, alone.logprobs, strict=True):
        close(a, b, 1e-4)


def test_errors():
    with pytest.raises(UserError, match="needs 16 devices, there are 8"):
        sharding.make_mesh(8, 2)
    with pytest.raises(UserError, match=r"no layout 'tp'.*fsdp_tp"):
        sharding.spec(("embed",), "tp")
    mesh = sharding.make_mesh(1, 8)
    with pytest.raises(
        UserError, match=r"layers/attention/k/.*2 does not divide over .*'model' of 8"
    ):
        sharding.shardings(MODEL.axes, mesh, "fsdp_tp", MODEL.abstract)
