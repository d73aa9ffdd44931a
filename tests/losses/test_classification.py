"""Binary cross-entropy against its definition; one logit per row, whatever the padding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.losses.classification import binary_cross_entropy, pooled_logits
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.models.rope_scaling import DynamicNTK


def test_cross_entropy_of_soft_weighted_labels():
    logits = np.array([2.0, -1.0, 0.5, 0.0])
    labels = np.array([1.0, 0.0, 0.7, 0.5])
    weights = np.array([1.0, 2.0, 0.5, 1.0])
    p = 1 / (1 + np.exp(-logits))
    losses = -labels * np.log(p) - (1 - labels) * np.log(1 - p)
    loss, metrics = binary_cross_entropy(*map(jnp.asarray, (logits, labels, weights)))
    assert float(loss) == pytest.approx(np.sum(weights * losses) / weights.sum(), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx((1 + 2 + 0.5 + 0.5) / 4.5)
    assert float(metrics["positives"]) == pytest.approx((1 + 0.5 + 1) / 4.5)


def test_extreme_logits_stay_finite_with_their_gradients():
    logits, labels = jnp.array([1e4, -1e4]), jnp.array([0.0, 1.0])
    loss, gradient = jax.value_and_grad(lambda x: binary_cross_entropy(x, labels)[0])(logits)
    assert float(loss) == 1e4
    np.testing.assert_allclose(gradient, [0.5, -0.5])


@pytest.fixture(scope="module")
def model():
    cfg = dataclasses.replace(
        preset("tiny"), rope_scaling=DynamicNTK(2.0), max_position_embeddings=8
    )
    model = build(cfg, head="scalar")
    return model, model.init(jax.random.key(0))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_has_no_part_in_it(model, pooling):
    network, params = model
    rng = np.random.default_rng(0)
    short, long = rng.integers(0, 256, (2, 12)), rng.integers(0, 256, (2, 40))
    long[:, :12] = short
    lengths = jnp.array([12, 7])
    first, second = (
        pooled_logits(network, params, jnp.asarray(t, jnp.int32), lengths, pooling)
        for t in (short, long)
    )
    np.testing.assert_allclose(first, second, atol=1e-6)
    alone = pooled_logits(
        network, params, jnp.asarray(short[1:, :7], jnp.int32), lengths[1:], pooling
    )
    np.testing.assert_allclose(first[1:], alone, atol=1e-6)


def test_poolings_are_what_they_say(model):
    network, params = model
    tokens = jnp.arange(10, dtype=jnp.int32)[None]
    scores = network.scores(params, tokens)[0]
    mean, last = (
        pooled_logits(network, params, tokens, jnp.array([10]), pooling)[0]
        for pooling in ("mean", "last")
    )
    assert float(mean) == pytest.approx(float(scores.mean()), rel=1e-5)
    assert float(last) == pytest.approx(float(scores[-1]), rel=1e-5)
    with pytest.raises(UserError, match="pooling='max' is unknown"):
        pooled_logits(network, params, tokens, jnp.array([10]), "max")
