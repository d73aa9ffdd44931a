"""Stages run in order, are skipped when done, continue when killed, and refuse other settings."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.stages.pipeline import Output, Pipeline, Selection

calls: list[str] = []


def write(folder: Path, *, text: str, after: Path | None = None, fails: bool = False) -> None:
    calls.append(folder.name)
    if fails:
        raise UserError("told to fail")
    before = (after / "out.txt").read_text() if after else ""
    files.atomic_write(folder / "out.txt", before + text)


def stages(**changes: object) -> Pipeline:
    b = {"text": "b", "after": Output("a"), **changes}
    return Pipeline(
        a=functools.partial(write, text="a"),
        b=functools.partial(write, **b),
        c=functools.partial(write, text="c", after=Output("b")),
    )


@pytest.fixture(autouse=True)
def _no_calls():
    calls.clear()


def run(pipeline: Pipeline, folder: Path, **selection: object) -> list[str]:
    lines: list[str] = []
    pipeline.run(folder, Selection(**selection), say=lines.append)
    return lines


def test_runs_in_order_and_hands_on_folders(tmp_path):
    run(stages(), tmp_path)
    assert calls == ["a", "b", "c"]
    assert (tmp_path / "c" / "out.txt").read_text() == "abc"


def test_a_second_run_skips_everything(tmp_path):
    run(stages(), tmp_path)
    calls.clear()
    lines = run(stages(), tmp_path)
    assert calls == []
    assert all("already done" in line for line in lines)


def test_after_a_failure_only_the_rest_runs(tmp_path):
    with pytest.raises(UserError, match="told to fail"):
        run(stages(fails=True), tmp_path)
    assert not (tmp_path / "b" / "done.json").exists()
    files.write_json(tmp_path / "elsewhere.json", {})
    calls.clear()
    # the settings of b differ now, so it says so rather than mixing the two
    with pytest.raises(UserError, match=r"fails was True, is now False.*--from b --redo"):
        run(stages(), tmp_path)
    run(stages(), tmp_path, start="b", redo=True)
    assert calls == ["b", "c"]


def test_only_and_from_select(tmp_path):
    run(stages(), tmp_path, only=("a",))
    assert calls == ["a"]
    with pytest.raises(UserError, match="stage 'c' needs 'b', which is not done"):
        run(stages(), tmp_path, only=("c",))
    run(stages(), tmp_path, start="b")
    assert calls == ["a", "b", "c"]


def test_unknown_stage_is_named_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="no stage 'd'; the stages are: a, b, c"):
        run(stages(), tmp_path, only=("d",))


def test_changed_upstream_settings_are_refused_downstream(tmp_path):
    run(stages(), tmp_path)
    with pytest.raises(UserError, match="text was 'b', is now 'B'"):
        run(stages(text="B"), tmp_path)
    run(stages(text="B"), tmp_path, start="b", redo=True)
    assert (tmp_path / "c" / "out.txt").read_text() == "aBc"


def test_redo_without_downstream_leaves_stale_results_refused(tmp_path):
    run(stages(), tmp_path)
    with pytest.raises(UserError, match="a stage before it changed"):
        run(stages(text="B"), tmp_path, only=("b",), redo=True)


def test_inputs_inside_groups_are_found(tmp_path):
    def gather(folder: Path, *, parts: dict[str, Path]) -> None:
        text = "".join((p / "out.txt").read_text() for p in parts.values())
        files.atomic_write(folder / "out.txt", text)

    pipeline = Pipeline(
        a=functools.partial(write, text="a"),
        b=functools.partial(write, text="b"),
        both=functools.partial(gather, parts={"x": Output("a"), "y": Output("b")}),
    )
    run(pipeline, tmp_path)
    assert (tmp_path / "both" / "out.txt").read_text() == "ab"


def test_a_stage_cannot_read_a_later_one():
    with pytest.raises(UserError, match="reads 'b', not an earlier stage"):
        Pipeline(
            a=functools.partial(write, text="a", after=Output("b")),
            b=functools.partial(write, text="b"),
        )


SLEEPER = """
import functools, sys, time
from pathlib import Path
from internlm2_jax.stages.pipeline import Pipeline
def nap(folder):
    (folder / "started").touch()
    time.sleep(60)
Pipeline(nap=functools.partial(nap)).run(sys.argv[1])
"""


def test_one_process_at_a_time_and_wall_time_survives_a_kill(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path)], env=os.environ, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1200):
            if (tmp_path / "nap" / "elapsed.json").exists():
                break
            time.sleep(0.1)
        with pytest.raises(UserError, match="another process is running in"):
            run(Pipeline(nap=functools.partial(write, text="n")), tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert files.read_json(tmp_path / "nap" / "elapsed.json")["seconds"] >= 1
    with pytest.raises(UserError, match="made with other settings"):  # the lock is free again
        run(Pipeline(nap=functools.partial(write, text="n")), tmp_path)
