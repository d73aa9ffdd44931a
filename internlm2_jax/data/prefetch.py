"""Batches made ahead of time by one thread, while the device computes."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from internlm2_jax.errors import UserError

T = TypeVar("T")


class Prefetch(Generic[T]):
    """`prefetch(step, *more)` is `make(step, *more)` for steps below `steps`, made ahead of time.

    `depth` results are ready or in the making. Asking for another step than the next one, as after
    a restore, or with other arguments, drops them and starts there. What `make` raises is raised
    where the step is asked for.

    Attributes: `waited_s`, the seconds that the caller has waited in all.
    """

    def __init__(self, make: Callable[..., T], steps: int, *, depth: int = 2):
        if depth < 1:
            raise UserError(f"prefetch depth is {depth}; it must be 1 batch or more")
        self.waited_s = 0.0
        self._make, self._steps, self._depth = make, steps, depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: collections.deque[tuple[tuple, Future[T]]] = collections.deque()

    def __call__(self, step: int, *more: Any) -> T:
        start = time.perf_counter()
        if not self._ahead or self._ahead[0][0] != (step, *more):
            self._drop()
            self._submit(step, *more)
        _, future = self._ahead.popleft()
        last = self._ahead[-1][0][0] if self._ahead else step
        for later in range(last + 1, min(step + self._depth + 1, self._steps)):
            self._submit(later, *more)
        try:
            return future.result()
        finally:
            self.waited_s += time.perf_counter() - start

    def close(self) -> None:
        """Ends the thread after the batch it is making."""
        self._drop()
        self._thread.shutdown()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, *arguments: Any) -> None:
        self._ahead.append((arguments, self._thread.submit(self._make, *arguments)))

    def _drop(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
