"""The same update in any number of parts of a batch, and of a mesh: one device and eight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from internlm2_jax import sharding
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.train.objectives import language_model_loss
from internlm2_jax.train.step import init_state, make_train_step

MODEL = build(preset("tiny", initializer_range=0.2))


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(1, 256, (8, 17)).astype(np.int32)
    mask = np.ones((8, 16), np.float32)
    mask[1::2, 5:] = 0  # parts of unequal weight
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)),
        "segment_ids": np.where(np.arange(16) < 9, 1, 2) * np.ones((8, 1), np.int32),
        "loss_mask": mask,
    }


def after_one_step(batch, accumulate, layout=None):
    optimizer = optax.sgd(0.1)
    step = make_train_step(language_model_loss(MODEL), optimizer, accumulate=accumulate)
    params = MODEL.init(jax.random.key(0))
    if layout is None:
        return step(init_state(params, optimizer), batch)
    with sharding.use(layout):
        params = sharding.place(params, MODEL.axes)
        return step(init_state(params, optimizer), sharding.place_rows(batch))


@pytest.mark.parametrize(
    ("accumulate", "layout"),
    [(4, None), (2, "data=2,fsdp=2,tensor=2"), (1, "fsdp=2,context=2,tensor=2")],
)
def test_parts_and_layouts_change_nothing(batch, accumulate, layout):
    state, metrics = after_one_step(batch, 1)
    got_state, got = after_one_step(batch, accumulate, layout)
    assert float(got["tokens"]) == float(metrics["tokens"]) == batch["loss_mask"].sum()
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(got[name], metrics[name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5),
        got_state["params"],
        state["params"],
    )


def test_equal_parts_without_a_weight():
    optimizer = optax.sgd(1.0)
    loss = lambda p, x: (jnp.mean(p["w"] * x), {"mean": x.mean()})  # noqa: E731
    step = make_train_step(loss, optimizer, accumulate=2)
    state, metrics = step(init_state({"w": jnp.float32(0)}, optimizer), jnp.arange(4.0))
    assert float(state["params"]["w"]) == -1.5 and float(metrics["mean"]) == 1.5
