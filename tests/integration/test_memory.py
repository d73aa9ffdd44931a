"""Memory and time of the recipes on 1, 4 and 16 times the input.

A job in one process: its peak is what the kernel counted for that process, under a hard limit. On
worker processes: the largest worker. The input is of real texts varied so that none is a copy.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jobs
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
MEGABYTE = 1_000_000
SIZES = (1, 4, 16)
UNIT = 8 * MEGABYTE  # of text, at size 1
WAVE = 4 * MEGABYTE  # of files, as small beside the input as 256 MB is beside a real one
PEAK_GROWTH = 1.25  # of the largest input over the smallest, less what Python and Beam take
TIME_GROWTH = 1.3  # of seconds per byte
DATA_LIMIT = 2_000 * MEGABYTE  # heap and private mappings of each process


@dataclasses.dataclass
class Usage:
    peak: int  # bytes of the largest process
    seconds: float  # of processor time, all processes


def measure(command: Sequence[str], limit: int = DATA_LIMIT) -> Usage:
    """Runs the job to its end; every process of it may hold `limit` bytes of data."""

    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    with open(os.devnull, "wb") as nothing:
        path = os.pathsep.join(map(str, (jobs.ROOT, jobs.HERE)))
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},
            stdout=nothing,
            stderr=subprocess.PIPE,
            preexec_fn=set_limit,
        )
        assert process.stderr is not None
        told: list[bytes] = []
        reader = threading.Thread(target=lambda: told.extend(process.stderr or ()), daemon=True)
        reader.start()
        # wait4 reports on this process and on those it waited for: of memory the largest.
        _, status, usage = os.wait4(process.pid, 0)
        reader.join(10)
    assert status == 0, b"".join(told[-40:]).decode(errors="replace")
    return Usage(usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("input")
    return {
        size: jobs.write_pages(folder / str(size), size * UNIT, files=2 * size) for size in SIZES
    }


@pytest.mark.parametrize("job", [jobs.web_text])
def test_memory_is_flat_and_time_linear(job, inputs, tmp_path, record_property):
    base = measure(["-c", "import data_beam.runners"])
    found = {}
    for size in SIZES:
        output = tmp_path / str(size)
        command = [*job(inputs[size], output), f"--wave-bytes={WAVE}"]
        found[size] = measure(command)
    lines = [
        f"{size}x: {usage.peak / MEGABYTE:.0f} MB, {usage.seconds:.1f} s"
        for size, usage in found.items()
    ]
    print("\n".join([f"idle: {base.peak / MEGABYTE:.0f} MB, {base.seconds:.1f} s", *lines]))
    small, large = found[SIZES[0]], found[SIZES[-1]]
    assert large.peak - base.peak < PEAK_GROWTH * (small.peak - base.peak), lines
    per_byte = {size: (usage.seconds - base.seconds) / size for size, usage in found.items()}
    assert per_byte[SIZES[-1]] < TIME_GROWTH * per_byte[SIZES[0]], lines


def test_the_measure_sees_what_a_job_takes():
    """Of 400 MB in the process itself, and in a child of it."""
    take = "x = bytearray(400_000_000)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {take!r}], check=True)"
    idle = measure(["-c", "pass"])
    for code in (take, child):
        used = measure(["-c", code])
        assert 390 * MEGABYTE < used.peak - idle.peak < 440 * MEGABYTE
    with pytest.raises(AssertionError, match="MemoryError"):
        measure(["-c", take], limit=200 * MEGABYTE)


def test_time_of_the_measure_is_of_the_job():
    started = time.monotonic()
    usage = measure(["-c", "sum(range(30_000_000))"])
    assert 0.2 < usage.seconds < 10 * (time.monotonic() - started)
