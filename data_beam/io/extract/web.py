"""The main text of web pages, safe against pages that hang, crash or eat memory.

Extraction runs in a child process (`child`), one for each thread that extracts at the same time. It
lives for thousands of pages; one that hangs or crashes costs that page, and a new child takes its
place. Signals cannot do this: Beam runs its workers in threads, and a parser written in C does not
return to be interrupted.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from data_beam.io.extract.child import read_frame, write_frame
from data_beam.io.options import EXTRACTORS
from internlm2_jax.errors import UserError

# Caches and fragments add up in a process that parses for hours.
PAGES_PER_CHILD = 5000
_PACKAGE_PARENT = str(Path(__file__).parents[3])


class ExtractionError(Exception):
    """A page that gave no text: "extraction_timeout", "extraction_crash" (the parser died),
    "extraction_memory", "extraction_failed" (it raised), "too_deep" or "binary"."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def extract(
    html: bytes | str,
    url: str = "",
    method: str = "trafilatura",
    *,
    charset: str = "",
    timeout: float = 20.0,
    memory: int = 2 << 30,
) -> tuple[str, dict[str, str]]:
    """The main text of a page ("" = it has none) and metadata: title, encoding if not UTF-8.

    `charset` is what the HTTP header says; `timeout` is in seconds of CPU time (ten times that on
    the clock), `memory` in bytes. Raises ExtractionError. A missing package is a UserError.
    """
    if method not in EXTRACTORS:
        raise UserError(f"extractor {method!r} is unknown; choose one of {', '.join(EXTRACTORS)}")
    if isinstance(html, str):
        html, charset = html.encode("utf-8", "replace"), ""
    try:
        with _borrowed(method, memory) as child:
            return child.extract(html, url, charset, timeout)
    except ExtractionError as error:
        if error.reason != "extraction_crash":
            raise
    # The page may not be to blame: the system ends processes when memory runs out. Once more.
    with _borrowed(method, memory, fresh=True) as child:
        return child.extract(html, url, charset, timeout)


# --- children ---------------------------------------------------------------------------------


class _Child:
    # -P: modules of the folder that the job was started in must not stand for others.
    command = (sys.executable, "-P", "-m", "data_beam.io.extract.child")

    def __init__(self, method: str, memory: int):
        path = os.pathsep.join([_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
        try:
            self.process = subprocess.Popen(
                [*self.command, method, str(memory)], env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"cannot start a process to extract text in: {error}; free memory or run fewer "
                "workers"
            ) from error
        self.pages = 0
        hello = read_frame(self.process.stdout)  # type: ignore[arg-type]
        if hello is None or "missing" in hello[0]:
            self.close()
            why = hello[0]["missing"] if hello else f"it ended with {self.process.returncode}"
            raise UserError(
                f"cannot extract text with {method}: {why}; pip install 'internlm2-jax[data]'"
            )

    @property
    def usable(self) -> bool:
        return self.process.returncode is None and self.pages < PAGES_PER_CHILD

    def extract(self, data: bytes, url: str, charset: str, timeout: float):
        self.pages += 1
        begin = time.monotonic()
        head = {"url": url, "charset": charset, "timeout": timeout}
        try:
            write_frame(self.process.stdin, head, data)  # type: ignore[arg-type]
            reply = read_frame(self.process.stdout)  # type: ignore[arg-type]
        except OSError:
            reply = None
        if reply is None:
            raise self._death(time.monotonic() - begin, timeout)
        found, text = reply
        if "reason" in found:
            raise ExtractionError(found["reason"], found["detail"])
        return text.decode(), found["metadata"]

    def _death(self, seconds: float, timeout: float) -> ExtractionError:
        self.close()
        code = self.process.returncode
        timers = [-getattr(signal, name, 0) for name in ("SIGPROF", "SIGALRM")]
        if code in timers and code < 0:
            return ExtractionError("extraction_timeout", f"more than {timeout:g} s of CPU time")
        if code == 1 and seconds >= timeout:  # faulthandler, where there are no timers
            return ExtractionError("extraction_timeout", f"more than {timeout:g} s")
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return ExtractionError("extraction_crash", f"the parser died of {name}")

    def close(self) -> None:
        """Ends the process; it may be dead already."""
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        try:
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_idle: dict[tuple[str, int], list[_Child]] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def _borrowed(method: str, memory: int, fresh: bool = False) -> Iterator[_Child]:
    with _lock:
        waiting = _idle.setdefault((method, memory), [])
        child = waiting.pop() if waiting and not fresh else None
    child = child or _Child(method, memory)
    try:
        yield child
    except ExtractionError:
        _give_back(child, method, memory)
        raise
    except BaseException:
        child.close()  # a request may be under way
        raise
    else:
        _give_back(child, method, memory)


def _give_back(child: _Child, method: str, memory: int) -> None:
    if child.usable:
        with _lock:
            _idle.setdefault((method, memory), []).append(child)
    else:
        child.close()


def close() -> None:
    """Ends the idle children."""
    with _lock:
        children = [child for waiting in _idle.values() for child in waiting]
        _idle.clear()
    for child in children:
        child.close()


def _after_fork() -> None:
    """A forked process must not talk to its parent's children."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
