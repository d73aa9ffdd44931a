"""The GRPO stage: its numbers survive a kill bit for bit, and what it cannot learn from it says."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from internlm2_jax import files
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.rlhf.grpo import GRPOConfig
from internlm2_jax.rlhf.verifiers import Verdict
from internlm2_jax.stages import grpo as stage
from internlm2_jax.stages import problems
from internlm2_jax.train.checkpoint import Checkpoints, load_model, save_model_json

ROOT = Path(__file__).parents[2]
MODULE = sys.modules["internlm2_jax.stages.grpo"]  # the package's own name is the stage
# Two rounds, two minibatches, a KL: everything that a resumed run must repeat.
CONFIG = GRPOConfig(learning_rate=3e-3, dynamic_rounds=2, minibatches=2, kl_coefficient=0.01,
                    overlong_buffer=2)  # fmt: skip


class Judge:
    """Stands for the verifiers: what it says is a function of the text."""

    lasts = 10**9  # batches until the machine fails

    def __init__(self, **options):
        self.left = self.lasts

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def validate(self, rows, name):
        pass

    def __call__(self, rows, texts):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("killed")
        kinds = [Verdict("pass", score=1.0), Verdict("fail"), Verdict("timeout")]
        kinds.append(Verdict("infrastructure", "no memory"))
        return [kinds[sum(map(ord, text)) % 4] for text in texts]


@pytest.fixture(scope="module")
def run(vocabulary, tmp_path_factory):
    """Folders of a tokenizer, problems and a model that has learnt nothing."""
    base = tmp_path_factory.getbasetemp()
    folder = tmp_path_factory.mktemp("run")
    found = sorted(base.glob("vocabulary*/tokenizer.model"))
    path = next(p for p in found if Tokenizer.load(p).sha256 == vocabulary.sha256)
    (folder / "tokenizer").mkdir()
    shutil.copyfile(path, folder / "tokenizer" / "tokenizer.model")
    problems(folder / "problems", largest=4)
    cfg = preset("tiny", vocab_size=vocabulary.vocab_size)
    with Checkpoints(folder / "actor") as checkpoints:
        checkpoints.save(1, {"params": build(cfg).init(jax.random.key(0))})
    save_model_json(folder / "actor", cfg, "lm")
    return folder


def train(run, name, iterations=4, **options):
    settings = {
        "prompts_per_iteration": 2, "group_size": 4, "prompt_length": 32, "max_new_tokens": 4,
        "config": CONFIG, "validate_every": 2, "checkpoint_every": 2, "samples_every": 2, **options,
    }  # fmt: skip
    folders = {n: run / n for n in ("tokenizer", "problems", "actor")}
    stage(run / name, **{**folders, "iterations": iterations, **settings})
    return run / name


@pytest.fixture(scope="module")
def whole(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "Checks", Judge)
        return train(run, "whole")


def test_it_says_what_became_of_the_rollouts(whole):
    rows = [r for r in files.read_jsonl(whole / "metrics.jsonl") if r["split"] == "train"]
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["infrastructure_errors"] < 1 and 0 <= row["pass_rate"] <= 1
        # nothing is said of it where the first minibatch happens to have no token to learn from
        assert row.get("ratio_at_start", 1.0) == pytest.approx(1, abs=1e-3)
        assert row["groups_drawn"] >= 2 and 1 <= row["rounds"] <= 2
        for name in ("kl", "zero_variance", "truncated", "clip_share", "entropy", "timeouts"):
            assert np.isfinite(row[name])
    assert sum("ratio_at_start" in row for row in rows) >= 2
    assert rows[-1]["kl"] > rows[0]["kl"]
    checked = [r for r in files.read_jsonl(whole / "metrics.jsonl") if r["split"] == "validation"]
    assert [r["step"] for r in checked] == [2, 4]
    samples = files.read_jsonl(whole / "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 3, 4}
    assert {"prompt", "response", "outcome", "score"} <= samples[0].keys()
    timing = files.read_jsonl(whole / "timing.jsonl")
    assert [r["step"] for r in timing] == [1, 2, 3, 4] and all(r["rollout"] > 0 for r in timing)
    assert files.read_json(whole / "result.json")["held_out_pass_rate"] == checked[-1]["pass_rate"]


def test_a_killed_run_goes_on_bit_for_bit(run, whole, monkeypatch):
    monkeypatch.setattr(MODULE, "Checks", Judge)
    rounds = [row["rounds"] for row in files.read_jsonl(whole / "timing.jsonl")]
    monkeypatch.setattr(Judge, "lasts", sum(rounds[:2]) + 1)  # in or after the validation of step 2
    with pytest.raises(RuntimeError, match="killed"):
        train(run, "killed")
    done = len((run / "killed" / "timing.jsonl").read_text().splitlines())
    assert 2 <= done < 4
    monkeypatch.setattr(Judge, "lasts", 10**9)
    killed = train(run, "killed")
    for name in ("metrics.jsonl", "samples.jsonl", "result.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (load_model(folder)[1] for folder in (killed, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert [r["step"] for r in files.read_jsonl(killed / "timing.jsonl")] == [1, 2, 3, 4]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_grpo
test_grpo.MODULE.Checks = test_grpo.Judge
print("ready", flush=True)
test_grpo.train(Path({run!r}), {name!r}, iterations=6, checkpoint_every=1, validate_every=3)
"""


