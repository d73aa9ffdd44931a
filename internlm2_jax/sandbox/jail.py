"""Starts an interpreter that is cut off from the machine: bubblewrap, seccomp, rlimits, a cgroup.

What it sees: the system's libraries and programs and the interpreter's own files, read-only; an
empty /tmp in memory, the only place it can write; a /proc of its own processes; no network. It has
a user namespace of its own, no capability, and can get none. Root does not lend it its own user:
it runs as a user id that nobody has.

Nothing untrusted is sent inside before the interpreter has reported what is in force for it, and
the report is what was asked for (`Jail.start`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from internlm2_jax.errors import UserError
from internlm2_jax.sandbox import cgroup, seccomp
from internlm2_jax.sandbox.limits import Limits

NOBODY = 64_999  # a user id that neither Debian nor systemd hands out; it needs no name
SEARCH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WORKER = Path(__file__).with_name("worker.py")
# What the root of the sandbox may hold beside the way to the interpreter.
ROOT_ENTRIES = {"bin", "dev", "lib", "lib32", "lib64", "libx32", "proc", "tmp", "usr"}


class SandboxError(Exception):
    """The machine has failed, not the program: its result says nothing and must not be scored."""


@dataclasses.dataclass
class Process:
    """An interpreter inside, its pipes, and its end."""

    popen: subprocess.Popen
    requests: int  # write
    replies: int  # read
    output: int  # read
    group: cgroup.Group | None

    def kill(self) -> None:
        """Ends every process inside.

        The kernel ends all of a process namespace with its first process, which bubblewrap takes
        leave of; and with bubblewrap's own end it ends that one, should the former not do.
        """
        for fd in (self.requests, self.replies, self.output):
            os.close(fd)
        for first in self._children():
            with contextlib.suppress(OSError):
                handle = os.pidfd_open(first)
                try:
                    if first in self._children():  # not a later process with its number
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        try:
            self.popen.wait(1.0)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        if self.group:
            self.group.remove()

    def _children(self) -> list[int]:
        number = self.popen.pid
        if self.popen.poll() is not None:
            return []
        try:
            found = Path(f"/proc/{number}/task/{number}/children").read_text()
            return [int(child) for child in found.split()]
        except OSError:
            return []


@dataclasses.dataclass(frozen=True)
class Jail:
    """Attributes:
    limits: what a program may use.
    packages: folders that are importable inside, read-only, at the same paths.
    python: the interpreter; default: the one that runs this.
    """

    limits: Limits = dataclasses.field(default_factory=Limits)
    packages: tuple[Path, ...] = ()
    python: Path | None = None

    def start(self) -> Process:
        """Errors: UserError where the machine lacks what it takes; SandboxError when it fails."""
        _needs("bwrap", "apt install bubblewrap")
        bpf = seccomp.program()
        mounts = self._mounts()
        group = cgroup.new(self.limits)
        inside, requests = os.pipe()
        replies, answers = os.pipe()
        output, text = os.pipe()
        rules = tempfile.TemporaryFile()  # noqa: SIM115
        with rules:
            rules.write(bpf)
            rules.flush()
            os.lseek(rules.fileno(), 0, os.SEEK_SET)
            try:
                popen = (
                    _spawner()
                    .submit(
                        subprocess.Popen,
                        self._command(mounts, rules.fileno(), answers, group),
                        stdin=inside,
                        stdout=text,
                        stderr=text,
                        pass_fds=(rules.fileno(), answers),
                        start_new_session=True,
                        close_fds=True,
                        cwd="/",
                        env={"PATH": SEARCH},
                    )
                    .result()
                )
            except OSError as error:
                for fd in (requests, replies, output):
                    os.close(fd)
                if group:
                    group.remove()
                raise SandboxError(f"bubblewrap cannot be started: {error}") from error
            finally:
                for fd in (inside, answers, text):
                    os.close(fd)
        for fd in (requests, replies, output):
            os.set_blocking(fd, False)
        return Process(popen, requests, replies, output, group)

    def check(self, facts: Any) -> None:
        """Errors: SandboxError unless `facts`, the interpreter's report, are what was asked for."""
        asked = {name: [value, value] for name, value in self.limits.rlimits().items()}
        ways = {Path(source).parts[1] for source in self._mounts()}
        wrong = {
            "the system call filter": facts["seccomp"] == 2,
            "no new privileges": facts["no_new_privileges"] == 1,
            "no capabilities": facts["capabilities"] == 0 and facts["bounding"] == 0,
            "no network": facts["interfaces"] in (["lo"], []),
            "its own processes": len(facts["processes"]) <= 2,
            "the file system": set(facts["root"]) <= ROOT_ENTRIES | ways,
            "the user": facts["uid"] == 1000,
            "the resource limits": facts["rlimits"] == asked,
        }
        for name, held in wrong.items():
            if not held:
                raise SandboxError(f"the sandbox does not hold here: {name} is not in force")

    # -------------------------------------------------------------------- the command
    def _command(
        self, mounts: dict[str, str], bpf: int, answers: int, group: cgroup.Group | None
    ) -> list[str]:
        settings = {
            "rlimits": self.limits.rlimits(),
            "replies": answers,
            "packages": [str(folder) for folder in self.packages],
            "text": self.limits.message // 4,
        }
        limits = self.limits
        return [
            *self._as_nobody(mounts, group),
            "bwrap",
            *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"),
            *("--new-session", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000"),
            *("--hostname", "sandbox", "--clearenv", "--setenv", "PATH", "/usr/bin:/bin"),
            *("--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"),
            # one thread and one arena: address space is what is limited
            *("--setenv", "OMP_NUM_THREADS", "1", "--setenv", "OPENBLAS_NUM_THREADS", "1"),
            *("--setenv", "MALLOC_ARENA_MAX", "1", "--setenv", "MPLBACKEND", "Agg"),
            *_system(),
            *("--perms", "1777", "--size", str(limits.disk), "--tmpfs", "/tmp"),
            *itertools.chain(*(("--ro-bind", lent, path) for path, lent in mounts.items())),
            *("--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
            *("--remount-ro", "/", "--seccomp", str(bpf), "--"),
            *(str(self._python()), "-I", "-S", "-B", "-X", "utf8", "-c", WORKER.read_text()),
            json.dumps(settings),
        ]  # fmt: skip

    def _as_nobody(self, mounts: dict[str, str], group: cgroup.Group | None) -> list[str]:
        """The way into the cgroup and, for root, out of its rights.

        Root's own files may lie where nobody may look (/root): mounted elsewhere first, in a mount
        namespace of this program's own, they can be lent.
        """
        script = [
            f"echo $$ > {shlex.quote(str(path))}" for path in (group.entries if group else ())
        ]
        if os.getuid() != 0:
            return ["sh", "-ec", "; ".join([*script, 'exec "$@"']), "sh"] if script else []
        _needs("setpriv", "apt install util-linux")
        script.append("mount -t tmpfs -o mode=755 tmpfs /mnt")
        for path, lent in mounts.items():
            kind = "mkdir" if Path(path).is_dir() else "touch"
            script.append(f"{kind} {lent}; mount --bind {shlex.quote(path)} {lent}")
        script.append(
            f"exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups --no-new-privs "
            '--inh-caps=-all --bounding-set=-all "$@"'
        )
        return ["unshare", "--mount", "sh", "-ec", "; ".join(script), "sh"]

    def _mounts(self) -> dict[str, str]:
        """Paths inside, besides the system's, and where bubblewrap finds them."""
        prefix = self._python().parents[1]
        wanted = [*self.packages]
        if prefix != Path("/usr"):
            wanted += [prefix / "bin", prefix / "lib"]
        for path in wanted:
            if not path.exists():
                raise UserError(f"sandbox: {path} does not exist; name a folder that does")
        lend = os.getuid() == 0
        return {str(p): f"/mnt/{i}" if lend else str(p) for i, p in enumerate(wanted)}

    def _python(self) -> Path:
        """The real interpreter; a virtual environment is a link to one."""
        running = getattr(sys, "_base_executable", None) or sys.executable
        return Path(self.python or running).resolve()


def _system() -> list[str]:
    """The system's programs and libraries; on merged systems /bin and /lib are links."""
    binds = []
    for path in (Path("/usr/bin"), *sorted(Path("/usr").glob("lib*"))):
        if path.is_dir() and not path.is_symlink():
            binds += ["--ro-bind", str(path), str(path)]
    for path in (Path("/bin"), *sorted(Path("/").glob("lib*"))):
        if path.is_symlink():
            binds += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            binds += ["--ro-bind", str(path), str(path)]
    return binds


def _needs(program: str, mend: str) -> None:
    if not shutil.which(program, path=SEARCH):
        raise UserError(
            f"untrusted code needs the sandbox, and {program} is not installed: {mend}; "
            "without it nothing is run"
        )


@functools.cache
def _spawner() -> concurrent.futures.ThreadPoolExecutor:
    """One thread that lasts: --die-with-parent means the thread that started bubblewrap."""
    return concurrent.futures.ThreadPoolExecutor(1, "sandbox-spawner")
