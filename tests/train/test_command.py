"""`internlm2 train` in two processes, one of which is told to stop, ends in the same numbers."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trainer import ROOT, end_all, ended, start

from internlm2_jax import files
from internlm2_jax.errors import RESTART

DEMO = "experiments/demo/pipeline.py"
SETTINGS = {
    "pretrain.layout": "data=2",
    "pretrain.phases.0.steps": "300",
    "pretrain.phases.2.batch_size": "2",
    "pretrain.checkpoint_every": "50",
    "pretrain.log_every": "1",
    "pretrain.prompts": '["def "]',  # the engine, in both processes
    "pretrain.sample_tokens": "8",
}


pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def _no_process_stays():
    yield
    end_all()


def command(run: Path, corpus: Path, verb: str, stages: str, **more: object) -> list[str]:
    given = [f"--set={key}={value}" for key, value in (SETTINGS | more).items()]
    return [
        *(sys.executable, "-m", "internlm2_jax.cli", verb, DEMO, "--tiny", "--corpus", str(corpus)),
        *("--run-dir", str(run), "--only", stages, *given),
    ]


@pytest.mark.slow
def test_one_of_two_is_told_to_stop(tmp_path, own_suites):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, path in enumerate(sorted((ROOT / "internlm2_jax").rglob("*.py"))):
        shutil.copy(path, corpus / f"{number}_{path.name}")
    for path in (ROOT / "docs").glob("*.md"):
        shutil.copy(path, corpus)
    subprocess.run(
        command(tmp_path / "whole", corpus, "run", "corpus,tokenizer,instructions"),
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")

    def both(run: str, stages: str = "pretrain,sft") -> list[subprocess.Popen]:
        suites = {"pretrain.suites": own_suites}  # the engine and likelihoods, in both processes
        return start(command(tmp_path / run, corpus, "train", stages, **suites), 2, 2)

    # SFT has no layout of two devices: refused in one line by both
    running = both("whole")
    outputs = [(*process.communicate(timeout=280), process.returncode) for process in running]
    assert [status for _, _, status in outputs] == [2, 2], outputs
    assert "sft has no layout" in outputs[0][1]
    assert (tmp_path / "whole" / "pretrain" / "done.json").is_file()

    running = both("cut")
    metrics = tmp_path / "cut" / "pretrain" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 60:
        assert running[0].poll() is None, running[0].communicate()[1][-3000:]
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    results = [(*process.communicate(timeout=200), process.returncode) for process in running]
    assert [status for _, _, status in results] == [RESTART] * 2, results
    stopped = [line for line in results[0][1].splitlines() if line.startswith("stopped: ")]
    assert len(stopped) == 1 and "all is saved" in stopped[0]
    assert not (tmp_path / "cut" / "pretrain" / "done.json").is_file()
    ended(both("cut", "pretrain"))
    for name in ("metrics.jsonl", "samples.jsonl", "result.json"):
        cut, whole = (tmp_path / run / "pretrain" / name for run in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes()
    measured = [row for row in files.read_jsonl(metrics) if row["split"] == "validation"]
    assert measured
    for row in measured:
        assert 0 <= row["likelihood/score"] <= 1 and 0 <= row["generation/score"] <= 1
