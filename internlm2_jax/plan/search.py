"""Layouts, remat policies and batch parts for a step, tried on a pod.

Candidates that the analytic estimate (analytic.py) puts far beyond the memory are not compiled; the
rest are compiled in the order of an analytic time, so that the likely ones come first.
What was compiled is kept, so a search that was cut short goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from internlm2_jax.chips import Topology
from internlm2_jax.errors import UserError
from internlm2_jax.models.remat import Remat
from internlm2_jax.plan import analytic
from internlm2_jax.plan.report import Plan
from internlm2_jax.plan.steps import Choice, PlannedStep
from internlm2_jax.sharding import Layout

REMAT: tuple[Remat, ...] = ("minimal", "save_qkv", "full")
# The analytic estimate is rough: what it puts this far over the memory is not compiled.
SLACK = 1.3


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a step, with the estimates it was chosen by (bytes, seconds)."""

    layout: Layout
    remat: str
    accumulate: int
    bytes: float
    seconds: float

    @property
    def choice(self) -> Choice:
        return Choice(_text(self.layout), self.remat, None, self.accumulate)


def layouts(step: PlannedStep, topology: Topology) -> Iterator[Layout]:
    """Layouts of all devices that divide the model."""
    cfg, count = step.cfg, topology.num_devices
    tensors = [t for t in (1, 2, 4, 8) if cfg.num_kv_heads % t == 0 and cfg.mlp_dim % t == 0]
    contexts = (1, 2, 4, 8) if step.length >= 8192 else (1,)
    copies = [topology.slices * d for d in (1, 2, 4)]
    for data, context, tensor in itertools.product(copies, contexts, tensors):
        fsdp, rest = divmod(count, data * context * tensor)
        if rest or not fsdp or cfg.embed_dim % (fsdp * context) or step.length % (context * tensor):
            continue
        yield Layout(data, fsdp, context, tensor)


def candidates(step: PlannedStep, topology: Topology) -> list[Candidate]:
    """All that may fit, the fastest by the analytic estimate first.

    The batch of a step stays what it is; what varies is in how many parts it is taken.
    """
    if not step.trains:
        raise UserError(f"{step.name} is no training step; --search tries training steps")
    found = []
    limit = topology.chip.hbm_bytes
    for layout in layouts(step, topology):
        for remat, parts in itertools.product(REMAT, _parts(step, layout)):
            rows = step.rows // parts
            held = analytic.train_state(step.cfg, layout).total
            size = held + analytic.activations(step.cfg, layout, remat, rows, step.length)
            if size < SLACK * limit:
                found.append(
                    Candidate(
                        layout, remat, parts, size, _seconds(step, layout, remat, parts, topology)
                    )
                )
    if not found:
        raise UserError(
            f"{step.name} fits {topology} in no layout: parameters and optimizer alone take "
            f"{12 * step.cfg.num_params() / 1e9:,.0f} GB; take a larger pod"
        )
    return sorted(found, key=lambda c: (c.seconds, c.bytes))


def _parts(step: PlannedStep, layout: Layout) -> list[int]:
    """Divisors of the rows that leave each device whole rows; no fewer than one row at a time."""
    ways = layout.batch_ways
    if step.rows % ways:
        return []
    each = step.rows // ways
    if "accumulate" not in step.overrides:
        return [1]
    return [n for n in range(1, each + 1) if each % n == 0]


def _seconds(
    step: PlannedStep, layout: Layout, remat: str, parts: int, topology: Topology
) -> float:
    """Products at peak, weights over two links of a ring a part, activations over `tensor`."""
    chip, cfg = topology.chip, step.cfg
    tokens = step.tokens / topology.num_devices
    again = analytic.rematerialised_flops(cfg, step.length, remat)
    compute = tokens * (cfg.train_flops(step.length) + again) / chip.flops
    links = 2 * max(chip.torus, 1) * chip.link
    # Every part gathers the weights anew and reduces gradients of its own.
    weights = analytic.gathered_weights(cfg, layout) + analytic.scattered_gradients(cfg, layout)
    passed = 0.0
    if layout.tensor > 1:
        # Four gathers or scatters of the tokens of a block, forward, backward and again.
        shards = tokens * layout.tensor
        passed = 12 * analytic.width(cfg) * cfg.num_layers * shards * cfg.embed_dim
    return compute + parts * weights / links + passed / (2 * chip.link)


def rank(plans: list[Plan]) -> list[Plan]:
    """Those that fit, the most tokens per second first."""
    return sorted((p for p in plans if p.fits), key=lambda p: -p.tokens_per_second)


def table(plans: list[Plan]) -> str:
    """The ranking, and what did not fit after it."""
    lines = [f"{'layout':28}{'remat':10}{'parts':>6}{'peak GiB':>10}{'MFU':>8}{'tokens/s':>14}"]
    for p in [*rank(plans), *(p for p in plans if not p.fits)]:
        shown = f"{p.step.layout!s:28}{p.step.remat:10}{p.step.accumulate:6}{p.peak / 2**30:10.2f}"
        speed = f"{p.mfu:8.1%}{p.tokens_per_second:14,.0f}" if p.fits else "   does not fit"
        lines.append(shown + speed)
    return "\n".join(lines) + "\n"


def write_overrides(plan: Plan, path: Path) -> None:
    """The settings of `plan` as lines for `internlm2 run --overrides PATH`."""
    from internlm2_jax import files

    step = plan.step
    values = {"layout": _text(step.layout), "remat": step.remat, "accumulate": step.accumulate}
    lines = [f"# {step.name} on {plan.topology}: {plan.tokens_per_second:,.0f} tokens/s estimated"]
    lines += [f"{step.overrides[k]}={v}" for k, v in values.items() if k in step.overrides]
    files.atomic_write(path, "\n".join(lines) + "\n")


def _text(layout: Layout) -> str:
    """As `Layout.parse` reads it."""
    return str(layout) if layout.num_devices > 1 else "fsdp=1"
