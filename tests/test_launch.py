"""The launch scripts against commands that only write down how they were called."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
OPTIONS = ["experiments/a.py", "--set", "name='two words'", "--run-dir", "/mnt/$x"]


@pytest.fixture
def bin(tmp_path):
    """A folder of commands that append their arguments to `calls` and end with `status`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("internlm2", "srun", "scontrol", "gcloud", "xpk"):
        path = folder / name
        path.write_text(
            f'#!/usr/bin/env bash\nprintf "%q " {name} "$@" >> "{tmp_path}/calls"\n'
            f'echo >> "{tmp_path}/calls"\n'
            f'[ -s "{tmp_path}/status-{name}" ] || exit 0\n'
            f'status=$(head -1 "{tmp_path}/status-{name}")\n'
            f'sed -i 1d "{tmp_path}/status-{name}"\nexit "$status"\n'
        )
        path.chmod(0o755)
    return folder


def run(bin, script, *arguments, statuses=(), of="internlm2", **environment):
    (bin.parent / f"status-{of}").write_text("".join(f"{s}\n" for s in statuses))
    done = subprocess.run(
        [str(LAUNCH / script), *arguments],
        env=os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    calls = bin.parent / "calls"
    lines = calls.read_text().splitlines() if calls.is_file() else []
    return done, [shlex.split(line) for line in lines]


def test_one_gpu_is_started_again_while_it_asks_for_it(bin):
    done, calls = run(bin, "one_gpu.sh", *OPTIONS, statuses=(75, 75, 0))
    assert done.returncode == 0 and calls == [["internlm2", "train", *OPTIONS]] * 3


def test_other_failures_end_it(bin):
    done, calls = run(bin, "one_gpu.sh", *OPTIONS, statuses=(75, 2, 0))
    assert done.returncode == 2 and len(calls) == 2


def test_a_stopped_command_saves_and_is_not_started_again(tmp_path):
    command = tmp_path / "command"
    command.write_text(
        "#!/usr/bin/env bash\n"
        f"trap 'sleep 0.3; echo saved >> {tmp_path}/said; exit 75' TERM\n"
        f"echo started >> {tmp_path}/said\nwhile :; do sleep 0.05; done\n"
    )
    command.chmod(0o755)
    process = subprocess.Popen([str(LAUNCH / "restart.sh"), str(command)])
    said = tmp_path / "said"
    end = time.monotonic() + 20
    while not said.is_file() or "started" not in said.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert said.read_text().split() == ["started", "saved"]


def test_slurm_queues_the_job_again(bin):
    done, calls = run(
        bin, "slurm_gpu.sbatch", *OPTIONS, statuses=(75,), of="srun", SLURM_JOB_ID="17"
    )
    assert done.returncode == 75
    assert calls == [
        ["srun", "--kill-on-bad-exit=1", "internlm2", "train", *OPTIONS],
        ["scontrol", "requeue", "17"],
    ]
    done, calls = run(bin, "slurm_gpu.sbatch", *OPTIONS, statuses=(1,), of="srun", SLURM_JOB_ID="1")
    assert done.returncode == 1 and len(calls) == 3


def test_the_pod_gets_the_options_as_they_are(bin):
    _, [[*call]] = run(bin, "tpu_pod.sh", "my-pod", *OPTIONS, ZONE="us-east5-a")
    assert call[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    assert call[5:-2] == ["my-pod", "--zone", "us-east5-a", "--worker", "all"]
    remote = call[-1].partition("launch/restart.sh ")[2]
    assert shlex.split(remote) == ["internlm2", "train", *OPTIONS]


def test_xpk(bin):
    cluster = {"CLUSTER": "c", "ZONE": "z", "IMAGE": "i", "TPU_TYPE": "v5p-128"}
    _, [[*call]] = run(bin, "tpu_xpk.sh", "job", *OPTIONS, **cluster)
    given = dict(zip(call[3::2], call[4::2], strict=True))
    assert shlex.split(given["--command"]) == ["internlm2", "train", *OPTIONS]
    assert given["--num-slices"] == "1" and given["--restart-on-exit-codes"] == "75"
    done, _ = run(bin, "tpu_xpk.sh", "job", *OPTIONS, **cluster | {"IMAGE": ""})
    assert done.returncode != 0 and "set IMAGE" in done.stderr


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.iterdir()))
def test_scripts_are_clean_and_say_how_they_are_used(bin, script):
    if script != "restart.sh":
        done, calls = run(bin, script)
        assert done.returncode == 2 and "usage:" in done.stderr and not calls
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(LAUNCH / script)], check=True, timeout=30)
