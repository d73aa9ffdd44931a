"""A Python interpreter in the sandbox that keeps its state from one run to the next.

    with Session() as session:
        session.run("x = 6", timeout=5)
        session.run("x * 7", timeout=5).shown  # "42"

A run that takes too long is interrupted; state survives that. A program that ignores the interrupt
is ended with all that it has started, and so is the session.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import selectors
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from internlm2_jax.errors import UserError
from internlm2_jax.sandbox.jail import Jail, Process, SandboxError
from internlm2_jax.sandbox.worker import decode, encode, pack

Status = Literal["ok", "error", "exit", "interrupted", "timeout", "died", "infrastructure"]
Remote = Callable[[str, list[Any], dict[str, Any]], dict[str, Any]]
# Seconds between reads of output that is dropped: who floods it waits, and this side has its rest.
THROTTLE = 0.001
_POSSIBLE = frozenset(("ok", "error", "exit", "interrupted"))


@functools.cache
def require(jail: Jail | None = None) -> None:
    """Tries the sandbox out, once for each kind. Errors: UserError where it does not hold."""
    try:
        Session(jail).close()
    except SandboxError as error:
        raise UserError(
            f"this machine cannot isolate untrusted code, so none is run: {error}; it takes "
            "bubblewrap, user namespaces and seccomp (in a container: permission for them)"
        ) from error


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
      status: "ok"; "error", it raised; "exit", it left with `code`; "interrupted"; "timeout";
        "died", the interpreter is gone: killed by a limit or a signal, or by its own hand;
        "infrastructure", the machine failed and nothing is known of the program (pool.py).
      output: standard output and error, as far as the limit lets through.
      shown: repr of the last expression of a run, None without one.
      value, args: of a call: what it gave, and its arguments as it left them.
      error: traceback, or what is known of the end.
      code: exit status of "exit" and "died".
      dropped: bytes of output over the limit.
      seconds: wall time.
    """

    status: Status
    output: str
    seconds: float
    shown: str | None = None
    value: Any = None
    args: list[Any] | None = None
    error: str = ""
    code: int | None = None
    dropped: int = 0


