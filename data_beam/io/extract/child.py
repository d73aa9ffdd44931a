"""The process that extracts text for `web`: `python -m data_beam.io.extract.child METHOD MEMORY`.

Requests come on standard input, replies go to standard output, both as frames; it ends when its
input does, that is with its parent. A page that takes too long kills it: the kernel's timers (or,
where there are none, faulthandler's thread) end a process even inside a C library that never
returns.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import struct
import sys
from typing import Any, BinaryIO

import orjson

# So many times its CPU time may a page take on the clock, for what waits instead of computing.
WALL_FACTOR = 10
_HEADER = struct.Struct(">II")


def write_frame(stream: BinaryIO, head: dict, data: bytes = b"") -> None:
    """Lengths, JSON, bytes."""
    encoded = orjson.dumps(head)
    stream.write(_HEADER.pack(len(encoded), len(data)))
    stream.write(encoded)
    stream.write(data)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict, bytes] | None:
    """None when the stream ends, in the middle of a frame or before it."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    lengths = _HEADER.unpack(header)
    parts = [stream.read(length) for length in lengths]
    if any(len(part) < length for part, length in zip(parts, lengths, strict=True)):
        return None
    return orjson.loads(parts[0]), parts[1]


class Alarm:
    """Ends this process `seconds` of CPU time after `set`."""

    def __init__(self) -> None:
        self.kernel = hasattr(signal, "setitimer")
        if self.kernel:
            for number in (signal.SIGPROF, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
        else:
            self.nowhere = open(os.devnull, "w")  # noqa: SIM115  as long as the process

    def set(self, seconds: float) -> None:
        if self.kernel:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.setitimer(signal.ITIMER_REAL, seconds * WALL_FACTOR)
        else:
            faulthandler.dump_traceback_later(seconds, exit=True, file=self.nowhere)

    def clear(self) -> None:
        if self.kernel:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        else:
            faulthandler.cancel_dump_traceback_later()


def limit_memory(more: int) -> None:
    """Lets the process take `more` bytes than it has; where that cannot be said, no limit."""
    try:
        import resource

        with open("/proc/self/statm") as handle:
            used = int(handle.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
    except (ImportError, OSError, ValueError):
        pass


def main(method: str, memory: int) -> None:
    # What a library prints must not stand between frames.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    logging.disable(logging.CRITICAL)
    try:
        from data_beam.io.extract.page import PageError, main_text

        main_text("<html><body><p>warm up</p></body></html>", method=method)
    except ImportError as error:
        write_frame(replies, {"missing": str(error)})
        return
    write_frame(replies, {"ready": True})
    limit_memory(memory)
    alarm = Alarm()
    while (frame := read_frame(requests)) is not None:
        head, data = frame
        reply: dict[str, Any]
        alarm.set(head["timeout"])
        try:
            text, metadata = main_text(data, head["url"], method, head["charset"])
            reply = {"metadata": metadata}
            body = text.encode("utf-8", "replace")
        except PageError as error:
            reply, body = {"reason": error.reason, "detail": error.detail}, b""
        except MemoryError:
            reply, body = {"reason": "extraction_memory", "detail": "out of memory"}, b""
        except Exception as error:  # what a page makes a library raise must not end the work
            detail = f"{type(error).__name__}: {error}"
            reply, body = {"reason": "extraction_failed", "detail": detail[:500]}, b""
        alarm.clear()
        write_frame(replies, reply, body)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
