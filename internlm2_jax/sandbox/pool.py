"""Many programs, a bounded number at a time, each in a sandbox of its own."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from internlm2_jax.sandbox.jail import Jail, SandboxError
from internlm2_jax.sandbox.session import Result, Session, require

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Program:
    """Source, what it reads as standard input, and its seconds of wall time."""

    code: str
    stdin: str = ""
    timeout: float = 10.0


def run_many(
    programs: Sequence[Program],
    *,
    jail: Jail | None = None,
    workers: int | None = None,
    ended: Callable[[], object] = lambda: None,
) -> list[Result]:
    """Results in the order of `programs`; `workers` (default: processor cores) run at a time.

    ended: called after each program, for a progress bar.

    A failure of the machine is the result "infrastructure" of that program alone. Errors: UserError
    where this machine cannot isolate at all; no program has run then.
    """

    require(jail)

    def run(program: Program) -> Result:
        try:
            with Session(jail) as session:
                return session.run(program.code, stdin=program.stdin, timeout=program.timeout)
        except (SandboxError, OSError) as error:
            return Result("infrastructure", "", 0.0, error=str(error))

    return list(parallel(run, programs, workers=workers, ended=ended))


def parallel(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int | None = None,
    ended: Callable[[], object] = lambda: None,
) -> Iterator[R]:
    """`work` of each item, in order; what is left is not begun once one has raised."""
    lock = threading.Lock()

    def one(item: T) -> R:
        result = work(item)
        with lock:
            ended()
        return result

    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as threads:
        futures = [threads.submit(one, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