class Session:
    """Errors: UserError where the machine cannot isolate; SandboxError when it fails at it."""

    def __init__(self, jail: Jail | None = None) -> None:
        self._jail = jail or Jail()
        self._limits = self._jail.limits
        self._lock = threading.Lock()
        self._buffer = b""
        self._text, self._dropped = bytearray(), 0
        self._process: Process | None = self._jail.start()
        try:
            self._jail.check(self._greeting())
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process is not None

    def run(
        self,
        code: str,
        *,
        timeout: float,
        stdin: str = "",
        fresh: bool = False,
        remote: Sequence[str] = (),
        answer: Remote | None = None,
    ) -> Result:
        """Executes `code`; `fresh` forgets what was defined before.

        timeout: seconds of wall time.
        stdin: what the code reads as standard input.
        remote: names that are defined as functions whose calls `answer` answers out here.
        """
        message = {"op": "run", "code": code, "stdin": stdin, "fresh": fresh}
        return self._carry_out({**message, "remote": list(remote)}, timeout, answer)

    def call(
        self, name: str, args: Sequence[Any], keywords: Mapping[str, Any], *, timeout: float
    ) -> Result:
        """Calls what `name` means inside, with plain data; "Class.method" makes a Class() first."""
        message = {"op": "call", "name": name, "args": encode(list(args))}
        return self._carry_out({**message, "keywords": encode(dict(keywords))}, timeout, None)

    def interrupt(self) -> None:
        """Ends the run under way, from another thread."""
        with self._lock:
            if self._process:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    os.write(self._process.requests, pack({"op": "interrupt"}))

    def close(self) -> None:
        """Ends all that runs inside."""
        with self._lock:
            process, self._process = self._process, None
        if process:
            process.kill()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -------------------------------------------------------------------- messages
    def _carry_out(self, message: dict[str, Any], timeout: float, answer: Remote | None) -> Result:
        if not self._process:
            raise UserError("this sandbox session has ended; begin another")
        self._text, self._dropped = bytearray(), 0
        start = time.monotonic()
        end, late = start + timeout, False
        outgoing = pack(message)
        while True:
            try:
                reply = self._receive(outgoing, end)
            except KeyboardInterrupt:
                self.interrupt()
                outgoing, end, late = b"", time.monotonic() + self._limits.grace, False
                continue
            outgoing = b""
            if reply is None and not late:
                late, end = True, time.monotonic() + self._limits.grace
                self.interrupt()
            elif reply is None:
                return self._ended(start, "timeout", "it took too long and ignored the interrupt")
            elif isinstance(reply, str):
                return self._ended(start, "timeout" if late else "died", reply)
            elif "call" in reply and answer:
                outgoing = pack(_answered(answer, reply))
            elif reply.get("status") in _POSSIBLE:
                return self._result(reply, start, late)
            else:
                return self._ended(start, "died", "what it answered is no answer")

    def _result(self, reply: dict[str, Any], start: float, late: bool) -> Result:
        text = self._drained()
        try:
            shown, error, code = reply.get("shown"), reply.get("error", ""), reply.get("code")
            if not isinstance(shown, (str, type(None))) or not isinstance(error, str):
                raise ValueError("not text")
            value = decode(reply.get("value"))
            args = decode(reply["args"]) if "args" in reply else None
        except (ValueError, TypeError, RecursionError):
            return self._ended(start, "died", "what it answered is no answer")
        status: Status = "timeout" if late else reply["status"]
        seconds = time.monotonic() - start
        code = code if isinstance(code, int) else None
        return Result(status, text, seconds, shown, value, args, error, code, self._dropped)

    def _ended(self, start: float, status: Status, why: str) -> Result:
        text = self._drained()
        code = None
        if status == "died":
            code = self._exit_code()
        self.close()
        seconds = time.monotonic() - start
        return Result(status, text, seconds, error=why, code=code, dropped=self._dropped)

    def _exit_code(self) -> int | None:
        """Of an interpreter that is gone by itself; None for one that has to be ended here."""
        assert self._process
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.popen.wait(0.5)
        return self._process.popen.returncode

    def _greeting(self) -> Any:
        reply = self._receive(b"", time.monotonic() + self._limits.startup)
        said = self._drained().strip().splitlines()
        if reply is None:
            raise SandboxError(f"the sandbox did not start within {self._limits.startup:g} s")
        if isinstance(reply, str) or "ready" not in reply:
            raise SandboxError(f"the sandbox cannot start: {said[-1] if said else reply}")
        return reply["ready"]

    def _receive(self, outgoing: bytes, end: float) -> dict[str, Any] | str | None:
        """Sends, and waits for one message: None when it is late, text when there is no one."""
        assert self._process
        requests, replies, output = (
            self._process.requests, self._process.replies, self._process.output,
        )  # fmt: skip
        with selectors.DefaultSelector() as selector:
            for fd in (replies, output):
                selector.register(fd, selectors.EVENT_READ)
            if outgoing:
                selector.register(requests, selectors.EVENT_WRITE)
            while True:
                if (reply := self._parsed()) is not None:
                    return reply
                left = end - time.monotonic()
                if left <= 0:
                    return None
                for key, _ in selector.select(left):
                    if key.fd == requests:
                        outgoing = self._write(outgoing)
                        if not outgoing:
                            selector.unregister(requests)
                        continue
                    part = self._read(key.fd)
                    if key.fd == output:
                        if part:
                            self._keep(part)
                        else:
                            selector.unregister(output)
                    elif part:
                        self._buffer += part
                    else:
                        return "the interpreter is gone"

    def _parsed(self) -> dict[str, Any] | str | None:
        """The next message in the buffer."""
        if len(self._buffer) < 4:
            return None
        (length,) = struct.unpack(">I", self._buffer[:4])
        if length > self._limits.message:
            return f"it answered {length} bytes, over the limit of {self._limits.message}"
        if len(self._buffer) < 4 + length:
            return None
        body, self._buffer = self._buffer[4 : 4 + length], self._buffer[4 + length :]
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            message = None
        return message if isinstance(message, dict) else "what it answered is no answer"

    def _write(self, data: bytes) -> bytes:
        assert self._process
        with self._lock:
            try:
                return data[os.write(self._process.requests, data[:65536]) :]
            except BlockingIOError:
                return data
            except BrokenPipeError:
                return b""

    def _read(self, fd: int) -> bytes:
        return os.read(fd, 65536)

    def _keep(self, part: bytes) -> None:
        room = self._limits.output - len(self._text)
        self._text += part[:room]
        if len(part) > room:
            self._dropped += len(part) - room
            time.sleep(THROTTLE)

    def _drained(self) -> str:
        """All output that was written before the reply."""
        assert self._process
        end = time.monotonic() + 0.2
        with contextlib.suppress(BlockingIOError):
            while time.monotonic() < end and (part := self._read(self._process.output)):
                self._keep(part)
        return self._text.decode("utf-8", "replace")


def _answered(answer: Remote, call: dict[str, Any]) -> dict[str, Any]:
    """The answer to a call from inside. `answer` gives {"value", "args"} or {"kind", "error"}."""
    try:
        args, keywords = decode(call["args"]), decode(call["keywords"])
        said = answer(str(call["call"]), args, keywords)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        said = {"kind": "TypeError", "error": str(error)}
    if "error" in said:
        return {"op": "answer", "kind": said["kind"], "error": said["error"]}
    return {"op": "answer", "value": encode(said["value"]), "args": encode(said["args"])}
