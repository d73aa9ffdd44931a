"""Which system calls a program in the sandbox may make, as a BPF program for bubblewrap.

What an ordinary program has no use for and a kernel has had its bugs in is refused with EPERM:
looking into other processes, mounting, new namespaces, keys, BPF, io_uring, kernel modules, memory
that no process's limit counts, and every socket but a local one (a virtual machine's AF_VSOCK
belongs to no network namespace). libseccomp compiles it, by way of pyseccomp.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import tempfile

from internlm2_jax.errors import UserError

REFUSED = (
    # other processes
    "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "process_madvise", "pidfd_getfd",
    # mounts and namespaces
    "mount", "umount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen",
    "fsconfig", "fsmount", "fspick", "mount_setattr", "unshare", "setns",
    # the kernel itself
    "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter",
    "io_uring_register", "kexec_load", "kexec_file_load", "init_module", "finit_module",
    "delete_module", "reboot", "swapon", "swapoff", "syslog", "acct", "quotactl", "quotactl_fd",
    "settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "iopl", "ioperm", "modify_ldt",
    "personality", "lookup_dcookie", "vhangup", "nfsservctl", "fanotify_init", "mknod", "mknodat",
    # keys and file handles
    "add_key", "request_key", "keyctl", "name_to_handle_at", "open_by_handle_at",
    # memory that no RLIMIT counts
    "memfd_create", "memfd_secret", "shmget", "shmat", "shmctl", "msgget", "msgsnd", "msgrcv",
    "semget", "semop", "semtimedop", "semctl", "mq_open", "mq_unlink", "mbind", "set_mempolicy",
    "migrate_pages", "move_pages",
)  # fmt: skip
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME
NAMESPACE_FLAGS = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x00000080,
)  # fmt: skip
TIOCSTI, TIOCLINUX = 0x5412, 0x541C


@functools.cache
def program() -> bytes:
    """The compiled filter. Errors: UserError where libseccomp or pyseccomp is missing."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"the sandbox needs libseccomp and pyseccomp ({error}): "
            "apt install libseccomp2, pip install 'internlm2-jax[verify]'"
        ) from error
    arg, masked = pyseccomp.Arg, pyseccomp.MASKED_EQ
    refuse = pyseccomp.ERRNO(errno.EPERM)
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ALLOW)
    for name in REFUSED:
        # One that this libseccomp or this processor does not know cannot be made by name here.
        if _known(pyseccomp, name):
            rules.add_rule(refuse, name)
    for flag in NAMESPACE_FLAGS[:-1]:  # in clone's flags NEWTIME's bit is a signal number's
        rules.add_rule(refuse, "clone", arg(0, masked, flag, flag))
    if _known(pyseccomp, "clone3"):  # its flags lie in memory; libc goes back to clone
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for family in ("socket", "socketpair"):
        rules.add_rule(refuse, family, arg(0, pyseccomp.NE, int(socket.AF_UNIX)))
    for request in (TIOCSTI, TIOCLINUX):
        rules.add_rule(refuse, "ioctl", arg(1, masked, 0xFFFFFFFF, request))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        return os.read(file.fileno(), 2**20)


def _known(pyseccomp: object, name: str) -> bool:
    try:
        return pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) >= 0  # type: ignore[attr-defined]
    except (ValueError, RuntimeError, OSError):
        return False
