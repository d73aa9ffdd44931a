"""A plan: what a step costs on a pod, as numbers (JSON) and as text for people."""

from __future__ import annotations

import dataclasses
from typing import Any

from internlm2_jax.chips import GIB, Topology
from internlm2_jax.plan import analytic, hlo, roofline
from internlm2_jax.plan.compile import Compiled
from internlm2_jax.plan.links import Links
from internlm2_jax.plan.roofline import Roofline
from internlm2_jax.plan.steps import Part, PlannedStep

ORDER = ("none", "minimal", "save_qkv", "offload", "full")  # remat, from most memory to least


@dataclasses.dataclass(frozen=True)
class Speed:
    """A part of a step: its roofline and what follows from it. Totals are over all devices."""

    name: str
    flops: float
    hbm_bytes: float
    times: Roofline
    tokens: int
    repeats: int
    model_flops: float

    @property
    def seconds(self) -> float:
        """Of one repeat."""
        return self.times.seconds


@dataclasses.dataclass(frozen=True)
class Plan:
    """A planned step on a pod. Bytes and operations are per device and call.

    `collectives` and `speeds` are empty when the step does not fit: there is no program then.
    """

    step: PlannedStep
    topology: Topology
    compiled: Compiled
    peak: float
    collectives: tuple[hlo.Total, ...]
    links: dict[tuple[str, str], tuple[float, str]]
    speeds: tuple[Speed, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.compiled.memory is not None and self.peak <= self.topology.chip.hbm_bytes

    @property
    def seconds(self) -> float:
        """Roofline of one call, its parts as often as they are repeated."""
        return sum(s.seconds * s.repeats for s in self.speeds)

    @property
    def tokens_per_second(self) -> float:
        return self.step.tokens / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float:
        """Useful operations over what the chips could do in the time of the estimate."""
        capacity = self.seconds * self.topology.num_devices * self.topology.chip.flops
        return self.step.model_flops / capacity if capacity else 0.0


def make(step: PlannedStep, topology: Topology, compiled: Compiled, devices: list[Any]) -> Plan:
    """Reads the compiled program of `step`; `devices` in the order of its mesh."""
    chip = topology.chip
    if compiled.memory is None or compiled.text is None:
        return Plan(step, topology, compiled, compiled.needed, (), {}, (), ())
    memory = compiled.memory
    # What the loop keeps but this function does not take lies in memory all the same.
    peak = memory.peak + max(0.0, step.held - memory.arguments)
    mesh = dict(zip(("data", "fsdp", "context", "tensor"), step.layout.sizes, strict=True))
    program = hlo.read(compiled.text, mesh)
    links = Links(topology, devices)
    whole = (Part("step", False, step.tokens, 1, step.model_flops),)
    speeds = []
    for part in step.parts or whole:
        share = program.part(part.inside) if step.parts else program
        times = roofline.estimate(share, chip, links.seconds)
        speeds.append(
            Speed(
                part.name,
                share.flops,
                share.hbm_bytes,
                times,
                part.tokens,
                part.repeats,
                part.model_flops,
            )
        )
    times_on_links: dict[tuple[str, str], tuple[float, str]] = {}
    for event, count in program.walk():
        if isinstance(event, hlo.Collective):
            key = (event.kind, event.axes)
            before = times_on_links.get(key, (0.0, ""))[0]
            times_on_links[key] = (before + count * links.seconds(event), links.medium(event))
    warnings = tuple(w for w in program.warnings if not step.parts or "end on data" not in w)
    return Plan(
        step,
        topology,
        compiled,
        peak,
        tuple(program.collectives()),
        times_on_links,
        tuple(speeds),
        warnings,
    )


# -------------------------------------------------------------------------------- text


def text(plan: Plan) -> str:
    """The plan of one step, for a terminal."""
    step, pod = plan.step, plan.topology
    parts = f" in {step.accumulate} parts" if step.accumulate > 1 else ""
    lines = [
        f"{step.name}: {step.rows:,} rows of {step.length:,}{parts}, "
        f"{_count(step.tokens)} tokens a step, remat {step.remat}",
        f"  pod         {pod}, {pod.num_devices} chips, layout {step.layout}",
        f"  memory      {_memory(plan)}",
    ]
    for speed in plan.speeds:
        lines += _speed(plan, speed)
    if plan.speeds:
        lines += _totals(plan)
    if plan.collectives:
        lines += _table(plan)
    lines += [f"  note        {warning}" for warning in plan.warnings]
    lines += [f"  try         {advice}" for advice in suggestions(plan)]
    return "\n".join(lines) + "\n"


def _memory(plan: Plan) -> str:
    limit = plan.topology.chip.hbm_bytes
    if plan.compiled.memory is None:
        over = plan.peak - limit
        return f"{_gib(plan.peak)} of {_gib(limit)} GiB a chip: DOES NOT FIT by {_gib(over)} GiB"
    m = plan.compiled.memory
    beside = max(0.0, plan.step.held - m.arguments)
    terms = [f"arguments {_gib(m.arguments)}", f"temporaries {_gib(m.temporaries)}"]
    terms += (
        [f"new results {_gib(m.results - m.aliased)}"] if m.results - m.aliased > GIB / 100 else []
    )
    terms += [f"code {_gib(m.code)}"] if m.code > GIB / 100 else []
    terms += [f"other models {_gib(beside)}"] if beside > GIB / 100 else []
    verdict = (
        f"fits, {_gib(limit - plan.peak)} GiB free"
        if plan.fits
        else f"DOES NOT FIT by {_gib(plan.peak - limit)} GiB"
    )
    return f"{' + '.join(terms)} = {_gib(plan.peak)} of {_gib(limit)} GiB a chip: {verdict}"


def _speed(plan: Plan, speed: Speed) -> list[str]:
    t = speed.times
    label = "work" if speed.name == "step" else speed.name
    useful = speed.model_flops / plan.topology.num_devices
    exposed = ", ".join(f"{axes} {_seconds(s)}" for axes, s in sorted(t.exposed.items()))
    hidden = {a: s - t.exposed.get(a, 0.0) for a, s in t.links.items()}
    under = ", ".join(f"{a} {_seconds(s)}" for a, s in sorted(hidden.items()) if s > 1e-6)
    share = f" ({useful / speed.flops:.0%} of it the model's)" if speed.flops else ""
    return [
        f"  {label:11} {_scaled(speed.flops, 'FLOP')} a chip{share}, "
        f"{_scaled(speed.hbm_bytes, 'B')} to and from memory",
        f"  {'roofline':11} max(compute {_seconds(t.compute)}, memory {_seconds(t.memory)}) + "
        f"exposed {_seconds(t.exposed_seconds)} = {_seconds(speed.seconds)}, bound by {t.bound}",
        f"  {'':11} collectives exposed: {exposed or 'none'}; hidden: {under or 'none'}",
    ]


def _totals(plan: Plan) -> list[str]:
    step = plan.step
    chips = plan.topology.num_devices
    lines = []
    decode = [s for s in plan.speeds if s.name == "decode"]
    for s in decode:
        lines.append(
            f"  {'decode':11} {s.tokens / s.seconds:,.0f} tokens/s over {s.tokens} rows, "
            f"{s.repeats} steps of {_seconds(s.seconds)}"
        )
    line = (
        f"  {'speed':11} {_seconds(plan.seconds)} a call, {plan.tokens_per_second:,.0f} tokens/s "
        f"({plan.tokens_per_second / chips:,.0f} a chip), {plan.mfu:.1%} model-FLOPs utilisation"
    )
    if step.calls:
        days = plan.seconds * step.calls / 86400
        line += f"; {step.calls:,} calls ({_count(step.calls * step.tokens)} tokens): {_days(days)}"
    return [*lines, line]


def _table(plan: Plan) -> list[str]:
    lines = [
        f"  {'collectives':23}{'axes':14}{'':7}{'count':>8}{'bytes':>12}{'sent':>12}  on its links"
    ]
    for total in plan.collectives:
        seconds, medium = plan.links[(total.kind, total.axes)]
        mode = "async" if total.asynchronous else "sync"
        shown = f"{total.kind:21}{total.axes:14}{mode:7}{total.count:8,}"
        sizes = f"{_scaled(total.payload, 'B'):>12}{_scaled(total.sent, 'B'):>12}"
        same = [t for t in plan.collectives if (t.kind, t.axes) == (total.kind, total.axes)]
        share = total.sent / max(sum(t.sent for t in same), 1e-9)
        lines.append(f"    {shown}{sizes}  {_seconds(seconds * share)} ({medium})")
    return lines


def suggestions(plan: Plan) -> list[str]:
    """What to change when the step does not fit, the cheapest first."""
    if plan.fits:
        return []
    step, pod = plan.step, plan.topology
    layout, limit = step.layout, pod.chip.hbm_bytes
    state = analytic.train_state(step.cfg, layout).total if step.trains else step.held
    found = []
    if max(state, step.held) > 0.9 * limit:
        need = max(state, step.held) * layout.param_ways / (0.6 * limit)
        found.append(
            f"more chips or a larger fsdp: what stays in memory between steps alone is "
            f"{_gib(max(state, step.held))} GiB a chip; cut it over {int(need) + 1} or more"
        )
    if step.trains and step.remat != "full":
        stronger = ORDER[ORDER.index(step.remat) + 1 :]
        found.append(f"--remat {' or '.join(stronger)}: a block keeps less for its gradient")
    at_once = step.rows // step.accumulate
    if at_once > layout.batch_ways:
        key = step.overrides.get("accumulate")
        where = f"--set {key}={step.accumulate * 2}" if key else f"--batch {step.rows // 2}"
        found.append(f"{where}: half as many rows at a time")
    elif step.length >= 8192:
        wider = dataclasses.replace(
            layout, context=layout.context * 2, fsdp=max(1, layout.fsdp // 2)
        )
        found.append(f"--layout {wider}: the tokens of a row cut over more chips")
    elif layout.tensor < 8 and layout.fsdp > 1:
        wider = dataclasses.replace(layout, tensor=layout.tensor * 2, fsdp=layout.fsdp // 2)
        found.append(f"--layout {wider}: heads and MLP cut over more chips")
    return found or [f"a larger pod than {pod}"]


# -------------------------------------------------------------------------------- JSON


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values: what `--json` prints and a search keeps."""
    step, pod = plan.step, plan.topology
    memory = plan.compiled.memory
    return {
        "step": step.name,
        "topology": str(pod),
        "devices": pod.num_devices,
        "layout": str(step.layout),
        "remat": step.remat,
        "rows": step.rows,
        "length": step.length,
        "accumulate": step.accumulate,
        "fits": plan.fits,
        "memory": {
            "peak": plan.peak,
            "available": pod.chip.hbm_bytes,
            "free": pod.chip.hbm_bytes - plan.peak,
            **(dataclasses.asdict(memory) if memory else {}),
        },
        "parts": [
            {
                "name": s.name,
                "flops": s.flops,
                "hbm_bytes": s.hbm_bytes,
                "seconds": s.seconds,
                "repeats": s.repeats,
                "compute_seconds": s.times.compute,
                "memory_seconds": s.times.memory,
                "link_seconds": s.times.links,
                "exposed_seconds": s.times.exposed,
                "bound": s.times.bound,
                "tokens": s.tokens,
            }
            for s in plan.speeds
        ],
        "collectives": [dataclasses.asdict(t) for t in plan.collectives],
        "model_flops": step.model_flops,
        "seconds": plan.seconds,
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
        "days": plan.seconds * step.calls / 86400 if step.calls else None,
        "compile_seconds": plan.compiled.seconds,
        "warnings": list(plan.warnings),
        "suggestions": suggestions(plan),
    }


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _scaled(n: float, unit: str) -> str:
    """3.21 GB, 45.1 TFLOP: a number with the prefix that suits it."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {prefix}{unit}"
    return f"{n:.3g} {unit}"


def _seconds(t: float) -> str:
    if t >= 1 or t == 0:
        return f"{t:.3g} s"
    return f"{t * 1e3:.3g} ms" if t >= 1e-3 else f"{t * 1e6:.3g} us"


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{days * 24:,.2f} hours"


def _count(n: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return str(n)
