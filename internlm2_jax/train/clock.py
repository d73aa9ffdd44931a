"""Where the time of a run goes, by phase; and for how long it has been in the present one."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

BETWEEN = "the loop"


class Clock:
    """Seconds of each phase; phases do not nest.

    with clock.phase("data"):
        batch = ...
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._present = BETWEEN, time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        self._present = name, start
        try:
            yield
        finally:
            end = time.monotonic()
            self._present = BETWEEN, end
            self.seconds[name] += end - start

    def present(self) -> tuple[str, float]:
        """The phase that is going on and its seconds so far; safe to ask from another thread."""
        name, start = self._present
        return name, time.monotonic() - start
