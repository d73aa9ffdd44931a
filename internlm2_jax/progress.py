"""Progress of long work: a live bar with rate and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

PLAIN_INTERVAL_SECONDS = 10.0


class Progress:
    """Counts `unit`s of work towards `total` under a `label`, and shows rate and time left.

    with Progress("pretrain", total=100, unit="step") as progress:
        progress.update(1, loss=2.5)
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "step",
        done: int = 0,
        silent: bool = False,
    ):
        self.label, self.total, self.unit = label, total, unit
        self.done = self._first = done
        self._silent = silent
        self._live = sys.stderr.isatty() and not silent
        self._start = self._last_line = time.monotonic()
        self._shown: dict[str, Any] = {}
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit=unit,
            disable=not self._live,
            dynamic_ncols=True,
            unit_scale=(total or 0) > 100_000,
            smoothing=0.1,
        )

    def __enter__(self) -> Progress:
        return self

    def update(self, n: int = 1, **shown: Any) -> None:
        """Adds `n` units; keyword values (numbers or text) are shown beside the count."""
        self.done += n
        self._shown.update(shown)
        if self._live:
            self._bar.set_postfix(_texts(self._shown), refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self._line()

    def back_to(self, done: int) -> None:
        """Counts from `done` again."""
        self._first -= self.done - done  # the rate counts the work that was lost
        self.done = done
        self._bar.n = done

    def note(self, text: str) -> None:
        """Prints a line of its own without breaking the bar."""
        if self._silent:
            return
        self._bar.write(f"{self.label}: {text}", file=sys.stderr)

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
        if not self._live and exc[0] is None:
            self._line()

    def _line(self) -> None:
        if self._silent:
            return
        now = time.monotonic()
        self._last_line = now
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        share = f"/{self.total:,}" if self.total else ""
        left = f", {_clock((self.total - self.done) / rate)} left" if self.total and rate else ""
        shown = "".join(f", {k} {v}" for k, v in _texts(self._shown).items())
        print(
            f"{self.label}: {self.done:,}{share} {self.unit}s, {rate:,.1f}/s{left}{shown}",
            file=sys.stderr,
            flush=True,
        )


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items()}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
