"""A cgroup for each sandbox, where this process may make one: memory and processes of all in it.

All together may have `memory` and, in files, `disk`. Without a cgroup `memory` is a process's each:
`memory` times `processes` is the most that a program can take, and files in /tmp come on top.
Version 1 and a delegated folder of version 2 are known; INTERNLM2_CGROUP names the latter
(`systemd-run --user --scope -p Delegate=yes` makes one).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import signal
import time
from pathlib import Path

from internlm2_jax.sandbox.limits import Limits

VARIABLE = "INTERNLM2_CGROUP"
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Group:
    folders: tuple[Path, ...]

    @property
    def entries(self) -> list[Path]:
        """Files that a process writes its id to, to be in."""
        return [folder / "cgroup.procs" for folder in self.folders]

    def processes(self) -> list[int]:
        """Ids of the processes that are in it."""
        return [int(line) for line in self.entries[0].read_text().split()]

    def remove(self, patience: float = 5.0) -> None:
        """Ends what is still in it and takes it away; a process takes a moment to be gone."""
        end = time.monotonic() + patience
        for folder in self.folders:
            while folder.is_dir():
                try:
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > end:
                        return
                    with contextlib.suppress(OSError):
                        for process in self.processes():
                            os.kill(process, signal.SIGKILL)
                    time.sleep(0.005)


def new(limits: Limits) -> Group | None:
    """A new cgroup under `limits`; None where there is no permission to make one."""
    name = f"sandbox-{os.getpid()}-{next(_numbers)}"
    amounts = {
        "memory": limits.memory + limits.disk,
        "processes": limits.processes + 2,  # bubblewrap is two itself
        "none": 0,
    }
    made: list[Path] = []
    try:
        for parent, settings in _parents():
            folder = parent / name
            folder.mkdir()
            made.append(folder)
            for file, limit in settings.items():
                (folder / file).write_text(str(amounts[limit]))
    except OSError:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return None
    return Group(tuple(made)) if made else None


@functools.cache
def _parents() -> tuple[tuple[Path, dict[str, str]], ...]:
    """Folders to make one in, with the files to write and the limits that go there."""
    if named := os.environ.get(VARIABLE):
        files = {"memory.max": "memory", "memory.swap.max": "none", "pids.max": "processes"}
        return ((Path(named), files),)
    mine = dict(
        line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()
    )
    found = []
    for controller, file, limit in (
        ("memory", "memory.limit_in_bytes", "memory"), ("pids", "pids.max", "processes"),
    ):  # fmt: skip
        if controller in mine:
            parent = Path("/sys/fs/cgroup", controller, mine[controller].lstrip("/"))
            if os.access(parent, os.W_OK):
                found.append((parent, {file: limit}))
    return tuple(found)
