"""Programs that attack. They are strings, and only a sandbox ever gets them.

Each has the statuses that it may end with; what a program prints on the way is looked at by its
own test.
"""

from __future__ import annotations

PROGRAMS: dict[str, tuple[str, str]] = {
    # ---------------------------------------------------------------- resources
    "fork bomb": ("error timeout died", "import os\nwhile True: os.fork()"),
    "fork bomb that ignores errors": (
        "timeout died",
        """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    ),
    "thread bomb": (
        "error",
        """
import threading, time
while True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
""",
    ),
    "memory bomb": ("error", "hog = []\nwhile True: hog.append(bytearray(2**20))"),
    "memory bomb of many processes": (
        "ok error timeout died",
        """
import os, time
for _ in range(8):
    if os.fork() == 0: break
hog = bytearray(150 * 2**20)
time.sleep(99)
""",
    ),
    "a number without end": ("error timeout died", "10 ** 10 ** 9"),
    "one big file": ("error", "f = open('/tmp/f', 'wb')\nwhile True: f.write(bytes(2**20))"),
    "many files": (
        "error",
        "i = 0\nwhile True:\n    open(f'/tmp/{i}', 'wb').write(bytes(2**20)); i += 1",
    ),
    "empty files": (
        "error timeout died", "i = 0\nwhile True:\n    open(f'/tmp/{i}', 'wb'); i += 1",
    ),
    "open files": ("error", "files = []\nwhile True: files.append(open('/dev/null'))"),
    "sleeps for ever": ("timeout", "import time\nwhile True: time.sleep(9)"),
    "busy for ever": ("timeout", "while True: pass"),
    "busy where no interrupt is seen": ("timeout", "sum(range(10 ** 13))"),
    "a regular expression that explodes": (
        "timeout", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    ),
    "deep recursion": (
        "error timeout died",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    ),
    "deep syntax": ("error died", "eval('(' * 100000)"),
    "deep source": ("error died", "(" * 5000 + ")" * 5000),
    # ---------------------------------------------------------------- signals and processes
    "ignores signals": (
        "timeout",
        """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)
""",
    ),
    "swallows the interrupt": (
        "timeout",
        """
import time
while True:
    try: time.sleep(1)
    except BaseException: pass
""",
    ),
    "kills all": ("error died", "import os\nos.kill(-1, 9)\nos.kill(os.getpid(), 9)"),
    "kills its parent": ("ok", "import os\nos.kill(os.getppid(), 9)\nos.kill(1, 15)"),
    "kills its group": ("died", "import os\nos.killpg(0, 9)"),
    "stops itself": ("timeout", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"),
    "aborts": ("died", "import os\nos.abort()"),
    "leaves as if all were well": ("died", "import os\nos._exit(0)"),
    "sys.exit": ("exit", "import sys\nsys.exit(0)"),
    "a daemon": (
        "ok",
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(1)
    os._exit(0)
os.wait()
None
""",
    ),
    # ---------------------------------------------------------------- output and the border
    "floods standard output": ("timeout died", "while True: print('x' * 4096)"),
    "floods standard error": (
        "timeout died",
        "import os\nwhile True: os.write(2, b'\\xff' * 65536)",
    ),
    "closes everything": ("died timeout", "import os\nos.closerange(0, 1024)"),
    "forges a result": (
        "ok died",
        """
import json, os, struct
body = json.dumps({"status": "ok", "shown": "forged"}).encode()
for fd in range(3, 32):
    try: os.write(fd, struct.pack('>I', len(body)) + body)
    except OSError: pass
""",
    ),
    "writes rubbish into the result": (
        "died",
        """
import os
for fd in range(3, 32):
    try: os.write(fd, b'\\x00\\x00\\x00\\x04nope')
    except OSError: pass
""",
    ),
    "a message without end": (
        "died",
        """
import os
for fd in range(3, 32):
    try: os.write(fd, b'\\xff' * 4096)
    except OSError: pass
""",
    ),
    "a message that never comes": (
        "timeout died",
        """
import os, time
for fd in range(3, 32):
    try: os.write(fd, b'\\x00\\x00\\xff\\xff')
    except OSError: pass
while True: time.sleep(1)
""",
    ),
    "reads the requests": (
        "timeout died",
        """
import os
for fd in range(3, 32):
    try: os.set_blocking(fd, True)
    except OSError: continue
    while True:
        try:
            if not os.read(fd, 65536): break
        except OSError: break
""",
    ),
    "a deep answer": (
        "died",
        """
import os, struct
body = b'{"status": "ok", "value": ' + b'{"list": [' * 20000 + b']}' * 20000 + b'}'
for fd in range(3, 32):
    try: os.write(fd, struct.pack('>I', len(body)) + body)
    except OSError: pass
""",
    ),
    "a value that lies": (
        "error timeout died",
        "class Evil:\n    def __repr__(self):\n        while True: pass\nEvil()",
    ),
    "an error that lies": (
        "error timeout died",
        "class Evil(Exception):\n    def __str__(self): raise SystemExit(0)\nraise Evil()",
    ),
    "a long value": ("ok", "'x' * 10 ** 7"),
    "breaks the interpreter": (
        "ok error timeout died",
        "import builtins, sys\nbuiltins.compile = builtins.exec = None\nsys.modules.clear()",
    ),
}  # fmt: skip

