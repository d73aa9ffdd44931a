"""A trace of some steps, for TensorBoard's profile plugin, XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces the steps of a window [first, stop) into `folder`; without a window it does nothing.

    Steps are counted from 1, as in metrics.jsonl. The device is idle at both ends of the window, so
    the trace holds those steps whole, and no others.
    """

    def __init__(self, window: tuple[int, int] | None, folder: Path):
        self._window, self._folder = window, folder
        self._running = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._running:
            self._end()

    def before(self, step: int) -> None:
        """Step `step` is about to begin."""
        if self._window and not self._running and self._window[0] <= step < self._window[1]:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def ends(self, step: int) -> bool:
        """Whether step `step` must have ended before the next one begins."""
        return self._window is not None and step in (self._window[0] - 1, self._window[1] - 1)

    def after(self, step: int) -> None:
        """Step `step` has ended, or the next one may begin."""
        if self._running and self._window and step >= self._window[1] - 1:
            self._end()

    def _end(self) -> Any:
        self._running = False
        jax.profiler.stop_trace()
