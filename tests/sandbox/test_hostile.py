"""Programs that attack, inside the sandbox alone: each ends in time, and the host is as it was.

Read test_probes.py first: it shows that the limits hold before any of these is run. This file runs
nothing unless those probes, repeated here in short, hold.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import hostile
import pytest

from internlm2_jax.sandbox import Jail, Session
from internlm2_jax.sandbox.pool import parallel

PATIENCE = 0.4


def processes_of(mark: str) -> list[int]:
    """Processes that have `mark` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def of_the_host() -> dict[str, object]:
    return {
        "mounts": Path("/proc/self/mounts").read_text(),
        "hostname": socket.gethostname(),
        "core pattern": Path("/proc/sys/kernel/core_pattern").read_text(),
        # but for the semaphores of Python's own pools: other tests run meanwhile
        "shm": sorted(n for n in os.listdir("/dev/shm") if not n.startswith("sem.mp-")),
        "sh": os.stat("/usr/bin/sh").st_mtime,
        "etc": sorted(os.listdir("/etc")),
    }


@pytest.fixture(scope="module")
def marked(jail, tmp_path_factory) -> Jail:
    """A jail whose processes can be told from all others by a folder's name."""
    return Jail(jail.limits, packages=(tmp_path_factory.mktemp("mark"),))


@pytest.fixture(scope="module")
def results(marked):
    with Session(marked) as session:
        for probe in (
            "bytearray(200 * 2**20)",
            "import socket\nsocket.socket()",
            "open('/x', 'w')",
        ):
            assert session.run(probe, timeout=20).status == "error"
        many = "import os, time\nfor _ in range(14):\n    if os.fork() == 0: time.sleep(2)"
        assert "unavailable" in session.run(many, timeout=20).error
    before = of_the_host()

    def attack(name: str):
        expected, code = hostile.PROGRAMS[name]
        start = time.monotonic()
        with Session(marked) as session:
            result = session.run(code, timeout=PATIENCE if "timeout" in expected else 60)
        return result, time.monotonic() - start

    done = dict(
        zip(hostile.PROGRAMS, parallel(attack, list(hostile.PROGRAMS), workers=2), strict=True)
    )
    # A process namespace that is being taken down is still in the list for a moment.
    end = time.monotonic() + 20
    while processes_of(str(marked.packages[0])) and time.monotonic() < end:
        time.sleep(0.1)
    return done, before


@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_it_ends_in_time_and_is_told_for_what_it_is(results, name):
    result, seconds = results[0][name]
    assert result.status in hostile.PROGRAMS[name][0].split(), result
    assert len(result.output.encode()) <= 3 * 20_000  # what is no UTF-8 becomes three bytes
    assert seconds < 30


def test_a_forged_result_is_an_answer_and_nothing_more(results):
    assert results[0]["forges a result"][0].shown in ("forged", None)
    assert results[0]["leaves as if all were well"][0].status != "ok"


def test_the_host_is_as_it_was(results, marked):
    assert of_the_host() == results[1]
    assert processes_of(str(marked.packages[0])) == []
    groups = list(Path("/sys/fs/cgroup").glob(f"*/**/sandbox-{os.getpid()}-*"))
    assert groups == []


def test_the_next_program_runs_as_if_nothing_had_been(results, marked):
    with Session(marked) as session:
        assert session.run("1 + 1", timeout=20).shown == "2"
        left = session.run("import glob\nglob.glob('/tmp/[0-9f]*')", timeout=20)
        assert left.shown == "[]"


def test_others_are_served_while_one_attacks(marked):
    def one(code: str):
        with Session(marked) as session:
            return session.run(code, timeout=5 if code == "6 * 7" else 1.0)

    bomb = hostile.PROGRAMS["fork bomb that ignores errors"][1]
    flood = hostile.PROGRAMS["floods standard output"][1]
    _, _, *answers = parallel(one, [bomb, flood, *["6 * 7"] * 4], workers=4)
    assert [answer.shown for answer in answers] == ["42"] * 4


@pytest.mark.parametrize("name", hostile.ESCAPES)
def test_nothing_gets_through(marked, results, name):
    with Session(marked) as session:
        result = session.run(hostile.ESCAPES[name], timeout=60)
    assert (result.status, result.output) == ("ok", ""), result