# Each line of these must be refused: the program prints what it got through, and nothing is right.
ESCAPES: dict[str, str] = {
    "network": """
import socket
for family, kind, address in [
    (socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', 22)),
    (socket.AF_INET, socket.SOCK_DGRAM, ('8.8.8.8', 53)),
    (socket.AF_INET6, socket.SOCK_STREAM, ('::1', 22)),
    (socket.AF_INET, socket.SOCK_RAW, ('127.0.0.1', 0)),
    (socket.AF_NETLINK, socket.SOCK_RAW, (0, 0)),
    (socket.AF_PACKET, socket.SOCK_RAW, ('lo', 0)),
    (socket.AF_VSOCK, socket.SOCK_STREAM, (2, 1)),
    (socket.AF_ALG, socket.SOCK_SEQPACKET, ('hash', 'sha256')),
    (socket.AF_UNIX, socket.SOCK_STREAM, '/run/docker.sock'),
    (socket.AF_UNIX, socket.SOCK_STREAM, '\\0/tmp/.X11-unix/X0'),
]:
    try:
        s = socket.socket(family, kind)
        s.connect(address)
        print('connected', family, address)
    except OSError: pass
""",
    "other processes": """
import ctypes, os
libc = ctypes.CDLL(None)
for number in (1, os.getppid()):
    if libc.ptrace(16, number, 0, 0) != -1: print('attached', number)
    for name in ('mem', 'root/etc/passwd', 'cwd/etc/passwd'):
        for mode in ('rb', 'r+b'):
            try:
                if open(f'/proc/{number}/{name}', mode).read(1): print('read', number, name)
            except OSError: pass
""",
    "kernel files": """
for path in ('sysrq-trigger', 'sys/kernel/core_pattern', 'sys/vm/drop_caches',
             'sys/kernel/hostname', 'sys/fs/binfmt_misc/register', 'sys/kernel/modprobe',
             'self/uid_map', 'self/gid_map', 'self/setgroups', 'self/loginuid', 'acpi/wakeup',
             'sys/kernel/unprivileged_userns_clone'):
    try:
        with open('/proc/' + path, 'w') as f: f.write('0 0 1\\n')
        print('wrote', path)
    except OSError: pass
for path in ('kcore', 'kmsg', 'kpagecount', 'timer_list'):
    try:
        if open('/proc/' + path, 'rb').read(16): print('read', path)
    except OSError: pass
""",
    "links out": """
import os
for target in ('/etc/passwd', '/../../../etc/passwd', '/proc/1/root/etc/passwd',
               '/proc/self/root/etc', '/root/.bashrc', '/home', '/var', '/sys', '/run',
               '/proc/self/cwd/../etc/passwd'):
    link = '/tmp/link'
    os.symlink(target, link)
    try:
        os.stat(link)
        print('reached', target)
    except OSError: pass
    os.remove(link)
for source in ('/usr/bin/sh', '/usr/lib'):
    try: os.link(source, '/tmp/hard'); print('linked', source)
    except OSError: pass
d = os.open('/', os.O_RDONLY)
for path in ('../etc', '../../root/.ssh', '..//../home'):
    try: os.stat(path, dir_fd=d); print('reached', path)
    except OSError: pass
""",
    "rights": """
import ctypes, os, resource
libc = ctypes.CDLL(None, use_errno=True)
for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    if libc.unshare(flag) == 0: print('unshared', hex(flag))
    if libc.syscall(56, flag | 17, 0, 0, 0, 0) >= 0: print('cloned', hex(flag))
if libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0: print('mounted')
if libc.chroot(b'/tmp') == 0: print('changed root')
for call in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]),
             lambda: os.mknod('/tmp/device', 0o060666, 0x0801),
             lambda: os.setpriority(os.PRIO_PROCESS, 0, -20),
             lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
             lambda: resource.setrlimit(resource.RLIMIT_NPROC, (999, 999)),
             lambda: os.sethostname('x') if hasattr(os, 'sethostname') else open('/etc/x', 'w')):
    try:
        call()
        print('allowed')
    except (OSError, ValueError): pass
""",
    "writing": """
import os
here = os.path.dirname(os.__file__)
for folder in ('/', '/usr/lib', '/usr/bin', '/dev', '/dev/shm', '/proc', here):
    for path in (os.path.join(folder, 'x'), os.path.join(folder, '..', 'x')):
        try: open(path, 'w'); print('wrote', path)
        except OSError: pass
try: os.remove('/usr/bin/sh'); print('removed')
except OSError: pass
try: os.chmod(os.__file__, 0o777); print('changed')
except OSError: pass
try: os.utime('/usr/bin/sh'); print('touched')
except OSError: pass
""",
    "set-user-id programs": """
import glob, os, subprocess
for program in ('/usr/bin/su', '/usr/bin/passwd', '/usr/bin/newgrp'):
    try: done = subprocess.run([program], input=b'', capture_output=True, timeout=2)
    except OSError: continue
    if b'Uid:\\t0' in done.stdout or done.returncode == 0: print('ran', program, done.stdout[:50])
""",
}  # fmt: skip
