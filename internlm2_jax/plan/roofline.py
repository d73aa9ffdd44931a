"""A time for a step that can be defended: each term is bytes or operations over a public figure.

    compute   operations of matrix products / peak
    memory    bytes to and from main memory / bandwidth
    exposed   time of collectives that nothing hides
    estimate  = max(compute, memory) + exposed

What hides a collective is found by playing the compiled schedule back: an asynchronous collective
runs from its start on links of its own axes while the work after it goes on, and counts only as far
as it is unfinished where the program waits for it; a synchronous one counts whole. The estimate is
a lower bound: no launch overhead, no product below its peak.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from internlm2_jax.chips import Chip
from internlm2_jax.plan.hlo import Collective, Event, Loop, Program, Wait


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one device.

    Attributes:
        links: {mesh axes: seconds its collectives take on their links, hidden or not}.
        exposed: {mesh axes: seconds of them that nothing hides}.
    """

    compute: float
    memory: float
    links: dict[str, float]
    exposed: dict[str, float]

    @property
    def exposed_seconds(self) -> float:
        return sum(self.exposed.values())

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.exposed_seconds

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        terms = {
            "compute": self.compute,
            "memory": self.memory,
            "collectives": self.exposed_seconds,
        }
        return max(terms, key=lambda name: terms[name])


def estimate(program: Program, chip: Chip, seconds: Callable[[Collective], float]) -> Roofline:
    """The roofline of `program`; `seconds` gives the time of a collective (links.Links)."""
    links: dict[str, float] = {}
    for event, times in program.walk():
        if isinstance(event, Collective):
            links[event.axes] = links.get(event.axes, 0.0) + times * seconds(event)
    replay = _Replay(chip, seconds)
    replay.run(program.events)
    return Roofline(
        compute=program.flops / chip.flops,
        memory=program.hbm_bytes / chip.hbm_bandwidth,
        links=links,
        exposed={axes: t for axes, t in replay.exposed.items() if t > 0},
    )


class _Replay:
    """A clock that goes through the schedule."""

    def __init__(self, chip: Chip, seconds: Callable[[Collective], float]):
        self._chip, self._seconds = chip, seconds
        self._now = 0.0
        self._links_free: dict[str, float] = {}
        self._running: dict[str, tuple[str, float]] = {}  # name -> axes, end
        self.exposed: dict[str, float] = {}

    def run(self, events: tuple[Event, ...]) -> None:
        for event in events:
            if isinstance(event, Loop):
                self._loop(event)
            elif isinstance(event, Collective):
                self._collective(event)
            elif isinstance(event, Wait):
                for name in event.names:
                    if name in self._running:
                        self._wait(*self._running.pop(name))
            else:
                self._now += max(
                    event.flops / self._chip.flops, event.hbm_bytes / self._chip.hbm_bandwidth
                )

    def _collective(self, c: Collective) -> None:
        begin = max(self._now, self._links_free.get(c.axes, 0.0))
        end = begin + self._seconds(c)
        self._links_free[c.axes] = end
        if c.asynchronous:
            self._running[c.name] = (c.axes, end)
        else:
            self._wait(c.axes, end)

    def _wait(self, axes: str, end: float) -> None:
        self.exposed[axes] = self.exposed.get(axes, 0.0) + max(0.0, end - self._now)
        self._now = max(self._now, end)

    def _loop(self, loop: Loop) -> None:
        """Plays two rounds; the others are like the second."""
        for _ in range(min(loop.trips, 2)):
            start, before = self._now, dict(self.exposed)
            self.run(loop.body)
        if loop.trips > 2:
            more = loop.trips - 2
            for axes, t in self.exposed.items():
                self.exposed[axes] = t + more * (t - before.get(axes, 0.0))
            shift = more * (self._now - start)
            self._now += shift
            self._links_free = {axes: t + shift for axes, t in self._links_free.items()}
            self._running = {n: (axes, t + shift) for n, (axes, t) in self._running.items()}
