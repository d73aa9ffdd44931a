"""Preemption, hangs, bad losses, a full and a lost disk: each injected, each survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from internlm2_jax import files
from internlm2_jax.errors import RESTART, DiskError, Preempted, UserError
from internlm2_jax.train import faults, session
from internlm2_jax.train.clock import Clock
from internlm2_jax.train.faults import LossWatch, Recovery, Skip, Skips
from internlm2_jax.train.loop import fit
from internlm2_jax.train.session import Session

ROOT = Path(__file__).parents[2]


def batch(step, skipped=0):
    return np.random.default_rng(step + skipped).normal(size=4).astype(np.float32)


def train(step, state, rows):
    weights = state["params"]["w"]
    loss = ((weights - rows) ** 2).mean()
    return {"params": {"w": weights - 0.1 * (weights - rows)}}, {"loss": loss, "read": rows[0]}


def run(folder, train=train, batch=batch, **options):
    return fit(
        folder,
        {"params": {"w": jax.numpy.zeros(4)}},
        train,
        **{
            "steps": 20,
            "label": "test",
            "batch": batch,
            "log_every": 1,
            "checkpoint_every": 5,
            **options,
        },
    )


def rows(folder, split="train"):
    return [r for r in files.read_jsonl(folder / "metrics.jsonl") if r["split"] == split]


# --------------------------------------------------------------------------------- bad losses


def poisoned(*numbers):
    """Batches of which some hold a NaN; they are told by their number."""

    def read(step, skipped):
        rows = batch(step + skipped)
        return np.full_like(rows, np.nan) if step + skipped in numbers else rows

    return read


THRICE = Recovery(max_rollbacks=3)


def test_rolls_back_and_leaves_the_batches_out(tmp_path):
    run(tmp_path, batch=poisoned(12), recovery=THRICE)
    # from checkpoint 10 on, batches 10, 11 and 12 are left out
    expected = [*range(10), *range(13, 23)]
    assert [r["read"] for r in rows(tmp_path)] == [float(batch(n)[0]) for n in expected]
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 21))
    [event] = rows(tmp_path, "event")
    assert event == {
        "step": 11, "split": "event", "event": "skip", "at": 10, "count": 3,
        "reason": "loss is nan after step 13",
    }  # fmt: skip


def test_a_second_fault_after_the_same_checkpoint(tmp_path):
    run(tmp_path, batch=poisoned(12, 14), recovery=THRICE)
    skips = files.read_json(tmp_path / "skips.json")
    assert [(s["at"], s["count"]) for s in skips] == [(10, 3), (10, 2)]
    assert rows(tmp_path)[10]["read"] == float(batch(15)[0])


def test_what_was_left_out_before_a_milestone_does_not_count_after_it(tmp_path):
    run(tmp_path, batch=poisoned(7), recovery=THRICE, milestones=[10])
    read = [r["read"] for r in rows(tmp_path)]
    assert read[5] == float(batch(8)[0]) and read[10] == float(batch(10)[0])


@pytest.mark.parametrize("killed_at", [11, 12, 16])
def test_rollbacks_are_resumed_bit_for_bit(tmp_path, killed_at):
    """Killed before the fault is met, right after the run went back, and past a new checkpoint."""

    class Killed(BaseException):
        pass

    lives = iter(range(killed_at + 4))

    def dies(step, state, rows):
        if next(lives, None) is None:
            raise Killed
        return train(step, state, rows)

    whole = run(tmp_path / "whole", batch=poisoned(12), recovery=THRICE)
    with pytest.raises(Killed):
        run(tmp_path / "cut", dies, poisoned(12), recovery=THRICE)
    resumed = run(tmp_path / "cut", batch=poisoned(12), recovery=THRICE)
    np.testing.assert_array_equal(whole["params"]["w"], resumed["params"]["w"])
    for name in ("metrics.jsonl", "skips.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_skips_travel_with_the_checkpoint(tmp_path):
    run(tmp_path, batch=poisoned(12), recovery=THRICE, steps=15)
    (tmp_path / "skips.json").unlink()
    run(tmp_path, batch=poisoned(12), recovery=THRICE)
    assert rows(tmp_path)[15]["read"] == float(batch(18)[0])


@pytest.mark.parametrize(
    ("bad", "recovery", "message"),
    [
        (range(12, 99), THRICE, "loss is nan after step 11, after 3 rollbacks; lower the"),
        ([2], THRICE, "loss is nan after step 3, and there is no checkpoint to go back to; lower"),
        ([12], Recovery(), "loss is nan after step 13; lower the learning rate"),
    ],
)
def test_going_back_has_bounds(tmp_path, bad, recovery, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, batch=poisoned(*bad), recovery=recovery)


def test_a_spike(tmp_path):
    def spiking(step, skipped):
        return batch(step + skipped) + (100 if step + skipped == 16 else 0)

    recovery = Recovery(max_rollbacks=1, spike=20.0, window=8)
    run(tmp_path, batch=spiking, recovery=recovery)
    [event] = rows(tmp_path, "event")
    assert (event["at"], event["count"]) == (15, 2)
    assert "deviations above" in event["reason"]


def test_what_counts_as_a_spike():
    watch = LossWatch(Recovery(spike=5.0, window=5))
    assert not any(watch.judge({"loss": x}) for x in (9.0, 1.0, 1.1, 0.9, 1.0))  # not judged yet
    # median 1, median deviation 0.1: one robust deviation is 0.148
    assert watch.judge({"loss": 1.7}) == ""
    assert "5.4 deviations above 1" in LossWatch(
        Recovery(spike=5.0, window=5), [9.0, 1.0, 1.1, 0.9, 1.0]
    ).judge({"loss": 1.8})
    assert watch.judge({"loss": 1.0, "grad_norm": np.float32("inf")}) == "grad_norm is inf"
    watch.forget()
    assert watch.judge({"loss": 99.0}) == ""


def test_offsets(tmp_path):
    skips = Skips(tmp_path, [{"at": 10, "count": 3, "reason": ""}])
    skips.add(Skip(20, 5, "x"))
    assert [skips.before(s) for s in (9, 10, 19, 20)] == [0, 3, 3, 8]
    assert skips.before(25, since=15) == 5
    assert Skips(tmp_path, skips.rows()).all == skips.all  # not twice


# ---------------------------------------------------------------------------------- preemption


def test_sigterm_stops_after_the_step_and_saves(tmp_path):
    def told(step, state, rows):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(step, state, rows)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="after step 7 of 20; all is saved, the same command"):
        run(tmp_path / "cut", told)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "cut" / "checkpoints" / "7" / "params").is_dir()
    run(tmp_path / "cut")
    run(tmp_path / "whole")
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == whole


# --------------------------------------------------------------------------------------- hangs

HANGS = """
import sys, time
sys.path.insert(0, "tests/train")
import test_faults as t
from internlm2_jax.train import session

