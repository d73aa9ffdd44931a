"""Arms of an alignment ablation side by side: means over seeds with 95% confidence intervals."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from internlm2_jax.report import curves, svg
from internlm2_jax.report.blocks import Block, Grid, Headline, Section, Table, num, percent
from internlm2_jax.report.curves import Line, over_seeds
from internlm2_jax.report.intervals import interval_chart
from internlm2_jax.report.load import DONE, Run, series
from internlm2_jax.report.rounds import load as load_rounds

STAGE = "judge_policy"
CONFIDENCE = 0.95
# Key in result.json, name, whether it is a share.
MEASURES = (
    ("gold/good", "Good answers, all held-out prompts", True),
    ("gold/win_rate", "Wins against SFT (ties half)", True),
    ("gold/task_accuracy", "Tasks answered rightly", True),
    ("gold/refusals", "Risky requests declined", True),
    ("gold/over_refusals", "Tasks declined", True),
    ("hacking/any", "Answers that show a pattern of hacking", True),
    ("finished", "Answers that end by themselves", True),
    ("length", "Words of an answer", False),
)
CURVES = (("reward", "Reward", "score"), ("kl", "KL to SFT", "nats per response"))


@dataclass(frozen=True)
class Interval:
    """Mean of a measure over seeds, and its confidence interval (Student's t)."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """One value alone has no interval: low and high are the mean."""
        mean, count = float(np.mean(values)), len(values)
        if count < 2:
            return cls(mean, mean, mean, count)
        spread = float(np.std(values, ddof=1)) / np.sqrt(count)
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * spread
        return cls(mean, mean - half, mean + half, count)

    def text(self, share: bool) -> str:
        write = percent if share else num
        if self.count < 2:
            return write(self.mean)
        return f"{write(self.mean)} [{write(self.low)}, {write(self.high)}]"


def arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Finished runs by their arm, in the order given."""
    found: dict[str, list[Run]] = collections.defaultdict(list)
    for run in runs:
        if arm := arm_of(run):
            found[arm].append(run)
    return dict(found)


def arm_of(run: Run) -> str:
    """Which arm a run is; "" when it is none, or not judged yet."""
    return run.result(STAGE).text("arm")


def headlines(runs: Sequence[Run]) -> list[Headline]:
    """Good answers of each arm."""
    key, name, share = MEASURES[0]
    return [
        Headline(
            arm,
            interval.text(share),
            f"{name.lower()}; {interval.count} seeds.",
            f"*/{STAGE}/result.json",
            "alignment",
        )
        for arm, interval in intervals(arms(runs), key).items()
    ]


def measured(run: Run, key: str) -> float | None:
    group, _, name = key.rpartition("/")
    result = run.result(STAGE)
    return (result.record(group) if group else result).number(name)


def intervals(found: dict[str, list[Run]], key: str) -> dict[str, Interval]:
    values = {arm: [measured(run, key) for run in runs] for arm, runs in found.items()}
    return {
        arm: Interval.of(known)
        for arm, numbers in values.items()
        if (known := [v for v in numbers if v is not None])
    }


def alignment(runs: Sequence[Run]) -> Section:
    """Table, intervals and curves of the arms; empty when the runs have none."""
    found = arms(runs)
    blocks: list[Block] = []
    if found:
        rows = {key: intervals(found, key) for key, _, _ in MEASURES}
        blocks.append(
            Table(
                title="The arms, where the truth is known",
                head=["Measure", *found],
                rows=[
                    [
                        name,
                        *(rows[key][arm].text(share) if arm in rows[key] else "" for arm in found),
                    ]
                    for key, name, share in MEASURES
                ],
                source=f"*/{STAGE}/result.json",
                numeric=frozenset(range(1, len(found) + 1)),
                note=f"Means over seeds, in brackets their {CONFIDENCE:.0%} confidence interval "
                "(Student's t). "
                + ", ".join(f"{arm}: {len(members)} seeds" for arm, members in found.items()),
            )
        )
        charts: list[Block] = [
            _chart(name, rows[key], share) for key, name, share in MEASURES if rows[key]
        ]
        charts += [chart for curve in CURVES if (chart := _curve(found, *curve))]
        blocks.append(Grid(charts))
    return Section("alignment", "Alignment", DONE, "", blocks)


def _chart(name: str, found: dict[str, Interval], share: bool) -> Block:
    best = ", ".join(f"{arm} {interval.text(share)}" for arm, interval in found.items())
    return svg.picture(
        title=name,
        alt=f"{name}, mean and confidence interval of each arm: {best}.",
        source=f"*/{STAGE}/result.json",
        draw=interval_chart(
            [
                (arm, i.mean, i.low, i.high, (percent if share else num)(i.mean))
                for arm, i in found.items()
            ],
            "share" if share else "words",
            shares=share,
        ),
        height=70 + 34 * len(found),
    )


def _curve(found: dict[str, list[Run]], key: str, name: str, unit: str) -> Block | None:
    """Over all iterations of PPO, the rounds one after another."""
    lines: list[Line] = []
    for number, (arm, runs) in enumerate(found.items()):
        logged = [series(load_rounds(_rounds(run)).rows, key) for run in runs]
        if logged := [s for s in logged if s]:
            lines.append(over_seeds(logged, arm, number % len(svg.COLOURS)))
    if not lines:
        return None
    ends = ", ".join(f"{line.label} {num(float(line.series.y[-1]))}" for line in lines)
    return svg.picture(
        title=f"{name} at the end: {ends}",
        alt=f"Line chart of {name.lower()} over PPO iterations: {ends}.",
        source="*/ppo*/metrics.jsonl",
        draw=curves.line_chart(lines, "iteration", unit),
        height=240,
        note="Lines are means over seeds, bands reach from lowest to highest. Rewards of different "
        "arms are of different reward models.",
    )


def _rounds(run: Run) -> Run:
    """Where the rounds of PPO lie: in the run, or in its stage of rounds."""
    inner = (run.folder / stage for stage in run.stages())
    return next((Run(p) for p in inner if (p / "pipeline.json").is_file()), run)
