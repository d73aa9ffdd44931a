"""What a program in the sandbox may use."""

from __future__ import annotations

import dataclasses

from internlm2_jax.errors import UserError

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Attributes:
    memory: bytes of address space of each process and, where the machine lends a cgroup, of
      resident memory of all together, files included.
    processes: processes and threads at a time, the sandbox's own three included.
    disk: bytes of /tmp, the one place that can be written; all of it is memory.
    file: bytes of one file.
    open_files: file descriptors of a process.
    output: bytes of standard output and error that are kept of one run; what follows is dropped.
    message: bytes of a value, an error or an argument that crosses the border.
    startup: seconds until the interpreter must answer; a machine that is slower is a failure of the
      machine, not of the program.
    grace: seconds between an interrupt and the end of a program that ignores it.
    """

    memory: int = 512 * MIB
    processes: int = 32
    disk: int = 64 * MIB
    file: int = 16 * MIB
    open_files: int = 64
    output: int = 64 * 1024
    message: int = MIB
    startup: float = 30.0
    grace: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (
            ("memory", 64 * MIB), ("processes", 4), ("disk", 4096), ("file", 4096),
            ("open_files", 16), ("output", 0), ("message", 4096), ("startup", 0.1), ("grace", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"sandbox: {name} is {getattr(self, name)}, the least is {least}")

    def rlimits(self) -> dict[str, int]:
        """Names of `resource.RLIMIT_*` with their values."""
        return {
            "AS": self.memory,
            "NPROC": self.processes,
            "FSIZE": self.file,
            "NOFILE": self.open_files,
            "CORE": 0,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
        }
