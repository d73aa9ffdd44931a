"""A job that is killed again and again ends in the bytes of one that was left alone."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def size_below(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*")) if folder.exists() else 0


def killed_when(process: subprocess.Popen, grown: Callable[[], bool]) -> bool:
    """Kills the job as soon as `grown`; whether it was still alive then."""
    while process.poll() is None:
        if grown():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.002)
    assert process.returncode == 0, process.communicate()[0][-2000:]
    process.communicate()
    return False


@pytest.mark.parametrize("job", [jobs.web_text, jobs.code])
def test_killed_whenever_it_has_written_something(job, tmp_path):
    """After each new file, temporary ones among them, until nothing is left to do."""
    if job is jobs.code:
        folder = jobs.write_sources(tmp_path / "in", ("json", "wsgiref"))
    else:
        folder = jobs.write_pages(tmp_path / "in", 300_000, files=3)
    jobs.run(job(folder, tmp_path / "whole"))
    wanted = jobs.contents(tmp_path / "whole")
    kills = 0
    while True:
        before = size_below(tmp_path / "out")
        process = jobs.start(job(folder, tmp_path / "out"))
        if not killed_when(
            process, lambda before=before: size_below(tmp_path / "out") > before + 3
        ):
            break
        kills += 1
        assert kills < 100
    assert kills >= 8
    found = jobs.contents(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
