"""How long a collective takes on the links it runs over.

Bandwidth-optimal algorithms are assumed: what a device must send (hlo.Collective.sent) over what
its links can carry at once, plus a microsecond a hop ("How to Scale Your Model", chapter 3).

TPU. A group that spans a whole ring of the torus uses two links in that dimension, one that spans
part of it (or a side that does not close) one; groups that are interleaved in a dimension share its
links. Dimensions work at the same time. An all-to-all is bound by the middle of its longest side:
on a ring of n, n/8 of the payload passes each link, on a line n/4. Between slices, the
data-centre network.

GPU. Within a host NVLink; beyond it the network cards of the GPUs that take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from internlm2_jax.chips import Topology
from internlm2_jax.plan.hlo import Collective

HOP_SECONDS = 1e-6
_REDUCING = {"all-reduce": 2.0}


class Links:
    """Times of collectives between the devices of a mesh, in the order of `mesh.devices.flat`."""

    def __init__(self, topology: Topology, devices: Sequence[Any]):
        self._topology = topology
        self._gpu = topology.chip.platform == "gpu"
        if self._gpu:
            per_host = topology.shape[-1]
            self._hosts = np.array([d.id // per_host for d in devices])
        else:
            rank = len(topology.shape)
            self._coords = np.array([tuple(d.coords)[:rank] for d in devices])
            self._slices = np.array([getattr(d, "slice_index", 0) or 0 for d in devices])
        self._known: dict[tuple, tuple[float, float, str]] = {}

    def seconds(self, c: Collective) -> float:
        """Time of one collective when nothing else uses its links."""
        if c.members == 1:
            return 0.0
        per_byte, hops, _ = self._rate(c)
        base = c.payload if c.kind in ("all-to-all", "collective-permute") else c.sent
        return base * per_byte + HOP_SECONDS * hops * _REDUCING.get(c.kind, 1.0)

    def medium(self, c: Collective) -> str:
        """What it runs over: "ici", "nvlink" or "network"."""
        return self._rate(c)[2]

    def _rate(self, c: Collective) -> tuple[float, float, str]:
        """(seconds per byte of `payload` or `sent`, hops, medium)."""
        kind = c.kind in ("all-to-all", "collective-permute") and c.kind
        key = (kind, c.groups.shape, c.groups.tobytes())
        if key not in self._known:
            # Groups of one collective are alike; a few are looked at and the slowest counts.
            rows = c.groups[:: max(1, len(c.groups) // 8)]
            rate = self._gpu_rate if self._gpu else self._tpu_rate
            self._known[key] = max(rate(c.kind, row) for row in rows)
        return self._known[key]

    def _tpu_rate(self, kind: str, row: np.ndarray) -> tuple[float, float, str]:
        chip = self._topology.chip
        if len(set(self._slices[row].tolist())) > 1:
            return 1 / chip.network, len(row), "network"
        if kind == "collective-permute":
            distance = self._distance(*self._coords[row])
            return max(distance, 1) / chip.link, distance, "ici"
        capacity, hops, middle = 0.0, 0.0, 0.0
        sides = zip(self._coords[row].T, self._topology.shape, self._topology.wraps, strict=True)
        for places, side, wraps in sides:
            distinct = np.unique(places)
            n = len(distinct)
            if n == 1:
                continue
            ring = wraps and n == side
            shared = int(np.diff(distinct).min())
            capacity += (2 if ring else 1) * chip.link / shared
            hops += n / 2 if ring else n - 1
            middle = max(middle, n * shared / (8 if ring else 4) / chip.link)
        return (middle if kind == "all-to-all" else 1 / capacity), hops, "ici"

    def _distance(self, a: np.ndarray, b: np.ndarray) -> float:
        apart = np.abs(a - b)
        sides, wraps = np.array(self._topology.shape), np.array(self._topology.wraps)
        return float(np.where(wraps, np.minimum(apart, sides - apart), apart).sum())

    def _gpu_rate(self, kind: str, row: np.ndarray) -> tuple[float, float, str]:
        chip = self._topology.chip
        hosts, counts = np.unique(self._hosts[row], return_counts=True)
        if len(hosts) == 1:
            return 1 / chip.link, 1, "nvlink"
        outside = (len(hosts) - 1) / len(hosts) / (1 - 1 / len(row))
        lanes = counts.min() if kind not in ("all-to-all", "collective-permute") else 1
        return max(1 / chip.link, outside / (lanes * chip.network)), 2, "network"
