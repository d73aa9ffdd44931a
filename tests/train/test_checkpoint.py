"""Checkpoints come back bit for bit; a damaged one is skipped, or named when it is the only one."""

from __future__ import annotations

import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax import sharding
from internlm2_jax.errors import DiskError, UserError
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.train import checkpoint, optimizer
from internlm2_jax.train.checkpoint import Checkpoints, Retention
from internlm2_jax.train.step import init_state


@pytest.fixture(scope="module")
def state():
    model = build(preset("tiny"))
    return init_state(model.init(jax.random.key(0)), optimizer.adamw(1e-3))


KEEP_TWO = Retention(2)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def plus_one(state):
    return jax.tree.map(lambda x: x + 1, state)


def cut_short(folder):
    """Truncates every data file of a checkpoint to half its size."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "d" in path.parent.name and path.stat().st_size > 64:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def saved(folder, *steps, state, record=None, retention=KEEP_TWO):
    with Checkpoints(folder, retention) as checkpoints:
        for step in steps:
            checkpoints.save(step, state, record or {})


def test_round_trip(tmp_path, state):
    record = {"step": 7, "losses": [0.1, 1 / 3, 1e-40]}
    saved(tmp_path, 7, state=state, record=record)
    step, restored, same = Checkpoints(tmp_path).restore_latest(plus_one(state))
    assert step == 7
    assert same == record  # bit for bit
    assert_equal(restored, state)


def test_nothing_to_restore(tmp_path, state):
    step, same, record = Checkpoints(tmp_path).restore_latest(state)
    assert (step, record) == (0, {})
    assert same is state


def test_what_is_trained_on_during_the_save_is_not_what_is_saved(tmp_path):
    """The next steps take the buffers over while threads still write them."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5, tree), donate_argnums=0)
    value = np.random.default_rng(0).normal(size=(64, 1024, 64)).astype(np.float32)
    state = step({"params": {str(i): jnp.asarray(value + i) for i in range(2)}})
    before = jax.device_get(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    for _ in range(5):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.close()
    assert_equal(Checkpoints(tmp_path).restore_latest(state)[1], before)


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, state, caplog):
    saved(tmp_path, 1, 2, state=state)
    cut_short(tmp_path / "checkpoints" / "2")
    step, restored, _ = Checkpoints(tmp_path).restore_latest(plus_one(state))
    assert step == 1
    assert_equal(restored, state)
    assert "2 is damaged" in caplog.text
    assert checkpoint.latest_step(tmp_path) == 1  # the run comes to step 2 again


@pytest.mark.parametrize("missing", ["record", "opt_state"])
def test_a_checkpoint_without_an_item_is_damaged(tmp_path, state, missing):
    saved(tmp_path, 1, 2, state=state)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / missing)
    assert Checkpoints(tmp_path).restore_latest(state)[0] == 1


def test_when_all_are_damaged_none_is_removed(tmp_path, state):
    saved(tmp_path, 1, 2, state=state)
    for step in ("1", "2"):
        cut_short(tmp_path / "checkpoints" / step)
    with pytest.raises(UserError, match=r"all checkpoints .* are damaged \(2, 1\); remove that"):
        Checkpoints(tmp_path).restore_latest(state)
    assert checkpoint.whole_steps(tmp_path / "checkpoints") == [1, 2]


def test_an_unfinished_checkpoint_is_not_seen(tmp_path, state):
    saved(tmp_path, 1, state=state)
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path).restore_latest(state)[0] == 1
    assert checkpoint.latest_step(tmp_path) == 1


def test_retention(tmp_path):
    small = {"params": {"x": jnp.ones(3)}}
    saved(tmp_path, *range(1, 11), state=small, retention=Retention(2, every=4, milestones=[3]))
    assert checkpoint.whole_steps(tmp_path / "checkpoints") == [3, 4, 8, 9, 10]


@pytest.mark.slow
def test_another_mesh(tmp_path):
    model = build(preset("tiny"))
    tx = optimizer.adamw(1e-3)

    def on(layout, key):
        with sharding.use(layout):
            return init_state(sharding.create(model.init, model.axes, jax.random.key(key)), tx)

    wide = on("fsdp=8", 0)
    saved(tmp_path, 1, state=wide)
    checkpoint.save_model_json(tmp_path, model.cfg, "lm")
    narrow = on("data=2,fsdp=2,tensor=2", 1)
    _, moved, _ = Checkpoints(tmp_path).restore_latest(narrow)
    assert_equal(moved, wide)
    jax.tree.map(lambda a, b: _same_place(a, b), moved, narrow)
    with sharding.use("fsdp=4,tensor=2"):
        _, params = checkpoint.load_model(tmp_path)
        jax.tree.map(_same_place, params, sharding.place(params, model.axes))
    assert_equal(params, wide["params"])


def _same_place(a, b):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


def test_a_lost_folder_is_one_line(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    checkpoints.wait()
    checkpoints.folder.rename(tmp_path / "elsewhere")
    checkpoints.folder.write_text("in its place")
    with pytest.raises(DiskError, match="a part of the path is no folder any more") as error:
        checkpoints.save(2, state)
        for _ in range(100):
            checkpoints.check()
            time.sleep(0.05)
    assert "\n" not in str(error.value)


def test_model_loads_its_parameters_alone(tmp_path, state):
    saved(tmp_path, 3, state=state)
    checkpoint.save_model_json(tmp_path, preset("tiny"), "lm")
    model, params = checkpoint.load_model(tmp_path)
    assert model.cfg == preset("tiny")
    assert_equal(params, state["params"])


def test_truncated_model_is_one_line_with_the_mend(tmp_path, state):
    stage = tmp_path / "sft"
    saved(stage, 3, state=state)
    checkpoint.save_model_json(stage, preset("tiny"), "lm")
    cut_short(stage / "checkpoints" / "3")
    with pytest.raises(UserError, match=r"is damaged .*--only sft --redo") as error:
        checkpoint.load_model(stage)
    assert "\n" not in str(error.value)


def test_no_checkpoint_at_all(tmp_path):
    checkpoint.save_model_json(tmp_path, preset("tiny"), "lm")
    with pytest.raises(UserError, match="holds no checkpoint; run the stage that makes it"):
        checkpoint.load_model(tmp_path)