def process(run, name):
    """`train` in a process of its own, which has said that it is about to begin."""
    text = PROGRAM.format(tests=str(Path(__file__).parent), run=str(run), name=name)
    child = subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    return child


def below(folder):
    """Paths of all files; folders may vanish meanwhile."""
    return {os.path.join(at, name) for at, _, names in os.walk(folder) for name in names}


def killed(child, folder, rng):
    """Kills it in the midst of one of its next steps: after so many new files, and a moment."""
    before, seen, wanted = below(folder), set(), rng.randint(1, 60)
    while child.poll() is None:
        seen |= below(folder) - before
        if len(seen) >= wanted:
            time.sleep(rng.uniform(0, 0.3))
            child.send_signal(signal.SIGKILL)
            child.communicate()
            return child.returncode == -signal.SIGKILL
        time.sleep(0.005)
    child.communicate()
    return False


def numbers(folder):
    names = ("metrics.jsonl", "samples.jsonl", "result.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # eight processes, each of which compiles
def test_kills_at_random_moments_change_no_number(run):
    output, _ = (child := process(run, "left_alone")).communicate()
    assert child.returncode == 0, output[-3000:]
    rng, kills = random.Random(0), 0
    while kills < 6 and killed(process(run, "cut"), run / "cut", rng):
        kills += 1
    assert kills >= 3
    output, _ = (child := process(run, "cut")).communicate()
    assert child.returncode == 0, output[-3000:]
    whole, cut = run / "left_alone", run / "cut"
    assert numbers(cut) == numbers(whole)
    ours, theirs = (load_model(folder)[1] for folder in (cut, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow  # a minute of compiling for eight devices
def test_a_mesh_of_eight_devices_gives_the_numbers_of_one(run, whole, monkeypatch):
    monkeypatch.setattr(MODULE, "Checks", Judge)
    options = {"prompts_per_iteration": 4, "validate_every": 0}
    alone, together = (
        files.read_jsonl(train(run, name, 2, layout=layout, **options) / "metrics.jsonl")
        for name, layout in (("alone", ""), ("together", "data=2,fsdp=2,tensor=2"))
    )
    assert len(alone) == 2 and alone[1]["kl"] > 0
    for a, b in zip(alone, together, strict=True):
        assert a.pop("split") == b.pop("split") == "train"
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


def test_nothing_that_can_be_checked_ends_the_run(run, monkeypatch):
    class Broken(Judge):
        def __call__(self, rows, texts):
            return [Verdict("infrastructure", "no sandbox today")] * len(texts)

    monkeypatch.setattr(MODULE, "Checks", Broken)
    with pytest.raises(UserError, match=r"not one of the responses.*no sandbox today"):
        train(run, "broken", 1)


def test_a_sampler_that_disagrees_with_the_trainer_ends_the_run(run, monkeypatch):
    from internlm2_jax.rlhf import rollout

    real = rollout.sample

    def off(*args, **options):
        found = real(*args, **options)
        return rollout.Rollout(
            found.tokens, found.mask, found.logprobs - 0.5, found.finished, found.responses
        )

    monkeypatch.setattr(MODULE, "Checks", Judge)
    monkeypatch.setattr(rollout, "sample", off)
    with pytest.raises(UserError, match=r"ratio to the sampler is 1\.6"):
        train(run, "off", 1)


def test_mistakes_are_named_before_anything_runs(run, tmp_path):
    with pytest.raises(UserError, match="group_size is 1"):
        train(run, "one", group_size=1)
    with pytest.raises(UserError, match="no problem fits 3 tokens"):
        train(run, "short", prompt_length=3)
    with pytest.raises(UserError, match="8 responses in 2 minibatches do not divide over 8 parts"):
        train(run, "uneven", layout="fsdp=8")
    with pytest.raises(UserError, match="context=2 cuts rows"):
        train(run, "context", layout="context=2")
    with pytest.raises(UserError, match="2 does not divide over tensor = 8; choose"):
        train(run, "heads", layout="tensor=8")
    files.write_jsonl(tmp_path / "problems.jsonl", [{"prompt": "a", "check": {"kind": "magic"}}])
    with pytest.raises(UserError, match=r"problems\.jsonl:1: no check of a known kind"):
        train(run, "magic", problems=tmp_path)
