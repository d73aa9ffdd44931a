"""A standalone Flink cluster on this machine: one job manager, some task managers, one job server.

For tests and for trying a pipeline on Flink before it goes to a real cluster; every process is the
real one. Set up for batch jobs of this package: shuffles are blocking (their results lie on the
task manager's disk), and a failure restarts only the regions of the job that lost their input, so
that a killed task manager costs what it held and no more. Python runs in processes that the task
managers start (`worker.py`); they end with their task manager.

    with Cluster.start(folder, prepare()) as cluster:
        runners.pipeline([*cluster.options(), ...])

All processes die with the thread that started the cluster (on Linux even if that is killed).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_beam.flink import rest
from data_beam.flink.distribution import Distribution
from internlm2_jax.errors import UserError

START_SECONDS = 180.0
STOP_SECONDS = 10.0
_JOB_SERVER = "job server"
_JOB_MANAGER = "job manager"
# What Flink's own scripts pass for Java 17.
_OPENED = (
    "lang", "net", "io", "nio", "lang.reflect", "text", "time", "util", "util.concurrent",
    "util.concurrent.atomic", "util.concurrent.locks",
)  # fmt: skip
_JAVA_OPTIONS = [
    "--add-exports=java.base/sun.net.util=ALL-UNNAMED",
    "--add-exports=java.rmi/sun.rmi.registry=ALL-UNNAMED",
    "--add-exports=java.security.jgss/sun.security.krb5=ALL-UNNAMED",
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
    *(f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in _OPENED),
]
_LOGGING = """\
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = Console
appender.console.name = Console
appender.console.type = CONSOLE
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{yyyy-MM-dd HH:mm:ss,SSS} %-5p %c{1} - %m%n
"""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Memory in MB. `slots` tasks run at a time on each task manager; `managed` is what sorting
    takes, shared by them. The tests sort documents of 12 MB in 384."""

    task_managers: int = 2
    slots: int = 1
    heap: int = 384
    managed: int = 384
    network: int = 128
    job_manager: int = 512
    job_server: int = 512


