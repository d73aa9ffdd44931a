"""The rounds of online RLHF, each a stage of its own, joined to one line of iterations.

Stages whose name begins with "ppo" are rounds, in the pipeline's order; a stage with "patch" in its
name stands between two of them and patches the reward model against the patterns it found.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from internlm2_jax.report.curves import Mark, Span
from internlm2_jax.report.load import ABSENT, DONE, UNFINISHED, Record, Run

ROUND, PATCH = "ppo", "patch"


@dataclass(frozen=True)
class Round:
    """One PPO stage, and the patch that followed it (empty when there was none)."""

    stage: str
    result: Record
    patch: Record
    first_step: float

    @property
    def name(self) -> str:
        return self.result.text("round") or self.stage

    @property
    def findings(self) -> list[Record]:
        """Every pattern searched for, the strongest first."""
        return self.patch.records("patterns") or self.patch.records("hacking")

    @property
    def num_pairs(self) -> float:
        return self.patch.record("hacking").number("num_pairs") or 0.0


@dataclass(frozen=True)
class Rounds:
    """All rounds of a run. Steps in `rows` and `samples` run on from round to round."""

    status: str
    rounds: list[Round] = field(default_factory=list)
    rows: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)

    def sources(self, name: str) -> str:
        """The files of that name, as the page prints them."""
        return ", ".join(f"{found.stage}/{name}" for found in self.rounds)

    @property
    def spans(self) -> list[Span]:
        """Stretches of one round, warm-up or not; each reaches to where the next begins."""
        steps = sorted(
            (step, row.text("round"), bool(row.value.get("warmup")))
            for row in self.rows
            if (step := row.number("step")) is not None
        )
        stretches = [
            ([step for step, _, _ in group], number, warmup)
            for (number, warmup), group in itertools.groupby(steps, key=lambda item: item[1:])
        ]
        stops = [inside[0] for inside, _, _ in stretches[1:]]
        stops += [inside[-1] for inside, _, _ in stretches[-1:]]
        return [
            Span(inside[0], stop, "warm-up", "", shaded=True)
            if warmup
            else Span(inside[0], stop, f"round {number}", number)
            for (inside, number, warmup), stop in zip(stretches, stops, strict=True)
        ]

    @property
    def marks(self) -> list[Mark]:
        """Where a patched reward model took over."""
        return [
            Mark(after.first_step, "patched")
            for before, after in itertools.pairwise(self.rounds)
            if before.num_pairs
        ]


def load(run: Run) -> Rounds:
    """Reads the rounds of a run, finished or not."""
    stages = run.stages()
    names = [stage for stage in stages if stage.startswith(ROUND)]
    states = {run.status(stage) for stage in names}
    if states <= {ABSENT}:
        return Rounds(ABSENT)
    rounds, rows, samples, offset = [], [], [], 0.0
    for number, stage in enumerate(names, start=1):
        if run.status(stage) == ABSENT:
            continue
        found = _run_on(run.metrics(stage), offset, number)
        samples += _run_on(run.rows(f"{stage}/samples.jsonl"), offset, number)
        patch = run.result(_patch_after(stages, stage))
        rounds.append(Round(stage, run.result(stage), patch, first_step=offset + 1))
        rows += found
        offset = max((row.number("step") or 0.0 for row in found), default=offset)
    return Rounds(DONE if states == {DONE} else UNFINISHED, rounds, rows, samples)


def _patch_after(stages: Sequence[str], stage: str) -> str:
    """The patching stage between this round and the next; "" when there is none."""
    for name in stages[list(stages).index(stage) + 1 :]:
        if name.startswith(ROUND):
            return ""
        if PATCH in name:
            return name
    return ""


def _run_on(rows: Sequence[Record], offset: float, number: int) -> list[Record]:
    """Rows with their steps counted from the first round's, and with a round."""
    return [
        Record(
            {"round": number, **row.value, "step": (row.number("step") or 0.0) + offset},
            row.source,
            row.where,
        )
        for row in rows
    ]
