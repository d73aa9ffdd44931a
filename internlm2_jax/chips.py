"""What a chip can do, and which pods of it there are.

Figures are the vendors' public ones. TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} for peak
operations, memory and its bandwidth; links from "How to Scale Your Model" (jax-ml.github.io/
scaling-book, table of TPU specs): bytes per second of one link in one direction, and of one chip to
the data-centre network. `hbm_bytes` is what libtpu lets a program use. GPU: NVIDIA's data sheets of
A100 80GB SXM, H100 SXM, H200 SXM (dense bf16; NVLink in one direction; one 400 Gb/s, for A100
200 Gb/s, network card a GPU as in DGX systems).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

from internlm2_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, the unit that jax calls a device.

    Attributes:
        flops: dense bf16 operations per second.
        hbm_bytes: memory that a program can use.
        hbm_bandwidth: bytes per second.
        link: bytes per second in one direction: of one ICI link (TPU), of all of a GPU's NVLinks.
        torus: how many dimensions the links span (0: a GPU behind a switch).
        network: bytes per second to other slices or other hosts.
    """

    name: str
    platform: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link: float
    torus: int
    network: float


CHIPS = {
    c.name: c
    for c in (
        Chip("v4", "tpu", 275e12, int(30.75 * GIB), 1228e9, 45e9, 3, 6.25e9),
        Chip("v5e", "tpu", 197e12, int(15.75 * GIB), 819e9, 45e9, 2, 6.25e9),
        Chip("v5p", "tpu", 459e12, int(95.74 * GIB), 2765e9, 90e9, 3, 6.25e9),
        Chip("v6e", "tpu", 918e12, int(31.25 * GIB), 1640e9, 90e9, 2, 12.5e9),
        Chip("a100", "gpu", 312e12, int(79.15 * GIB), 2039e9, 300e9, 0, 25e9),
        Chip("h100", "gpu", 989.4e12, 84_942_979_072, 3352e9, 450e9, 0, 50e9),
        Chip("h200", "gpu", 989.4e12, 150_109_880_320, 4800e9, 450e9, 0, 50e9),
    )
}

_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def of_device(kind: str) -> Chip | None:
    """The chip that jax calls `kind` (`device.device_kind`); None when it is not in the table."""
    return CHIPS[_KINDS[kind]] if kind in _KINDS else None


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_SIDES = {"v4": (16, 16, 16), "v5p": (16, 16, 24)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A pod, or several equal slices of one kind joined by the data-centre network.

    `shape` is the torus of one slice; for GPUs (partitions, hosts, GPUs of a host).
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_devices(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions of the torus close into a ring.

        v4 and v5p: all, when every side is a multiple of 4 (optical switches join whole cubes);
        v5e and v6e: a side of 16.
        """
        if self.chip.torus == 3:
            return (all(side % 4 == 0 for side in self.shape),) * 3
        return tuple(side == 16 for side in self.shape)

    @property
    def name(self) -> str:
        """The name of one slice, as libtpu knows it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices}x{self.name}"


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x4`, `v5e:16x16`, `2xv5p:4x4x4` (two slices), `h100:1x8x8` (1 x 8 hosts x 8 GPUs).

    Errors: UserError that names the nearest chip or the nearest pod.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", text.strip().lower())
    if match is None:
        raise UserError(
            f"topology {text!r} is not of the form CHIP:AxB; for example v5p:4x4x4, v5e:16x16, "
            "2xv5p:4x4x4, h100:1x1x8"
        )
    slices, name, shape = int(match.group(1) or 1), match.group(2), match.group(3)
    if name not in CHIPS:
        close = difflib.get_close_matches(name, CHIPS, n=1, cutoff=0.3)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"topology {text!r}: no chip {name!r}; {hint}there are {', '.join(CHIPS)}")
    chip = CHIPS[name]
    sides = tuple(int(side) for side in shape.split("x"))
    if chip.platform == "gpu":
        if len(sides) != 3 or math.prod(sides) < 1 or slices != 1 or sides[2] > 8:
            raise UserError(
                f"topology {text!r}: GPUs are given as partitions x hosts x GPUs of a host (up to "
                f"8); for example {name}:1x{max(1, math.prod(sides) // 8)}x8"
            )
        return Topology(chip, sides)
    known = pods(chip)
    if sides not in known:
        count = math.prod(sides)
        nearest = min(known, key=lambda p: (abs(math.log((math.prod(p)) / max(count, 1))), p))
        raise UserError(
            f"topology {text!r} does not exist; the nearest is {name}:{'x'.join(map(str, nearest))}"
            f" ({math.prod(nearest)} chips)"
        )
    if slices < 1:
        raise UserError(f"topology {text!r} has no slices; write {name}:{shape} for one")
    return Topology(chip, sides, slices)


def pods(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """The slices of a TPU that can be rented, smallest first."""
    if chip.torus == 2:
        return _FLAT
    a, b, c = _SIDES[chip.name]
    cubes = [
        (x, y, z)
        for x in range(4, a + 1, 4)
        for y in range(x, b + 1, 4)
        for z in range(y, c + 1, 4)
    ]
    return (*_SMALL_CUBES, *sorted(cubes, key=math.prod))
