"""How fast a run is: tokens per second, share of the chips' peak, share of waiting, memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from internlm2_jax import chips
from internlm2_jax.train.clock import Clock


class Work(NamedTuple):
    """Of one step over all devices: tokens, padding included, and useful operations."""

    tokens: int
    flops: float


class Speed:
    """Rows of speed.jsonl: what depends on the clock and so stays out of metrics.jsonl.

    seconds         of a step, the wait for data included; validation and checkpoints are not
    tokens_per_second, mfu      over all devices; mfu against the peak in chips.py, on a CPU
                                against a matrix product measured when the run starts
    data_wait       share of a step in which the device had nothing to do for want of a batch
    checkpoint_seconds          for which saving kept the loop
    memory_bytes, memory_peak_bytes     of the fullest device here; absent on a CPU
    """

    def __init__(self, clock: Clock, work: Callable[[int], Work] | None):
        self._clock, self._work = clock, work
        self._peak = peak_flops() if work else None
        self.reset()

    def reset(self) -> None:
        """Measures from now on."""
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        self._before = dict(self._clock.seconds)

    def count(self, step: int) -> None:
        """Step number `step` has ended."""
        self._steps += 1
        if self._work:
            tokens, flops = self._work(step)
            self._tokens, self._flops = self._tokens + tokens, self._flops + flops

    def row(self) -> dict[str, float]:
        """The means over the steps since the last row; empty when there were none."""
        if not self._steps:
            return {}
        now, before = self._clock.seconds, self._before
        data, step, saving = (
            now.get(phase, 0.0) - before.get(phase, 0.0) for phase in ("data", "step", "checkpoint")
        )
        seconds = max(data + step, 1e-9)
        row: dict[str, float] = {
            "time": time.time(),
            "seconds": seconds / self._steps,
            "data_wait": data / seconds,
            "checkpoint_seconds": saving,
        }
        if self._tokens:
            row["tokens_per_second"] = self._tokens / seconds
        if self._flops and self._peak:
            row["mfu"] = self._flops / seconds / self._peak
        row |= memory()
        self.reset()
        return row


def memory() -> dict[str, int]:
    """Bytes in use, and the most there have been, on the fullest device of this process."""
    stats = [s for d in jax.local_devices() if (s := d.memory_stats())]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {
        name: max(s[key] for s in stats)
        for name, key in names.items()
        if stats and all(key in s for s in stats)
    }


def peak_flops() -> float | None:
    """Operations per second of all devices together; None for a chip that nobody has told of."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        # Devices of a CPU are shares of one machine, so they do not add up.
        return _measured_peak() * jax.process_count()
    chip = chips.of_device(devices[0].device_kind)
    return None if chip is None else chip.flops * len(devices)


@functools.cache
def _measured_peak(size: int = 1024) -> float:
    """The best of some float32 matrix products on the first local device."""
    with jax.default_device(jax.local_devices()[0]):
        x = jnp.ones((size, size), jnp.float32)
        product: Any = jax.jit(jnp.matmul)
        product(x, x).block_until_ready()
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
