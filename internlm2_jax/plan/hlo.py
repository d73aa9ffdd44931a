"""What one step of a compiled program does: products, memory traffic, collectives, loops.

The compiler's own `cost_analysis` counts the body of a loop once, so that a scanned model of 32
layers shows a fraction of its operations; here every loop counts as often as it runs. The program
is kept as a tree of events in the order of execution, because whether a collective is hidden
depends on what runs between its start and its end.

    program = read(compiled.as_text(), mesh_shape={"data": 1, "fsdp": 64, ...})
    program.flops, program.hbm_bytes, program.collectives()

All figures are per device and per call of the program.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from internlm2_jax.plan import flops, groups, loops, traffic
from internlm2_jax.plan.hlo_text import HBM, Computation, Instruction, Module, leaves, parse

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Anything that computes or moves data within a device."""

    name: str
    flops: float
    hbm_bytes: float


@dataclasses.dataclass(frozen=True, eq=False)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of KINDS.
        axes: mesh axes it runs along (groups.axes_of).
        payload: bytes of the whole value on one device: what an all-gather leaves, what a reduction
            or an all-to-all takes, what a permutation passes on.
        sent: bytes that one device must send at least, over all links.
        members: devices in a group.
        groups: [groups, members] device numbers.
        asynchronous: other work may run between its start and its end.
        hbm_bytes: memory traffic of the device for it.
    """

    name: str
    kind: str
    axes: str
    payload: float
    sent: float
    members: int
    groups: groups.Groups
    asynchronous: bool
    hbm_bytes: float


@dataclasses.dataclass(frozen=True, eq=False)
class Wait:
    """Where the collectives with these names must have ended."""

    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """`body` runs `trips` times; `known` is False when data decide, and then trips is 1."""

    trips: int
    known: bool
    body: tuple[Event, ...]


Event = Work | Collective | Wait | Loop


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step as events in order.

    Attributes:
        warnings: what the figures below leave out, in words.
    """

    events: tuple[Event, ...]
    warnings: tuple[str, ...]

    def walk(self) -> Iterator[tuple[Event, int]]:
        """Every event but loops, with the times it happens."""
        yield from _walk(self.events, 1)

    @property
    def flops(self) -> float:
        """Operations of matrix products (and of kernels that tell theirs)."""
        return sum(e.flops * n for e, n in self.walk() if isinstance(e, Work))

    @property
    def hbm_bytes(self) -> float:
        """Bytes to and from main memory (traffic.py)."""
        return sum(e.hbm_bytes * n for e, n in self.walk() if isinstance(e, (Work, Collective)))

    def part(self, inside: bool) -> Program:
        """The loops that data end (their bodies once), or all that is outside of them."""
        found = _parts(self.events)[inside]
        return Program(tuple(found), self.warnings)

    def collectives(self) -> list[Total]:
        """Totals by kind, axes and whether asynchronous; most bytes first."""
        found: dict[tuple, Total] = {}
        for event, n in self.walk():
            if isinstance(event, Collective):
                key = (event.kind, event.axes, event.asynchronous)
                old = found.get(key, Total(*key))
                found[key] = dataclasses.replace(
                    old,
                    count=old.count + n,
                    payload=old.payload + n * event.payload,
                    sent=old.sent + n * event.sent,
                )
        return sorted(found.values(), key=lambda t: -t.sent)


@dataclasses.dataclass(frozen=True)
class Total:
    """A row of the table of collectives; bytes per device and step."""

    kind: str
    axes: str
    asynchronous: bool
    count: int = 0
    payload: float = 0.0
    sent: float = 0.0


def _parts(events: tuple[Event, ...]) -> tuple[list[Event], list[Event]]:
    outside: list[Event] = []
    inside: list[Event] = []
    for event in events:
        if isinstance(event, Loop) and not event.known:
            inside += event.body
        else:
            outside.append(event)
    return outside, inside


def _walk(events: tuple[Event, ...], times: int) -> Iterator[tuple[Event, int]]:
    for event in events:
        if isinstance(event, Loop):
            yield from _walk(event.body, times * event.trips)
        else:
            yield event, times


