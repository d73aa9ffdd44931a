"""C and C++: headers by the end of their path, as include folders are not known."""

from __future__ import annotations

import posixpath
from collections import defaultdict

from data_beam.code.resolvers.repository import Repository, folder_of, join

LANGUAGES = ("c", "c++", "cuda", "objective-c", "objective-c++", "opencl")
# Written with angle brackets and no folder these are the system's, whatever the repository holds.
_SYSTEM = frozenset(
    (
        "alloca", "assert", "complex", "ctype", "dirent", "dlfcn", "errno", "fcntl", "fenv",
        "float", "getopt", "grp", "inttypes", "iso646", "libgen", "limits", "locale", "malloc",
        "math", "memory", "netdb", "poll", "pthread", "pwd", "regex", "sched", "search",
        "semaphore", "setjmp", "signal", "spawn", "stdalign", "stdarg", "stdatomic", "stdbool",
        "stddef", "stdint", "stdio", "stdlib", "stdnoreturn", "string", "strings", "syslog",
        "termios", "tgmath", "threads", "time", "uchar", "ucontext", "unistd", "utime", "wchar",
        "wctype", "windows", "winsock2",
    )
)  # fmt: skip


def add_edges(repository: Repository) -> None:
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in sorted(repository.texts):
        by_name[path.rsplit("/", 1)[-1]].append(path)
    for path in repository.of(LANGUAGES):
        for item in repository.imports(path):
            repository.add(path, _find(repository, by_name, path, item.target, item.kind), True)


def _find(
    repository: Repository, by_name: dict[str, list[str]], path: str, target: str, kind: str
) -> str | None:
    target = target.replace("\\", "/")
    beside = join(folder_of(path), target)
    if kind == "quoted" and beside in repository.texts:
        return beside
    end = posixpath.normpath(target)
    while end.startswith("../"):
        end = end[3:]
    if kind == "angle" and "/" not in end:
        stem, dot, _ = end.rpartition(".")
        if not dot or stem in _SYSTEM:
            return None
    found = by_name.get(end.rsplit("/", 1)[-1], ())
    if "/" in end:
        found = [other for other in found if other == end or other.endswith(f"/{end}")]
    return repository.nearest(path, (other for other in found if other != path))
