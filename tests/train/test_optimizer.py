"""Schedules meet at the seams of the phases; norms are not decayed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

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
