"""The interpreter inside the sandbox, and the messages that cross its border.

This file is handed to `python -c` inside, so it uses the standard library alone. Whatever runs
there may take over this process; nothing outside believes more of it than "this is what the program
answered". Messages are four bytes of length and that much JSON.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import linecache
import os
import queue
import resource
import signal
import struct
import sys
import threading
import traceback
import types
from typing import Any

_SCALARS = (type(None), bool, int, str)
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


# ---------------------------------------------------------------------------- values
def encode(value: Any) -> Any:
    """Plain data as JSON: exact types only, so that no code of another's comes back with it.

    Errors: TypeError for anything but None, bool, int, float, complex, str, bytes, list, tuple,
    set, frozenset and dict of these.
    """
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is float or kind is complex:
        return {kind.__name__: repr(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is dict:
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if kind.__name__ in _SEQUENCES and kind is _SEQUENCES[kind.__name__]:
        return {kind.__name__: [encode(item) for item in value]}
    raise TypeError(f"a value of type {kind.__name__} is not plain data")


def decode(data: Any) -> Any:
    """The inverse of `encode`. Errors: ValueError, TypeError for what `encode` does not make."""
    if type(data) in _SCALARS:
        return data
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("not an encoded value")
    ((kind, body),) = data.items()
    if kind == "float":
        return float(body)
    if kind == "complex":
        return complex(body)
    if kind == "bytes":
        return bytes.fromhex(body)
    if kind == "dict":
        return {decode(k): decode(v) for k, v in body}
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decode(item) for item in body)
    raise ValueError(f"no kind of value {kind!r}")


def pack(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode("utf-8", "backslashreplace")
    return struct.pack(">I", len(body)) + body


# ---------------------------------------------------------------------------- in the sandbox
class _Lost(SystemExit):
    """The other side has gone."""


class _Interpreter:
    def __init__(self, requests: int, replies: int, text_limit: int) -> None:
        self._requests, self._replies = requests, replies
        self._text_limit = text_limit
        self._inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._running = False
        self._cells = 0
        self._namespace = self._fresh()

    def serve(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._listen, daemon=True).start()
        self._send({"ready": facts()})
        while (message := self._next()) is not None:
            self._send(self._guarded(message))

    # -------------------------------------------------------------------- messages
    def _listen(self) -> None:
        """Reads messages also while a program runs, so that it can be interrupted."""
        main = threading.main_thread().ident
        while True:
            head = self._read(4)
            body = self._read(struct.unpack(">I", head)[0]) if head else b""
            message = json.loads(body) if body else None
            if message and message["op"] == "interrupt":
                if self._running and main:
                    signal.pthread_kill(main, signal.SIGINT)
                continue
            self._inbox.put(message)
            if message is None:
                return

    def _read(self, count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            part = os.read(self._requests, count - len(parts))
            if not part:
                return b""
            parts += part
        return parts

    def _next(self) -> dict[str, Any] | None:
        return self._inbox.get()

    def _send(self, message: dict[str, Any]) -> None:
        data = memoryview(pack(message))
        while data:
            data = data[os.write(self._replies, data) :]

    # -------------------------------------------------------------------- programs
    def _fresh(self) -> dict[str, Any]:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        return module.__dict__

    def _guarded(self, message: dict[str, Any]) -> dict[str, Any]:
        """One message carried out; an interrupt ends it and nothing else."""
        try:
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                self._running = True
                reply = self._run(message) if message["op"] == "run" else self._call(message)
            finally:
                self._running = False
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                _flush()
            return reply
        except KeyboardInterrupt:
            return {"status": "interrupted", "error": "KeyboardInterrupt"}
        except _Lost:
            raise
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            return {"status": "exit", "code": code & 255, "error": f"SystemExit: {stop.code}"[:200]}
        except BaseException as error:  # whatever the program raises is its result
            return {"status": "error", "error": self._explain(error)}

    def _run(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("fresh"):
            self._namespace = self._fresh()
        _set_stdin(message.get("stdin", ""))
        for name in message.get("remote", ()):
            self._namespace[name] = self._remote(name)
        self._cells += 1
        name = f"<cell {self._cells}>"
        source = message["code"]
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        tree = ast.parse(source, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), self._namespace)
        if last is None:
            return {"status": "ok"}
        value = eval(compile(ast.Expression(last.value), name, "eval"), self._namespace)
        return {"status": "ok", "shown": None if value is None else self._clip(repr(value))}

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        """Calls a function by name, or a method of a class: it is made without arguments first."""
        owner, *rest = message["name"].split(".")
        target = self._namespace[owner]
        for part in rest:
            target = getattr(target() if isinstance(target, type) else target, part)
        args, keywords = decode(message["args"]), decode(message["keywords"])
        value = encode(target(*args, **keywords))
        return {"status": "ok", "value": value, "args": encode(args)}

    def _remote(self, name: str) -> Any:
        """A function that stands for one of another sandbox; lists it changes are changed here."""

        def call(*args: Any, **keywords: Any) -> Any:
            self._send({"call": name, "args": encode(list(args)), "keywords": encode(keywords)})
            reply = self._next()
            if reply is None:
                raise _Lost
            if "error" in reply:
                kind: Any = getattr(builtins, reply["kind"], None)
                known = isinstance(kind, type) and issubclass(kind, Exception)
                raise (kind if known else RuntimeError)(reply["error"])
            for old, new in zip(args, decode(reply["args"])):  # noqa: B905
                if type(old) is list and type(new) is list:
                    old[:] = new
                elif type(old) in (dict, set) and type(new) is type(old):
                    old.clear()
                    old.update(new)
            return decode(reply["value"])

        call.__name__ = name
        return call

    # -------------------------------------------------------------------- what is said of errors
    def _explain(self, error: BaseException) -> str:
        """The traceback from the program's own frames on."""
        frames = error.__traceback__
        while frames and not frames.tb_frame.f_code.co_filename.startswith("<cell "):
            frames = frames.tb_next
        try:
            text = "".join(traceback.format_exception(type(error), error, frames))
        except BaseException:  # an error whose text is a program itself
            text = type(error).__name__
        return self._clip(text)

    def _clip(self, text: str) -> str:
        limit = self._text_limit
        return text if len(text) <= limit else text[: limit // 2] + "\n...\n" + text[-limit // 2 :]


def facts() -> dict[str, Any]:
    """What is in force for this process, as the kernel says."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    with open("/proc/net/dev") as file:
        interfaces = [line.split(":")[0].strip() for line in file.readlines()[2:]]
    limits = {n: resource.getrlimit(getattr(resource, f"RLIMIT_{n}")) for n in LIMITS}
    return {
        "seccomp": int(fields["Seccomp"]),
        "no_new_privileges": int(fields["NoNewPrivs"]),
        "capabilities": int(fields["CapEff"], 16) | int(fields["CapPrm"], 16),
        "bounding": int(fields["CapBnd"], 16),
        "interfaces": interfaces,
        "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
        "root": sorted(os.listdir("/")),
        "uid": os.getuid(),
        "rlimits": limits,
    }


LIMITS = ("AS", "NPROC", "FSIZE", "NOFILE", "CORE", "MEMLOCK", "MSGQUEUE")


def _set_stdin(text: str) -> None:
    file = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    with os.fdopen(file, "wb", closefd=False) as handle:
        handle.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.close(file)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):  # the program may have closed or replaced it
            stream.flush()


def main() -> None:
    settings = json.loads(sys.argv[1])
    # low numbers, whatever is open outside: a program finds here what it would find anywhere
    requests, replies = os.dup(0), os.dup(settings["replies"])
    os.close(settings["replies"])
    for name, value in settings["rlimits"].items():
        if name != "AS":
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.nice(5)
    os.chdir("/tmp")
    sys.path[:0] = settings["packages"]
    sys.argv[:] = [""]
    resource.setrlimit(resource.RLIMIT_AS, (settings["rlimits"]["AS"],) * 2)
    _Interpreter(requests, replies, settings["text"]).serve()
    os._exit(0)


if __name__ == "__main__":
    main()
