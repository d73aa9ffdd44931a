"""Checkpoints come back bit for bit; a damaged one is skipped, or named when it is the only one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.train import checkpoint, optimizer
from internlm2_jax.train.step import init_state


@pytest.fixture(scope="module")
def state():
    model = build(preset("tiny"))
    return init_state(model.init(jax.random.key(0)), optimizer.adamw(1e-3))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def plus_one(state):
    return jax.tree.map(lambda x: x + 1, state)


def cut_short(folder):
    """Truncates every data file of a checkpoint to half its size."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "d" in path.parent.name and path.stat().st_size > 64:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_round_trip(tmp_path, state):
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(7, state)
    step, restored = checkpoint.Checkpoints(tmp_path).restore_latest(plus_one(state))
    assert step == 7
    assert_equal(restored, state)


def test_nothing_to_restore(tmp_path, state):
    step, same = checkpoint.Checkpoints(tmp_path).restore_latest(state)
    assert step == 0
    assert same is state


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, state, caplog):
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(1, state)
    saved.save(2, plus_one(state))
    cut_short(tmp_path / "checkpoints" / "2")
    step, restored = checkpoint.Checkpoints(tmp_path).restore_latest(state)
    assert step == 1
    assert_equal(restored, state)
    assert "2 is damaged" in caplog.text


def test_an_unfinished_checkpoint_is_not_seen(tmp_path, state):
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(1, state)
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.Checkpoints(tmp_path).restore_latest(state)[0] == 1
    assert checkpoint.latest_step(tmp_path) == 1


def test_only_the_newest_are_kept(tmp_path, state):
    saved = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        saved.save(step, {"params": {"x": jnp.ones(3)}})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [
        "2",
        "3",
    ]


def test_model_loads_its_parameters_alone(tmp_path, state):
    checkpoint.Checkpoints(tmp_path).save(3, state)
    checkpoint.save_model_json(tmp_path, preset("tiny"), "lm")
    model, params = checkpoint.load_model(tmp_path)
    assert model.cfg == preset("tiny")
    assert_equal(params, state["params"])


def test_truncated_model_is_one_line_with_the_mend(tmp_path, state):
    stage = tmp_path / "sft"
    checkpoint.Checkpoints(stage).save(3, state)
    checkpoint.save_model_json(stage, preset("tiny"), "lm")
    cut_short(stage / "checkpoints" / "3")
    with pytest.raises(UserError, match=r"is damaged .*--only sft --redo") as error:
        checkpoint.load_model(stage)
    assert "\n" not in str(error.value)


def test_no_checkpoint_at_all(tmp_path):
    checkpoint.save_model_json(tmp_path, preset("tiny"), "lm")
    with pytest.raises(UserError, match="holds no checkpoint; run the stage that makes it"):
        checkpoint.load_model(tmp_path)
