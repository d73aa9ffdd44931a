"""LoRA: adapters beside frozen matrices, and the merged model that is the same function."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.models import lora
from internlm2_jax.models.build import build
from internlm2_jax.models.config import LoRA, from_json, preset, to_json

CFG = preset("tiny", initializer_range=0.2)
ADAPTERS = LoRA(rank=3, alpha=12.0)
BASE, TOKENS = build(CFG), jax.random.randint(jax.random.key(5), (4, 24), 1, CFG.vocab_size)
ADAPTED = lora.adapted(BASE, ADAPTERS)


@pytest.fixture(scope="module")
def params():
    return BASE.init(jax.random.key(0))


@pytest.fixture(scope="module")
def trained():
    """Adapters whose B is not zero any more."""
    fresh = lora.init(ADAPTED, jax.random.key(1))
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh
    )


def test_fresh_adapters_change_nothing(params):
    fresh = lora.init(ADAPTED, jax.random.key(1))
    got = ADAPTED.logits(lora.join(params, fresh), TOKENS)
    np.testing.assert_array_equal(got, BASE.logits(params, TOKENS))


def test_merged_is_the_same_function(params, trained):
    joined = ADAPTED.logits(lora.join(params, trained), TOKENS)
    merged = lora.merge(params, trained, ADAPTERS)
    np.testing.assert_allclose(BASE.logits(merged, TOKENS), joined, atol=3e-4)
    assert np.abs(joined - BASE.logits(params, TOKENS)).max() > 0.1
    assert merged["embed"]["weight"] is params["embed"]["weight"]


def test_merge_by_hand(params, trained):
    q, found = params["layers"]["attention"]["q"]["weight"], trained["layers"]["attention"]["q"]
    a, b = np.asarray(found["lora_a"][1], np.float64), np.asarray(found["lora_b"][1], np.float64)
    expected = np.asarray(q[1], np.float64) + 4.0 * np.tensordot(a, b, 1)
    merged = lora.merge(params, trained, ADAPTERS)["layers"]["attention"]["q"]["weight"][1]
    np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_split_and_join(params, trained):
    rest, adapters = lora.split(lora.join(params, trained))
    jax.tree.map(np.testing.assert_array_equal, rest, params)
    jax.tree.map(np.testing.assert_array_equal, adapters, trained)
    some = lora.adapted(BASE, LoRA(targets=("q", "down")))
    names = lora.split(some.axes)[1]["layers"]
    assert {part: sorted(kinds) for part, kinds in names.items()} == {
        "attention": ["q"], "mlp": ["down"],
    }  # fmt: skip


@pytest.mark.slow
def test_gradients_reach_adapters_only_and_on_a_mesh_too(params, trained):
    def loss(adapters):
        whole = lora.join(jax.lax.stop_gradient(frozen), adapters)
        return jnp.mean(jnp.square(ADAPTED.logits(whole, tokens)))

    frozen, tokens = params, TOKENS
    alone = jax.jit(jax.grad(loss))(trained)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(alone))
    with sharding.use("data=2,fsdp=2,tensor=2"):
        frozen = sharding.place(params, BASE.axes)
        placed = sharding.place(trained, lora.split(ADAPTED.axes)[1])
        tokens = sharding.place_rows(np.asarray(TOKENS))
        cut = jax.device_get(jax.jit(jax.grad(loss))(placed))
        merged = jax.device_get(lora.merge(frozen, placed, ADAPTERS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6), cut, alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        merged,
        lora.merge(params, trained, ADAPTERS),
    )


def test_settings(params):
    cfg = dataclasses.replace(CFG, lora=ADAPTERS)
    assert from_json(to_json(cfg)) == cfg
    for wrong, match in (
        ({"rank": 0}, "rank is 0; it must be 1 or more"),
        ({"alpha": -1}, "alpha is -1"),
        ({"targets": ("qq",)}, "no target 'qq' \\(did you mean 'q'"),
        ({"targets": ()}, "targets is empty"),
    ):
        with pytest.raises(UserError, match=match):
            LoRA(**wrong)
    with pytest.raises(UserError, match="adapters already"):
        lora.adapted(ADAPTED, ADAPTERS)