def sleepy(step, skipped):
    if step == 7:
        time.sleep(60)  # the line that the stack must show
    return t.batch(step)

with session.use(session.Session(hang_seconds=1.0, hang_status=int(sys.argv[2]))):
    t.run(t.Path(sys.argv[1]), batch=sleepy)
"""


def test_a_hang_says_what_it_waits_for(tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path), "41"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 41, done.stderr
    assert "error: test: process 0 has waited" in done.stderr and "for data" in done.stderr
    assert "in sleepy" in done.stderr
    assert time.monotonic() - start < 50
    run(tmp_path)  # goes on from checkpoint 5
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 21))


def test_progress_keeps_the_watchdog_quiet(tmp_path):
    """Many short phases last longer together than one may."""

    def slow(step, skipped):
        time.sleep(0.1)
        return batch(step)

    with session.use(Session(hang_seconds=0.8)):
        run(tmp_path, batch=slow)
    assert not [t for t in threading.enumerate() if t.name == "watchdog" and _alive(t)]


def _alive(thread):
    thread.join(timeout=2)
    return thread.is_alive()


def test_the_clock():
    clock = Clock()
    with clock.phase("data"):
        assert clock.present()[0] == "data"
        time.sleep(0.05)
    assert clock.present()[0] != "data"
    assert 0.04 < clock.seconds["data"] < 0.5


# ----------------------------------------------------------------------------------------- disk


def test_a_lost_folder_names_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / "stage"

    def lost(step, skipped):
        if step == 7:
            folder.rename(tmp_path / "elsewhere")
            folder.write_text("in its place")
        return batch(step)

    with pytest.raises(DiskError, match=r"no folder any more.*; the last good checkpoint is"):
        run(folder, batch=lost)


FULL = """
import sys
sys.path.insert(0, "tests/train")
import numpy as np, jax
import test_faults as t
from internlm2_jax import cli
from internlm2_jax.errors import UserError
cli._quiet_libraries()

state = {"params": {"w": jax.numpy.asarray(np.random.default_rng(0).normal(size=(1000, 200)))}}
def train(step, state, rows):
    return jax.tree.map(lambda x: x + 1, state), {"loss": 0.5}
try:
    t.fit(sys.argv[1], state, train, steps=40, label="test", checkpoint_every=5, keep=99)
except UserError as error:
    print("error:", error)
    sys.exit(2)
"""


def test_a_full_disk_names_the_last_good_checkpoint(tmp_path):
    """Each checkpoint takes about 0.75 MB: the third or fourth does not fit in 3 MB."""
    probe = subprocess.run(["unshare", "-Urm", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("this machine does not allow a private mount (unshare -Urm)")
    script = (
        f"mount -t tmpfs -o size=3m none {tmp_path} && {sys.executable} -c '{FULL}' "
        f"{tmp_path}/stage; echo status $?; ls {tmp_path}/stage/checkpoints"
    )
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    error, status, *left = done.stdout.splitlines()
    assert status == "status 2", done.stdout + done.stderr
    assert "no space left on the disk" in error and "Traceback" not in done.stderr
    newest = max(map(int, left))
    assert f"the last good checkpoint is {tmp_path}/stage/checkpoints/{newest}" in error
    assert 5 <= newest < 40


def test_statuses():
    assert RESTART == 75  # EX_TEMPFAIL
    assert "after 3 rollbacks" in str(faults.too_many("x", "loss is nan", "here", THRICE, True))