def read(text: str, mesh_shape: dict[str, int]) -> Program:
    """The program of `compiled.as_text()`.

    Args:
      mesh_shape: sizes of the mesh axes in order, as in `mesh.shape`.
    Errors: ValueError when the text has something that this reader does not know.
    """
    module = parse(text)
    reader = _Reader(module, mesh_shape)
    events = reader.events(module.computations[module.entry])
    return Program(events, tuple(reader.warnings()))


class _Reader:
    def __init__(self, module: Module, mesh_shape: dict[str, int]):
        self._module, self._mesh = module, mesh_shape
        self._devices = math.prod(mesh_shape.values())
        self._kernels: collections.Counter[str] = collections.Counter()
        self._unknown_loops = 0
        self._communicates: dict[str, bool] = {}
        self._open: set[str] = set()  # channels of collectives under way

    def warnings(self) -> Iterator[str]:
        for name, count in self._kernels.items():
            yield f"{count} calls of kernel {name} tell no cost_estimate: their work counts as 0"
        if self._unknown_loops:
            yield (
                f"{self._unknown_loops} loops end on data: their bodies count once; "
                "multiply by the steps they take"
            )

    def events(self, where: Computation) -> tuple[Event, ...]:
        found: list[Event] = []
        for op in where.instructions:
            found += self._event(where, op)
        return tuple(found)

    def _event(self, where: Computation, op: Instruction) -> list[Event]:
        code = op.opcode
        if code == "while":
            trips = loops.trip_count(self._module, where, op)
            self._unknown_loops += trips is None
            body = self.events(self._module.computations[op.called("body")])
            return [Loop(1 if trips is None else trips, trips is not None, body)]
        if code == "conditional":
            return self._longest_branch(op)
        if code == "call":
            return list(self.events(self._module.computations[op.called("to_apply")]))
        base = code.removesuffix("-start").removesuffix("-done")
        if base in KINDS:
            if code.endswith("-done"):
                return [Wait(self._started(where, op))]
            return [self._collective(where, op, base, code.endswith("-start"))]
        if code in ("send", "recv", "send-done", "recv-done"):
            source = where[op.operands[0]] if code.endswith("-done") else op
            between = groups.between_slices(source, self._devices)
            if between is not None:
                return self._between_slices(where, op, source, *between)
        if code == "async-start":
            inner = self._module.computations[op.called()]
            if self._has_collective(inner):
                return self._wrapped(op, inner, asynchronous=True)
        if code == "async-done":
            return [Wait(self._started(where, op))]
        if code == "fusion":
            inner = self._module.computations[op.called()]
            if self._has_collective(inner):
                return self._fused(where, op, inner)
        if flops.unknown_kernel(op):
            self._kernels[op.name.split(".")[0]] += 1
        done = flops.flops_of(self._module, where, op)
        moved = traffic.hbm_bytes(self._module, where, op)
        return [Work(op.name, done, moved)] if done or moved else []

    # ---------------------------------------------------------------- collectives

    def _collective(
        self, where: Computation, op: Instruction, kind: str, asynchronous: bool
    ) -> Collective:
        members = groups.groups_of(op, self._devices)
        return self._moved(where, op, op.operands, kind, members, asynchronous)

    def _moved(
        self, where: Computation, op: Instruction, names: Sequence[str], kind: str,
        members: groups.Groups, asynchronous: bool,
    ) -> Collective:  # fmt: skip
        permutation = kind == "collective-permute"
        size = members.shape[1]
        operands = [s for name in names for s in leaves(where[name].result)]
        taken = sum(s.bytes for s in operands)
        payload = taken * size if kind == "all-gather" else taken
        share = (size - 1) / size
        sent = {
            "all-reduce": 2 * share * payload,
            "collective-permute": payload,
            "collective-broadcast": payload,
        }.get(kind, share * payload)
        left = {"all-gather": payload, "reduce-scatter": taken // size}.get(kind, taken)
        in_hbm = any(s.space == HBM for s in leaves(op.result))
        return Collective(
            name=op.name,
            kind=kind,
            axes=groups.axes_of(members, self._mesh, permutation),
            payload=payload,
            sent=sent,
            members=size,
            groups=members,
            asynchronous=asynchronous,
            hbm_bytes=sum(s.bytes for s in operands if s.space == HBM) + left * in_hbm,
        )

    def _between_slices(
        self, where: Computation, op: Instruction, source: Instruction, kind: str, name: str,
        members: groups.Groups,
    ) -> list[Event]:  # fmt: skip
        """libtpu writes what crosses slices as a send to the host and a receive from it."""
        if op.opcode == "recv-done":
            return [Wait((name,))]
        if op.opcode != "send":
            return []  # counted with the send
        found = self._moved(where, source, source.operands[:1], kind, members, asynchronous=True)
        return [dataclasses.replace(found, name=name)]

    def _has_collective(self, computation: Computation) -> bool:
        known = self._communicates.get(computation.name)
        if known is None:
            known = any(
                op.opcode.removesuffix("-start") in KINDS
                or (
                    op.opcode in ("fusion", "async-start")
                    and self._has_collective(self._module.computations[op.called()])
                )
                for op in computation.instructions
            )
            self._communicates[computation.name] = known
        return known

    def _wrapped(self, op: Instruction, inner: Computation, asynchronous: bool) -> list[Event]:
        """async-start around a collective, or around a fusion with one inside."""
        found = [e for i in inner.instructions for e in self._event(inner, i)]
        return [
            dataclasses.replace(e, name=op.name, asynchronous=asynchronous)
            if isinstance(e, Collective)
            else e
            for e in found
        ]

    def _fused(self, where: Computation, op: Instruction, inner: Computation) -> list[Event]:
        """A fusion that communicates.

        libtpu writes a reduce-scatter as an all-reduce and a slice of it. It spreads an
        asynchronous collective over fusions that all repeat it under one channel: one with
        AsyncCollectiveStart, products that push it on, one with AsyncCollectiveDone.
        """
        target = {i.attribute("custom_call_target") for i in inner.instructions}
        within = [i for i in inner.instructions if i.opcode in KINDS]
        if '"AsyncCollectiveStart"' in target:
            found = self._collective(inner, within[0], within[0].opcode, True)
            self._open.add(_channel(within[0]))
            return [dataclasses.replace(found, name=_channel(within[0]))]
        if '"AsyncCollectiveDone"' in target:
            self._open.discard(_channel(within[0]))
            return [Wait((_channel(within[0]),))]
        work = Work(
            op.name,
            flops.flops_of(self._module, where, op),
            traffic.hbm_bytes(self._module, where, op),
        )
        if within and all(_channel(i) in self._open for i in within):
            return [work]
        if [i.opcode for i in within] == ["all-reduce"] and _cuts(inner):
            found = self._collective(inner, within[0], "reduce-scatter", False)
            return [dataclasses.replace(found, name=op.name)]
        found_inside = [e for i in inner.instructions for e in self._event(inner, i)]
        return [*(e for e in found_inside if not isinstance(e, Work)), work]

    def _started(self, where: Computation, op: Instruction) -> tuple[str, ...]:
        """Names of the starts that an end belongs to, through updates and tuples."""
        names, seen = list(op.operands), []
        while names:
            source = where[names.pop()]
            if source.opcode.endswith("-start"):
                seen.append(source.name)
            elif source.opcode in ("async-update", "get-tuple-element", "tuple", "bitcast"):
                names += source.operands
        return tuple(seen)

    def _longest_branch(self, op: Instruction) -> list[Event]:
        text = op.attribute("branch_computations")
        names = re.findall(r"%?([\w.\-]+)", text or "")
        names = names or [op.called("true_computation"), op.called("false_computation")]
        branches = [self.events(self._module.computations[n]) for n in names]
        return list(max(branches, key=_flops))


def _flops(events: Iterable[Event]) -> float:
    return Program(tuple(events), ()).flops


def _channel(op: Instruction) -> str:
    return f"channel {op.attribute('channel_id')}"


def _cuts(computation: Computation) -> bool:
    """Whether the results are slices of something: each device keeps its part."""
    root = computation.root
    results = root.operands if root.opcode == "tuple" else (root.name,)
    return all(_source(computation, name).opcode == "dynamic-slice" for name in results)


def _source(computation: Computation, name: str) -> Instruction:
    op = computation[name]
    while op.opcode in ("bitcast", "reshape", "convert", "copy"):
        op = computation[op.operands[0]]
    return op
