"""The demo from raw files to report, as a user runs it: whole, again, killed, on other corpora."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import internlm2_jax
from internlm2_jax import files

ROOT = Path(__file__).parents[2]
DEMO = "experiments/demo/pipeline.py"
STAGES = ("corpus", "tokenizer", "instructions", "pretrain", "sft", "reward_model")
STAGES += ("ppo_round1", "reward_patch", "ppo_round2", "evaluate", "report")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of one's own: some standard library packages, an exact copy, a broken file."""
    import asyncio
    import email
    import json
    import logging

    folder = tmp_path_factory.mktemp("corpus")
    for package in (asyncio, email, json, logging):
        source = Path(inspect.getfile(package)).parent
        for path in sorted(source.glob("*.py")):
            target = folder / source.name / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
            doc = ast.get_docstring(ast.parse(path.read_text())) or ""
            if len(doc) > 200:
                (target.parent / f"{path.stem}.txt").write_text(doc)
    (folder / "copy.py").write_bytes((folder / "json" / "decoder.py").read_bytes())
    (folder / "broken.txt.gz").write_bytes(b"\x1f\x8b\x08not gzip")
    return folder


# One device, as a user's machine has; what else conftest.py asks for, it only compiles sooner.
ENVIRONMENT = {
    **os.environ,
    "XLA_FLAGS": " ".join(
        flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag
    ),
}


def start(run: Path, corpus: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "internlm2_jax.cli", "run", DEMO, "--tiny"]
    command += ["--corpus", str(corpus), "--run-dir", str(run), *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output[-3000:]
    return output


def results(run: Path) -> dict[str, bytes]:
    """Every number that a run leaves."""
    names = ("result.json", "metrics.jsonl", "samples.jsonl", "patch.jsonl", "funnel.json")
    found = {p for name in names for p in run.rglob(name)}
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(found)}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    output = finish(start(run, corpus))
    assert "report: " in output
    return run


def test_every_stage_leaves_its_results(whole):
    for stage in STAGES:
        assert files.read_json(whole / stage / "done.json")["wall_seconds"] >= 0
    assert not list(whole.rglob("*.partial"))
    funnel = files.read_json(whole / "corpus" / "corpus" / "funnel.json")
    dropped = {reason for stage in funnel["stages"] for reason in stage["dropped"]}
    assert {"exact_duplicate", "corrupt_gzip"} <= dropped
    phases = files.read_json(whole / "pretrain" / "result.json")["phases"]
    assert [p["name"] for p in phases] == ["short", "long", "enhancement"]
    assert phases[1]["sequence_length"] == 8 * phases[0]["sequence_length"]
    assert phases[1]["rope_theta"] != phases[0]["rope_theta"]
    patch = files.read_json(whole / "reward_patch" / "result.json")["hacking"]
    assert {"pattern", "early_rate", "late_rate", "num_pairs"} <= patch.keys()


def test_rollouts_are_the_trainers_own_distribution(whole):
    first = files.read_jsonl(whole / "ppo_round1" / "metrics.jsonl")[0]
    assert first["warmup"] is True
    assert abs(first["kl"]) < 1e-6  # the actor is still the reference
    later = [r for r in files.read_jsonl(whole / "ppo_round1" / "metrics.jsonl") if not r["warmup"]]
    assert later[0]["ratio_at_start"] == pytest.approx(1.0, abs=1e-4)


def test_report_stands_alone(whole):
    page = (whole / "report.html").read_text()
    for title in ("Corpus", "Pre-training", "Reward model", "PPO", "Needle"):
        assert title.lower() in page.lower()
    assert 'src="http' not in page
    assert "not run yet" not in page


def test_the_run_opens_in_a_notebook(whole):
    model = internlm2_jax.open(whole)
    assert model.folder == whole / "ppo_round2"
    assert model.logits([[1, 2, 3]]).shape == (1, 3, model.cfg.vocab_size)
    assert isinstance(model.generate("def f(x):", max_new_tokens=4), str)
    assert internlm2_jax.open(whole / "reward_model").scores([1, 2]).shape == (1, 2)


def test_the_same_command_again_does_nothing(whole, corpus):
    before = results(whole)
    output = finish(start(whole, corpus))
    assert output.count("already done") == len(STAGES)
    assert results(whole) == before


@pytest.mark.slow
@pytest.mark.parametrize("moments", [("pretrain", "ppo_round1")])
def test_killed_and_continued_ends_in_the_same_numbers(whole, corpus, tmp_path, moments):
    """SIGKILL inside two stages, each after a checkpoint of theirs."""
    run = tmp_path / "killed"
    for stage in moments:
        process = start(run, corpus)
        deadline = time.monotonic() + 200
        while not any((run / stage / "checkpoints").glob("[0-9]*")):
            assert process.poll() is None, process.communicate()[0][-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (run / stage / "done.json").exists()
    finish(start(run, corpus))
    assert results(run) == results(whole)


@pytest.mark.slow
def test_killed_anywhere(whole, corpus, tmp_path):
    """Twelve kills at moments spread over the run, whatever is being written then."""
    run = tmp_path / "killed"
    for number in range(12):
        process = start(run, corpus)
        try:
            process.communicate(timeout=6 + 2.5 * number)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    finish(start(run, corpus))
    assert results(run) == results(whole)


@pytest.mark.slow
def test_another_seed_gives_other_numbers(whole, corpus, tmp_path):
    finish(start(tmp_path / "seed1", corpus, "--seed", "1"))
    old, new = results(whole), results(tmp_path / "seed1")
    assert old.keys() == new.keys()
    for name in ("pretrain/metrics.jsonl", "sft/metrics.jsonl", "ppo_round1/metrics.jsonl"):
        assert old[name] != new[name]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1m", "3m", "8m"])
def test_a_full_disk_is_one_line_and_leaves_no_halves(corpus, tmp_path, size):
    script = (
        f"mount -t tmpfs -o size={size} none {tmp_path} && "
        f"{sys.executable} -m internlm2_jax.cli run {DEMO} --tiny --corpus {corpus} "
        f"--run-dir {tmp_path}/run; echo status $?; "
        f"find {tmp_path} -name '*.partial*' -o -name '*orbax-checkpoint-tmp*'"
    )
    probe = subprocess.run(["unshare", "-Urm", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("this machine does not allow a private mount (unshare -Urm)")
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-3000:]
    assert "no space left on the disk" in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines() == ["status 2"]


def refused(process: subprocess.Popen, *expected: str) -> None:
    """The command ends with status 2 and one line of error that says `expected`."""
    output, _ = process.communicate(timeout=280)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, output[-3000:]
    assert len(lines) == 1
    assert "Traceback" not in output
    for part in expected:
        assert part in lines[0]


def cut_in_half(folder: Path, pattern: str) -> None:
    for path in folder.rglob(pattern):
        if path.is_file() and path.stat().st_size > 64:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_checkpoint_is_named_with_the_mend(whole, corpus, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    cut_in_half(run / "sft" / "checkpoints", "d/*")
    refused(start(run, corpus, "--from", "reward_model", "--redo"), "sft", "--only sft --redo")


def test_a_damaged_corpus_shard_is_named_with_the_mend(whole, corpus, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    cut_in_half(run / "corpus" / "corpus", "train-*.arrayrecord")
    refused(start(run, corpus, "--from", "instructions", "--redo"), "arrayrecord", "again")


def test_a_damaged_preference_line_is_named_by_number(whole, corpus, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / "instructions" / "preferences.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][:20], *lines[5:]]))
    refused(start(run, corpus, "--from", "reward_model", "--redo"), "preferences.jsonl:5")