class Cluster:
    """Started by `Cluster.start`; use as a context manager or call `stop`."""

    def __init__(self, folder: Path, distribution: Distribution, sizes: Sizes):
        self.folder, self.distribution, self.sizes = folder, distribution, sizes
        self.master = f"localhost:{_free_port()}"
        self.job_endpoint = ""
        self._rpc_port = _free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started = 0  # task managers, ever

    @classmethod
    def start(
        cls,
        folder: str | os.PathLike,
        distribution: Distribution,
        sizes: Sizes | None = None,
        python_path: Sequence[str] = (),
    ) -> Cluster:
        """A running cluster whose logs, configuration and temporary files lie in `folder`.

        Its Python workers import from where this process does (and `python_path`). Raises
        UserError, with the end of the log, when a process does not come up.
        """
        cluster = cls(Path(folder).absolute(), distribution, sizes or Sizes())
        try:
            cluster._start(python_path)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # --- what a test or a person asks of it ---------------------------------------------------

    def options(self) -> list[str]:
        """Beam options that send a job here."""
        return [
            "--runner=PortableRunner",
            f"--job_endpoint={self.job_endpoint}",
            f"--flink_master={self.master}",
            "--environment_type=PROCESS",
            "--environment_config=" + json.dumps({"command": str(self._worker)}),
            # A Python worker waits so long for the next step of its job instead of starting anew.
            "--environment_cache_millis=20000",
            "--execution_mode_for_batch=BATCH",
            f"--parallelism={self.sizes.task_managers * self.sizes.slots}",
        ]

    def jobs(self) -> dict[str, str]:
        """State of every job by its id."""
        return {row["id"]: row["status"] for row in rest.get(self.master, "/jobs")["jobs"]}

    def vertices(self, job: str) -> dict[str, str]:
        """State of every step of a job by its id."""
        steps = rest.get(self.master, f"/jobs/{job}")["vertices"]
        return {step["id"]: step["status"] for step in steps}

    def attempts(self, job: str) -> dict[str, int]:
        """How often the most repeated task of every step of a job was started, by step id."""
        return {
            step: 1 + max(
                task["attempt"]
                for task in rest.get(self.master, f"/jobs/{job}/vertices/{step}")["subtasks"]
            )
            for step in self.vertices(job)
        }  # fmt: skip

    def task_managers(self) -> dict[str, int]:
        """Process ids of the live task managers by name."""
        return {
            name: process.pid
            for name, process in self._processes.items()
            if name.startswith("task manager") and process.poll() is None
        }

    def start_task_manager(self) -> str:
        """One more, as a supervisor would start after a crash; returns its name at once."""
        name = f"task manager {self._started}"
        self._started += 1
        main = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
        memory = self.sizes.heap + 128  # the framework's own
        self._java(name, [f"-Xmx{memory}m", "-cp", self._classpath, main, *self._config_dir])
        return name

    def kill_task_manager(self, name: str | None = None) -> str:
        """kill -9 of one task manager (the first live one); returns its name."""
        name = name or next(iter(self.task_managers()))
        process = self._processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return name

    def supervise(self) -> list[str]:
        """Replaces task managers that ended; returns their names. Another process that ended is a
        UserError."""
        ended = [
            name
            for name, process in self._processes.items()
            if name.startswith("task manager") and process.poll() is not None
        ]
        for name in ended:
            self._processes.pop(name).wait()
            self.start_task_manager()
        self.check()
        return ended

    def stop(self) -> None:
        """Ends every process, the last started first. Calling it again does nothing."""
        processes = list(self._processes.values())[::-1]
        self._processes.clear()
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)

    def check(self) -> None:
        """A process that ended by itself is a UserError with the end of its log."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise UserError(
                    f"Flink's {name} ended with status {process.returncode}; "
                    f"{self._log(name)} ends with: {self._end_of_log(name)}"
                )

    # --- starting -----------------------------------------------------------------------------

    def _start(self, python_path: Sequence[str]) -> None:
        for name in ("conf", "log", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "conf" / "flink-conf.yaml").write_text(_yaml(self._settings()))
        (self.folder / "conf" / "log4j.properties").write_text(_LOGGING)
        self._write_worker(python_path)
        main = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
        memory = f"-Xmx{self.sizes.job_manager}m"
        self._java(_JOB_MANAGER, [memory, "-cp", self._classpath, main, *self._config_dir])
        for _ in range(self.sizes.task_managers):
            self.start_task_manager()
        self._java(
            _JOB_SERVER,
            [
                f"-Xmx{self.sizes.job_server}m", "-jar", str(self.distribution.job_server),
                f"--flink-master={self.master}",
                "--job-port=0", "--artifact-port=0", "--expansion-port=0",
                f"--artifacts-dir={self.folder / 'tmp' / 'artifacts'}",
            ],
        )  # fmt: skip
        self._wait(self._job_server_port, "its job server to listen")
        self._wait(self._is_whole, "its task managers to report")

    def _settings(self) -> dict[str, Any]:
        port = self.master.rpartition(":")[2]
        sizes = self.sizes
        return {
            "jobmanager.rpc.address": "localhost", "jobmanager.rpc.port": self._rpc_port,
            "jobmanager.bind-host": "localhost", "taskmanager.bind-host": "localhost",
            "taskmanager.host": "localhost", "rest.address": "localhost",
            "rest.bind-address": "localhost", "rest.port": port,
            "io.tmp.dirs": self.folder / "tmp", "parallelism.default": sizes.slots,
            "classloader.resolve-order": "parent-first",
            # A killed task manager: noticed at the refused connection, or after 20 s of silence;
            # what it held is made again.
            "heartbeat.interval": 2000, "heartbeat.timeout": 20000,
            "restart-strategy.type": "fixed-delay",
            "restart-strategy.fixed-delay.attempts": 5,
            "restart-strategy.fixed-delay.delay": "1 s",
            "jobmanager.execution.failover-strategy": "region",
            "taskmanager.numberOfTaskSlots": sizes.slots, "taskmanager.cpu.cores": sizes.slots,
            "taskmanager.memory.task.heap.size": f"{sizes.heap}m",
            "taskmanager.memory.task.off-heap.size": "64m",
            "taskmanager.memory.framework.heap.size": "128m",
            "taskmanager.memory.framework.off-heap.size": "128m",
            "taskmanager.memory.managed.size": f"{sizes.managed}m",
            "taskmanager.network.sort-shuffle.min-buffers": 64,  # per shuffle; 512 are for disks
            "taskmanager.memory.network.min": f"{sizes.network}m",
            "taskmanager.memory.network.max": f"{sizes.network}m",
            "taskmanager.memory.jvm-metaspace.size": "256m",
            "taskmanager.memory.jvm-overhead.min": "192m",
            "taskmanager.memory.jvm-overhead.max": "192m",
        }  # fmt: skip

    @property
    def _worker(self) -> Path:
        return self.folder / "conf" / "worker.sh"

    def _write_worker(self, python_path: Sequence[str]) -> None:
        """The command of a Python worker, in the environment of this process."""
        path = os.pathsep.join([*python_path, *(p for p in sys.path if p)])
        self._worker.write_text(
            f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(path)}\n"
            f'exec {shlex.quote(sys.executable)} -m data_beam.flink.worker "$@"\n'
        )
        self._worker.chmod(0o755)

    @property
    def _classpath(self) -> str:
        """Beam's part of a job is on the class path of the cluster: in the class loader of each job
        it would end its Python workers after every step."""
        jars = (*self.distribution.libraries, self.distribution.job_server)
        return os.pathsep.join(map(str, jars))

    @property
    def _config_dir(self) -> list[str]:
        return ["--configDir", str(self.folder / "conf")]

    def _java(self, name: str, arguments: Sequence[str]) -> None:
        logging = f"-Dlog4j.configurationFile={self.folder / 'conf' / 'log4j.properties'}"
        command = [self.distribution.java, *_JAVA_OPTIONS, logging, *arguments]
        with open(self._log(name), "wb") as log:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_DIE_WITH_PARENT,
            )  # fmt: skip

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise UserError(
                    f"the Flink cluster waited {START_SECONDS:.0f} s for {what}; see "
                    f"{self.folder / 'log'}"
                )
            time.sleep(0.2)

    def _is_whole(self) -> bool:
        try:
            return rest.get(self.master, "/overview")["taskmanagers"] == self.sizes.task_managers
        except OSError:
            return False

    def _job_server_port(self) -> bool:
        found = re.search(r"JobService started on \S*?:(\d+)", self._log(_JOB_SERVER).read_text())
        if found:
            self.job_endpoint = f"localhost:{found[1]}"
        return bool(found)

    def _log(self, name: str) -> Path:
        return self.folder / "log" / f"{name.replace(' ', '-')}.log"

    def _end_of_log(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").splitlines()
        told = [line for line in lines if "ERROR" in line or "Exception" in line] or lines
        return told[-1].strip()[:300] if told else "(it is empty)"


def _yaml(settings: Mapping[str, Any]) -> str:
    return "".join(f"{name}: {value}\n" for name, value in settings.items())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _linux_pdeathsig() -> Callable[[], None] | None:
    """What a child calls to be killed when the thread that started it ends."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


_DIE_WITH_PARENT = _linux_pdeathsig()
