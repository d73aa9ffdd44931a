"""Weights of few bits: what they stand for, their products, and a model made of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.models.build import build, unstacked
from internlm2_jax.models.config import preset
from internlm2_jax.models.quantise import _quantised, quantise

CFG = preset("tiny", initializer_range=0.2)
SHAPES = {"one input axis": ((64, 4, 6), 1), "two": ((3, 32, 8), 2)}


@pytest.fixture(scope="module")
def model():
    return build(CFG)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_a_weight_is_within_half_a_step(bits, name):
    shape, inputs = SHAPES[name]
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kept = _quantised(jnp.asarray(weight), bits, inputs, 0, 16, "q")
    flat = weight.reshape(-1, 16, kept.scales.shape[1])
    most = 127 if bits == 8 else 7
    np.testing.assert_allclose(kept.scales, np.abs(flat).max(axis=1) / most, rtol=1e-6)
    got = np.asarray(kept.weight(jnp.float32)).reshape(flat.shape)
    assert (np.abs(got - flat) <= np.asarray(kept.scales)[:, None] * 0.5001).all()
    # Numbers that are on the steps come back as they were: the packing loses nothing.
    steps = np.random.default_rng(1).integers(-most, most + 1, flat.shape)
    steps[:, 0] = most
    exact = _quantised(jnp.asarray(steps.reshape(shape), jnp.float32), bits, inputs, 0, 16, "q")
    np.testing.assert_array_equal(exact.weight(jnp.float32), steps.reshape(shape))
    assert exact.values.nbytes == weight.size * bits // 8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_integers(bits, rows):
    """Against float64, the inputs rounded as the docstring says."""
    random = np.random.default_rng(2)
    weight = random.normal(size=(2, 32, 12)).astype(np.float32)
    x = random.normal(size=(rows, 1, 2, 32)).astype(np.float32)
    kept = _quantised(jnp.asarray(weight), bits, 2, 0, 16, "o")
    grouped = x.reshape(rows, 4, 16).astype(np.float64)
    scale = np.abs(grouped).max(axis=-1, keepdims=True) / 127
    whole = np.asarray(kept.weight(jnp.float32), np.float64).reshape(4, 16, 12)
    want = np.einsum("rgi,gio->ro", np.round(grouped / scale) * scale, whole)
    got = jax.jit(kept.product, static_argnums=1)(x, jnp.float32)
    assert got.shape == (rows, 1, 12)
    np.testing.assert_allclose(got[:, 0], want, atol=1e-4)
    assert np.abs(got[:, 0] - np.einsum("rni,nio->ro", x[:, 0], weight)).max() > 1e-3


@pytest.mark.parametrize(("kind", "most"), [("int8", 2e-3), ("int4", 0.15)])
def test_a_model_of_few_bits_is_close(model, params, kind, most):
    ids = jnp.asarray(np.random.default_rng(3).integers(0, CFG.vocab_size, (2, 24)))
    small = quantise(params, kind)
    exact, got = (jax.nn.log_softmax(model.logits(p, ids)) for p in (params, small))
    divergence = (jnp.exp(exact) * (exact - got)).sum(axis=-1)
    assert 0 < divergence.mean() < most
    # Layers apart are the same numbers; norms and the embedding are the same arrays.
    apart = quantise(unstacked(params), kind)["layers"][1]["mlp"]["down"]["weight"]
    np.testing.assert_array_equal(apart.values, small["layers"]["mlp"]["down"]["weight"].values[1])
    assert small["embed"]["weight"] is params["embed"]["weight"]
    assert small["head"]["weight"].bits == 8


@pytest.mark.parametrize(("kind", "group"), [("int8", 88), ("int4", 44)])
def test_widths_that_are_no_multiple_of_a_whole_group(kind, group):
    """An MLP of 352, the demo's, is cut into the largest groups that divide it."""
    weight = jax.random.normal(jax.random.key(0), (2, 352, 64))
    kept = quantise({"layers": {"down": {"weight": weight}}}, kind)["layers"]["down"]["weight"]
    assert kept.scales.shape == (2, 352 // group, 64)
    one = quantise({"layers": [{"down": {"weight": weight[0]}}]}, kind)["layers"][0]["down"]
    error = jnp.abs(one["weight"].weight(jnp.float32) - weight[0]).max()
    assert error <= one["weight"].scales.max() * 0.51


def test_a_width_that_no_group_divides():
    with pytest.raises(UserError, match=r"down of \(353, 64\) does not divide .*; use auto"):
        quantise({"layers": {"down": {"weight": jnp.ones((2, 353, 64))}}}, "int8")


def test_auto_leaves_the_weights(params):
    assert quantise(params, "auto") is params


def test_bad_kinds_and_groups(params):
    with pytest.raises(UserError, match="no weight type 'int3'; there are auto, int8, int4"):
        quantise(params, "int3")
    with pytest.raises(UserError, match=r"k of \(\d+, \d+, \d+\) does not divide into groups of 5"):
        quantise({"layers": {"k": {"weight": jnp.ones((2, 64, 2, 8))}}}, "int8", group=5)
