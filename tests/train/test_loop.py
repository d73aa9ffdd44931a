"""A run that is killed and continued gives the numbers and the weights of one that was not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.train import optimizer
from internlm2_jax.train.loop import fit
from internlm2_jax.train.step import init_state, make_train_step

STEPS = 12
OPTIMIZER = optimizer.adamw(optimizer.warmup_cosine(0.1, STEPS, warmup=2))


def loss_fn(params, batch):
    return jnp.mean((batch @ params["w"] - 1.0) ** 2), {"size": jnp.sum(batch)}


STEP = make_train_step(loss_fn, OPTIMIZER)


def initial():
    return init_state({"w": jnp.full((4,), 0.5, jnp.float32)}, OPTIMIZER)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


def batch(step, skipped):
    return np.random.default_rng(step + skipped).normal(size=(8, 4)).astype(np.float32)


def train(step, state, batch, *, killed_at=None):
    if step == killed_at:
        raise Killed
    state, values = STEP(state, batch)
    return state, {**values, "samples": [{"text": f"step {step}"}] if step % 4 == 0 else []}


def run(folder, killed_at=None, **options):
    return fit(
        folder,
        initial(),
        lambda step, state, batch: train(step, state, batch, killed_at=killed_at),
        **{
            "batch": batch,
            "steps": STEPS,
            "label": "test",
            "log_every": 2,
            "checkpoint_every": 5,
            "validate": lambda done, state: {"norm": jnp.sum(state["params"]["w"])},
            "validate_every": 3,
            **options,
        },
    )


@pytest.mark.parametrize("killed_at", [1, 5, 8, 11])
def test_resumed_equals_uninterrupted(tmp_path, killed_at):
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", killed_at=killed_at)
    resumed = run(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_line_cut_short_by_the_kill_is_dropped(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_at=8)
    with open(tmp_path / "metrics.jsonl", "ab") as handle:
        handle.write(b'{"step": 8, "lo')
    run(tmp_path)
    steps = [
        r["step"] for r in files.read_jsonl(tmp_path / "metrics.jsonl") if r["split"] == "train"
    ]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_a_finished_run_trains_no_further(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, killed_at=0)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_validation_rows_and_the_last_one(tmp_path):
    run(tmp_path, steps=10)
    rows = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if r["split"] == "validation"] == [3, 6, 9, 10]


def test_milestones_are_validated_and_saved(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_at=10, milestones=[4, 8])
    rows = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if r["split"] == "validation"] == [3, 4, 6, 8, 9]
    assert (tmp_path / "checkpoints" / "8").is_dir()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def broken(step, state, batch):
        return state, {"loss": np.float32("nan")}

    with pytest.raises(UserError, match="loss is nan after step 1; lower the learning rate"):
        fit(tmp_path, initial(), broken, steps=3, label="test")


def test_a_step_is_compiled_once(tmp_path):
    """A restored part of the state beside a fresh one, as in SFT; then a resumed run."""
    step = make_train_step(loss_fn, OPTIMIZER)
    state = initial()
    state["params"] = jax.device_put(state["params"], jax.devices()[0])
    train = lambda number, state, rows: step(state, rows)  # noqa: E731
    options = {"label": "test", "batch": batch, "checkpoint_every": 2}
    fit(tmp_path, state, train, steps=4, **options)
    fit(tmp_path, initial(), train, steps=6, **options)
    assert step._cache_size() == 1
