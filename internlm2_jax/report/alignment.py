"""Arms of an alignment ablation side by side: means over seeds with 95% confidence intervals."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from internlm2_jax.evals.intervals import Interval
from internlm2_jax.report import curves, svg
from internlm2_jax.report.arms import by_arm, intervals, means_chart, seeds, written
from internlm2_jax.report.blocks import Block, Grid, Headline, Section, Table, num
from internlm2_jax.report.curves import Line, over_seeds
from internlm2_jax.report.load import DONE, Run, series
from internlm2_jax.report.rounds import load as load_rounds

STAGE = "judge_policy"
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


def headlines(runs: Sequence[Run]) -> list[Headline]:
    """Good answers of each arm."""
    key, name, share = MEASURES[0]
    return [
        Headline(
            arm,
            written(interval, share),
            f"{name.lower()}; {interval.count} seeds.",
            f"*/{STAGE}/result.json",
            "alignment",
        )
        for arm, interval in _intervals(by_arm(runs, STAGE), key, share).items()
    ]


def measured(run: Run, key: str) -> float | None:
    group, _, name = key.rpartition("/")
    result = run.result(STAGE)
    return (result.record(group) if group else result).number(name)


def _intervals(found: dict[str, list[Run]], key: str, share: bool) -> dict[str, Interval]:
    return intervals(found, functools.partial(measured, key=key), share)


def alignment(runs: Sequence[Run]) -> Section:
    """Table, intervals and curves of the arms; empty when the runs have none."""
    found = by_arm(runs, STAGE)
    blocks: list[Block] = []
    if found:
        rows = {key: _intervals(found, key, share) for key, _, share in MEASURES}
        blocks.append(
            Table(
                title="The arms, where the truth is known",
                head=["Measure", *found],
                rows=[
                    [
                        name,
                        *(
                            written(rows[key][arm], share) if arm in rows[key] else ""
                            for arm in found
                        ),
                    ]
                    for key, name, share in MEASURES
                ],
                source=f"*/{STAGE}/result.json",
                numeric=frozenset(range(1, len(found) + 1)),
                note=seeds(found),
            )
        )
        charts: list[Block] = [
            means_chart(
                name, rows[key], share, axis="share" if share else "words",
                source=f"*/{STAGE}/result.json", zero="edge",
            )
            for key, name, share in MEASURES
            if rows[key]
        ]  # fmt: skip
        charts += [chart for curve in CURVES if (chart := _curve(found, *curve))]
        blocks.append(Grid(charts))
    return Section("alignment", "Alignment", DONE, "", blocks)


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
