"""Memory and time of the recipes on 1, 4 and 16 times the input.

A job in one process: its peak is what the kernel counted, under a hard limit. On a cluster: the
largest Python worker. The input is of real texts varied so that none is a copy, and the bounds that
a job sets itself are as small as that (`scaled.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jobs
import pytest

from data_beam.stage import open_documents

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
MEGABYTE = 1_000_000
SIZES = (1, 4, 16)
UNIT = 4 * MEGABYTE  # of text, at size 1
WAVE = 2 * MEGABYTE  # of files, as small beside the input as 256 MB is beside a real one
PEAK_GROWTH = 1.25  # of the largest input over the smallest, less what Python and Beam take
TIME_GROWTH = 1.3  # of seconds per byte
# Of private memory in each process. The stacks and arenas of 75 threads take 1,750 of it, reserved
# and not used; what is left is the cap.
DATA_LIMIT = 2_500 * MEGABYTE


@dataclasses.dataclass
class Usage:
    peak: int  # bytes of the largest process
    seconds: float  # of processor time, all processes


# A process starts with the peak of the one that forked it: pytest's own would hide the job's. This
# one in between is small. The peak of those it waited for is of the largest of them.
_LAUNCH = """
import json, resource, subprocess, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
status = subprocess.run(sys.argv[2:], stdout=subprocess.DEVNULL).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime]))
"""


def measure(command: Sequence[str], limit: int = DATA_LIMIT) -> Usage:
    """Runs the job to its end; every process of it may hold `limit` bytes of data."""
    path = os.pathsep.join(map(str, (jobs.ROOT, jobs.HERE)))
    launch = [sys.executable, "-S", "-c", _LAUNCH, str(limit), sys.executable]
    done = subprocess.run(
        [*launch, *command],
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    status, peak, seconds = json.loads(done.stdout)
    assert status == 0, done.stderr[-4000:]
    return Usage(peak, seconds)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("input")
    return {
        size: jobs.write_pages(folder / str(size), size * UNIT, files=2 * size) for size in SIZES
    }


def command(job, inputs, size: int, output: Path) -> list[str]:
    """Shards of one size and waves of one size, as on a corpus of any size."""
    return [*job(inputs[size], output), f"--shards={2 * size}", f"--wave-bytes={WAVE}"]


@pytest.mark.parametrize("job", [jobs.scaled])
def test_one_process(job, inputs, tmp_path):
    idle = measure(["-c", "import data_beam.runners"])
    found = {size: measure(command(job, inputs, size, tmp_path / str(size))) for size in SIZES}
    lines = [f"{n}x: {u.peak / MEGABYTE:.0f} MB, {u.seconds:.1f} s" for n, u in found.items()]
    print(f"idle: {idle.peak / MEGABYTE:.0f} MB, {idle.seconds:.1f} s", *lines, sep="\n")
    small, large = SIZES[0], SIZES[-1]
    assert sum(open_documents(tmp_path / str(large)).counts) > 20_000
    grown = (found[large].peak - idle.peak) / (found[small].peak - idle.peak)
    assert grown < PEAK_GROWTH, lines
    per_byte = {size: (usage.seconds - idle.seconds) / size for size, usage in found.items()}
    assert per_byte[large] < TIME_GROWTH * per_byte[small], lines


@pytest.mark.flink
@pytest.mark.parametrize("job", [jobs.scaled])
def test_workers_of_a_cluster(job, inputs, cluster, tmp_path):
    idle = measure(["-c", "import data_beam.runners"]).peak
    peaks = {}
    for size in (SIZES[0], SIZES[-1]):
        arguments = command(job, inputs, size, tmp_path / str(size))
        process = jobs.start(arguments, cluster.options())
        peaks[size] = 0
        while process.poll() is None:
            peaks[size] = max(peaks[size], *map(peak, workers(cluster)), 0)
            time.sleep(0.1)
        jobs.finish(process)
        assert open_documents(tmp_path / str(size)).shards == 2 * size
    print({size: f"{value / MEGABYTE:.0f} MB" for size, value in peaks.items()})
    assert peaks[SIZES[0]] > idle  # the workers were found
    assert peaks[SIZES[-1]] - idle < PEAK_GROWTH * (peaks[SIZES[0]] - idle)


def workers(cluster) -> list[Path]:
    """The Python processes below the task managers."""
    parents = set(cluster.task_managers().values())
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) in parents:
                found.append(entry)
    return found


def peak(process: Path) -> int:
    """The most memory that a process ever had, in bytes; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in (process / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def test_the_measure_sees_what_a_job_takes():
    """Of 400 MB in the process itself, and in a child of it, whatever this process holds."""
    held = bytearray(500 * MEGABYTE)
    take = "x = bytearray(400_000_000)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {take!r}], check=True)"
    idle = measure(["-c", "pass"])
    for code in (take, child):
        used = measure(["-c", code])
        assert 390 * MEGABYTE < used.peak - idle.peak < 440 * MEGABYTE
    assert idle.peak < 50 * MEGABYTE < len(held)
    with pytest.raises(AssertionError, match="MemoryError"):
        measure(["-c", take], limit=200 * MEGABYTE)


def test_time_of_the_measure_is_of_the_job():
    started = time.monotonic()
    usage = measure(["-c", "sum(range(30_000_000))"])
    assert 0.2 < usage.seconds < 10 * (time.monotonic() - started)
