"""Every limit is in force: shown by programs that do no harm where one is not."""

from __future__ import annotations

import pytest

from internlm2_jax.sandbox.limits import MIB
from internlm2_jax.sandbox.session import Session

# A little over each limit of conftest.LIMITS, and what the program must run into.
OVER = {
    "address space": (f"bytearray({200 * MIB})", "MemoryError"),
    "a file": (
        f"open('/tmp/a', 'wb', 0).write(bytes({2 * MIB}))\nopen('/tmp/a', 'ab', 0).write(b'.')",
        "File too large",
    ),
    "the disk": (
        "for i in range(5): open(f'/tmp/{i}', 'wb').write(bytes(2 * 2**20 - 1))",
        "No space left",
    ),
    "open files": ("files = [open('/dev/null') for _ in range(40)]", "Too many open files"),
    "processes": (
        """
import os, time
for _ in range(14):
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
""",
        "Resource temporarily unavailable",
    ),
    "raising a limit": (
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
        "not allowed to raise",
    ),
    "the root": ("open('/x', 'w')", "Read-only"),
    "devices": ("open('/dev/shm/x', 'w')", "Read-only"),
    "programs": ("open('/usr/bin/x', 'w')", "Read-only"),
    "files of the host": ("open('/etc/hostname')", "No such file"),
    "a network socket": ("import socket\nsocket.socket()", "not permitted"),
    "a socket to the machine below": (
        "import socket\nsocket.socket(40, socket.SOCK_STREAM)",
        "not permitted",
    ),
    "memory without a name": ("import os\nos.memfd_create('x')", "not permitted"),
}


@pytest.mark.parametrize("name", OVER)
def test_a_little_over_the_limit_fails(session, name):
    code, error = OVER[name]
    result = session.run(code, timeout=20)
    assert result.status == "error" and error in result.error


def test_under_the_limits_all_is_well(session):
    code = """
import os, socket, subprocess, sys, tempfile, threading
size = len(bytearray(100 * 2**20))
with tempfile.TemporaryFile() as file: file.write(bytes(2**20))
subprocess.run(['true'], check=True)
thread = threading.Thread(target=print, args=['from a thread'])
thread.start(); thread.join()
socket.socketpair()
size
"""
    result = session.run(code, timeout=30)
    assert (result.status, result.shown) == ("ok", str(100 * MIB)), result.error
    assert result.output == "from a thread\n"


@pytest.mark.parametrize("call", ["unshare(0x10000000)", "ptrace(0, 0, 0, 0)", "setns(0, 0)"])
def test_the_filter_answers_for_the_kernel(session, call):
    code = (
        f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.{call}, ctypes.get_errno()"
    )
    assert session.run(code, timeout=20).shown == "(-1, 1)"


def test_memory_of_all_processes_together(jail, session):
    if not session._process.group:
        pytest.skip("no cgroup can be made here: limits are a process's each")
    code = """
import os
kids = []
for _ in range(3):
    kid = os.fork()
    if kid == 0:
        bytearray(120 * 2**20)
        import time; time.sleep(1)
        os._exit(0)
    kids.append(kid)
[os.waitpid(kid, 0)[1] for kid in kids]
"""
    result = session.run(code, timeout=30)  # 360 MiB of 192 + 8
    assert result.status == "died" or "9" in result.shown


def test_nothing_of_the_host_is_seen(jail, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "of the host")
    code = """
import os
seen = dict(os.environ)
for number in filter(str.isdigit, os.listdir('/proc')):
    seen[number] = open(f'/proc/{number}/environ').read()
'of the host' in str(seen), os.path.exists('/home'), os.path.exists('/sys'), os.getuid()
"""
    with Session(jail) as session:
        assert session.run(code, timeout=20).shown == "(False, False, False, 1000)"
