"""What goes wrong in a run of weeks: preemption, a hang, a loss that is not to be trusted.

A bad loss takes the run back to its last checkpoint; from there on it reads the batches *after* the
ones that led to it, as PaLM did (arXiv 2204.02311, section 5.1). InternLM2 does not say what it
did, so when a loss is bad and how often the run may go back are fields of `Recovery`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
import statistics
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from internlm2_jax import distributed, files
from internlm2_jax.errors import UserError
from internlm2_jax.train.clock import Clock

# ------------------------------------------------------------------------------- bad losses


@dataclasses.dataclass(frozen=True)
class Recovery:
    """When a loss is bad, and how often a run may go back for it.

    Attributes:
        max_rollbacks: in the whole run; with 0 the first bad loss ends it.
        spike: robust standard deviations above the median of the last losses that make a spike;
            with 0 only a loss or a gradient that is not finite is bad. Batches must be alike: with
            few rows of unlike sources, the source explains the loss.
        window: how many losses that median is taken over; fewer than that are not judged.
    """

    max_rollbacks: int = 0
    spike: float = 0.0
    window: int = 128


class LossWatch:
    """Judges the loss of one step after another."""

    def __init__(self, recovery: Recovery, losses: Iterable[float] = ()):
        self._spike = recovery.spike
        self._losses = deque(losses, maxlen=recovery.window)

    def judge(self, values: Mapping[str, Any]) -> str:
        """Why the step that measured `values` is bad; "" when it is good."""
        for name in ("loss", "grad_norm"):
            if name in values and not math.isfinite(values[name]):
                return f"{name} is {float(values[name])}"
        if not self._spike or "loss" not in values:
            return ""
        loss = float(values["loss"])
        if len(self._losses) == self._losses.maxlen:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(x - median) for x in self._losses)
            # 1.4826: a normal distribution's standard deviation; a floor for losses all alike
            z = (loss - median) / max(1.4826 * deviation, 1e-3 * abs(median), 1e-12)
            if z > self._spike:
                return f"loss is {loss:.4g}, {z:.1f} deviations above {median:.4g}"
        self._losses.append(loss)
        return ""

    def forget(self) -> None:
        """A new phase, with other data, is judged by its own losses."""
        self._losses.clear()

    @property
    def losses(self) -> list[float]:
        """What a checkpoint keeps, so that a resumed run judges alike."""
        return list(self._losses)


@dataclasses.dataclass(frozen=True)
class Skip:
    """From step number `at` on, batches are read `count` further on."""

    at: int
    count: int
    reason: str

    def row(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Skips:
    """The batches that a run left out, in skips.json of its folder.

    A checkpoint holds them too; it is older than the newest of them when a run was killed soon
    after it went back, so both are read.
    """

    def __init__(self, folder: Path, recorded: Iterable[Mapping[str, Any]] = ()):
        self._path = folder / "skips.json"
        written = files.read_json(self._path) if self._path.is_file() else []
        found = [Skip(**row) for row in [*written, *recorded]]
        self.all: list[Skip] = list(dict.fromkeys(found))

    def add(self, skip: Skip) -> None:
        self.all.append(skip)
        if distributed.is_first():
            files.write_json(self._path, self.rows())

    def rows(self) -> list[dict[str, Any]]:
        return [skip.row() for skip in self.all]

    def before(self, step: int, since: int = 0) -> int:
        """Batches left out from step number `since` up to `step`."""
        return sum(skip.count for skip in self.all if since <= skip.at <= step)


# ------------------------------------------------------------------------------- preemption

_calls = itertools.count(1)  # over all stages of a process: the processes agree on one of them


class StopSignal:
    """Whether to stop now: SIGTERM came to this process or, of several, to any of them.

    Several processes agree through jax's preemption service, which takes SIGTERM itself and picks
    a step that none has passed; asking costs them nothing but a look. Call it after every step.
    """

    def __init__(self) -> None:
        self._came = False
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: Any) -> None:
        self._came = True

    def __call__(self) -> bool:
        if jax.process_count() > 1:  # true once only: another fault may keep the loop from it
            self._came |= multihost_utils.reached_preemption_sync_point(next(_calls))
        return self._came


# ------------------------------------------------------------------------------------ hangs


class Watchdog:
    """Ends the process when one phase lasts `seconds` (0: never), saying where it stands.

    A collective that waits for a dead process never raises; only another thread can see that.
    """

    def __init__(self, clock: Clock, label: str, seconds: float, status: int):
        self._clock, self._label, self._seconds, self._status = clock, label, seconds, status
        self._main = threading.get_ident()
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            phase, seconds = self._clock.present()
            if seconds < self._seconds:
                continue
            frame = sys._current_frames().get(self._main)
            stack = "".join(traceback.format_stack(frame)) if frame else ""
            print(
                f"{stack}error: {self._label}: process {jax.process_index()} has waited "
                f"{seconds:.0f} s for {phase} (stack above); the same command continues from the "
                f"last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(self._status)


def too_many(label: str, reason: str, where: str, recovery: Recovery, good: bool) -> UserError:
    """The end of a run that may not, or cannot, go back."""
    if not recovery.max_rollbacks:
        why = ""
    elif not good:
        why = ", and there is no checkpoint to go back to"
    else:
        why = f", after {recovery.max_rollbacks} rollbacks"
    return UserError(
        f"{label}: {reason} {where}{why}; lower the learning rate or look at the batch of that step"
    )
