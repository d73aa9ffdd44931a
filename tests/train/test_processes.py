"""Real processes: killed and continued they end in the same bits; they may become more or fewer."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from trainer import end_all, ended, start, trainer

from internlm2_jax.train.checkpoint import whole_steps

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def _no_process_stays():
    yield
    end_all()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # one writer
    return [row["loss"] for row in rows]


def killed_and_continued(folder: Path, layout: str, devices: int, processes: int) -> None:
    """40 steps at once, and 17 steps, kill -9, and on to 40: the same state, bit for bit."""
    whole = ended(start(trainer(folder / "whole", layout, 40), processes, devices))
    running = start(trainer(folder / "cut", layout, 40, killed_at=17), processes, devices)
    running[0].communicate(timeout=200)
    assert running[0].returncode == -signal.SIGKILL
    for other in running[1:]:  # waits for the first, in vain
        other.kill()
        other.communicate()
    assert 5 <= whole_steps(folder / "cut" / "checkpoints")[-1] <= 15
    assert ended(start(trainer(folder / "cut", layout, 40), processes, devices)) == whole
    assert "ends in" in whole[0]
    written = [(folder / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert written[0] == written[1]
    assert len(losses(folder / "whole")) == 40


@pytest.mark.slow
def test_one_device(tmp_path):
    killed_and_continued(tmp_path, "", 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp=8", "fsdp=4,tensor=2"])
def test_eight_devices(tmp_path, layout):
    killed_and_continued(tmp_path, layout, 8, 1)


@pytest.mark.slow
def test_two_processes(tmp_path):
    killed_and_continued(tmp_path, "data=2,fsdp=4", 8, 2)


@pytest.mark.slow
def test_two_processes_then_one(tmp_path):
    said = ended(start(trainer(tmp_path / "moved", "data=2,fsdp=4", 5), 2, 8))
    for index, out in enumerate(said):
        assert f"process {index} of 2 ends" in out
    ended(start(trainer(tmp_path / "moved", "fsdp=4,tensor=2", 8), 1, 8))
    ended(start(trainer(tmp_path / "whole", "fsdp=8", 8), 1, 8))
    np.testing.assert_allclose(
        losses(tmp_path / "moved"), losses(tmp_path / "whole"), rtol=2e-4, atol=0
    )


@pytest.mark.slow
def test_one_process_that_cannot_read_a_checkpoint_is_heard(tmp_path):
    """A shard of the newest checkpoint is damaged: both processes take the one before."""
    folder = tmp_path / "run"
    ended(start(trainer(folder, "data=2,fsdp=4", 10), 2, 8))
    for path in (folder / "checkpoints" / "10" / "params").rglob("d/*"):
        if "ocdbt.process_1" in str(path):
            path.write_bytes(path.read_bytes()[:100])
    ended(start(trainer(folder, "data=2,fsdp=4", 12), 2, 8))
    ended(start(trainer(tmp_path / "whole", "data=2,fsdp=4", 12), 2, 8))
    assert losses(folder) == losses(tmp_path / "whole")
