"""Schedules by hand-computed values, phases joined at their seams, who is decayed and scaled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.train import optimizer


def test_phases_are_played_one_after_another():
    schedule = optimizer.join(
        [
            optimizer.warmup_cosine(1.0, 10, warmup=5, final_ratio=0.5),
            optimizer.warmup_cosine(0.4, 20, final_ratio=0.1),
        ],
        [10, 20],
    )
    values = [float(schedule(i)) for i in range(30)]
    assert values[0] == 0.0
    assert values[5] == pytest.approx(1.0)
    assert 0.5 < values[9] < 0.6
    assert values[10] == pytest.approx(0.4)
    assert values[29] == pytest.approx(0.04, abs=0.01)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_weight_decay_spares_norms_and_biases():
    params = {
        "layers": {
            "attention_norm": {"weight": jnp.ones((2, 3))},
            "q": {"weight": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))},
        }
    }
    tx = optimizer.adamw(0.1, weight_decay=0.5, clip_norm=1.0)
    zero = {"layers": {k: {n: v * 0 for n, v in d.items()} for k, d in params["layers"].items()}}
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_array_equal(updates["layers"]["attention_norm"]["weight"], 0)
    np.testing.assert_array_equal(updates["layers"]["q"]["bias"], 0)
    np.testing.assert_allclose(updates["layers"]["q"]["weight"], -0.05)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        # t = 0, 1/4, 1/2, 3/4 over the last four of ten steps, and 1 after them; r = 1/16.
        ("exponential", [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]),
        ("linear", [1, 1 - 15 / 64, 1 - 15 / 32, 1 - 45 / 64, 1 / 16]),
        ("sqrt", [1, 1 - 15 / 32, 1 - 15 / 16 * 0.5**0.5, 1 - 15 / 16 * 0.75**0.5, 1 / 16]),
    ],
)
def test_warmup_stable_decay(decay, expected):
    schedule = optimizer.warmup_stable_decay(
        0.8, 10, warmup=2, decay_steps=4, decay=decay, final_ratio=1 / 16
    )
    values = [float(schedule(step)) for step in range(12)]
    wanted = [0, 0.4, 0.8, 0.8, 0.8, 0.8, *(0.8 * e for e in expected), 0.8 / 16]
    np.testing.assert_allclose(values, wanted, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(12)), wanted, rtol=1e-6)


def test_without_a_decay_it_stays():
    schedule = optimizer.warmup_stable_decay(0.5, 4, final_ratio=0.0)
    assert [float(schedule(step)) for step in range(6)] == [0.5] * 6


def test_cosine_to_a_tenth():
    schedule = optimizer.warmup_cosine(2.0, 12, warmup=2)
    values = [float(schedule(step)) for step in (0, 1, 2, 7, 12)]
    np.testing.assert_allclose(values, [0, 1, 2, 2 * 0.55, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "cubic"}, "'cubic'; choose one of exponential, linear, sqrt"),
        ({"warmup": 6, "decay_steps": 5}, "6 steps of warm-up and 5 of decay do not fit into 10"),
        ({"decay_steps": 5, "final_ratio": 0.0}, "exponential decay needs one above 0"),
    ],
)
def test_mistakes_in_schedules(options, message):
    with pytest.raises(UserError, match=message):
        optimizer.warmup_stable_decay(1.0, 10, **options)


@pytest.mark.slow
def test_mup_scales_hidden_matrices_alone():
    model = build(preset("tiny", bias=True))
    params = model.init(jax.random.key(0))
    scaled = optimizer.scaled_init(model.init, 4.0)(jax.random.key(0))
    ones = jax.tree.map(jnp.ones_like, params)
    updates = []
    for ratio in (1.0, 4.0):
        tx = optimizer.adamw(0.1, weight_decay=0.5, width_ratio=ratio)
        updates.append(tx.update(ones, tx.init(params), params)[0])
    hidden = set()
    for (path, before), after, plain, wide in zip(
        jax.tree_util.tree_leaves_with_path(params), *map(jax.tree.leaves, (scaled, *updates)),
        strict=True,
    ):  # fmt: skip
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        factor = np.max(np.abs(plain)) / np.max(np.abs(wide))
        if factor == pytest.approx(4):
            hidden.add(name)
            np.testing.assert_allclose(after, before / 2, rtol=1e-6)
        else:
            assert factor == pytest.approx(1), name
            np.testing.assert_array_equal(after, before)
    names = {n.split("/", 1)[1].rsplit("/", 1)[0] for n in hidden}
    assert all(n.startswith("layers/") and n.endswith("weight") for n in hidden) and len(names) == 7


@pytest.mark.parametrize(("limit", "scale"), [(1.0, 3.0), (1.0, 1e-3), (5.0, 0.0)])
def test_clipping_is_optax_s_by_one_factor(limit, scale):
    keys = jax.random.split(jax.random.key(0), 2)
    grads = {
        "a": scale * jax.random.normal(keys[0], (7, 3)),
        "b": scale * jnp.ones(5, jnp.bfloat16),
    }
    (ours, _), (theirs, _) = (
        tx.update(grads, tx.init(grads))
        for tx in (optimizer.clip_by_global_norm(limit), optax.clip_by_global_norm(limit))
    )
    for one, other, grad in zip(*map(jax.tree.leaves, (ours, theirs, grads)), strict=True):
        assert one.dtype == grad.dtype
        np.testing.assert_allclose(one, other, rtol=1e-6 if one.dtype == jnp.float32 else 1e-2)
        if optax.global_norm(grads) <= limit:
            np.testing.assert_array_equal(one, grad)


def test_phases_may_differ_in_all_settings_and_share_their_state():
    params = {"layers": {"q": {"weight": jnp.ones((2, 3, 3))}}}
    grads = {"layers": {"q": {"weight": jnp.full((2, 3, 3), 0.1)}}}
    first = optimizer.adamw(0.1, weight_decay=0.5, clip_norm=1.0)
    second = optimizer.adamw(0.1, weight_decay=0.0, clip_norm=0.01)
    _, state = first.update(grads, first.init(params), params)
    _, state = second.update(grads, state, params)
    assert jax.tree.structure(state) == jax.tree.structure(first.init(params))
    (adam,) = [
        s for s in jax.tree.leaves(state, is_leaf=lambda n: hasattr(n, "mu")) if hasattr(s, "mu")
    ]
    norm = 0.1 * 18**0.5  # of the gradient; the second step clips it to 0.01
    assert int(adam.count) == 2
    np.testing.assert_allclose(
        adam.mu["layers"]["q"]["weight"], 0.9 * 0.1 * 0.1 + 0.1 * 0.1 * 0.01 / norm, rtol=1e-5
    )
