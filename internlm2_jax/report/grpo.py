"""Section on reinforcement learning from verified rewards: curves, where the time goes, answers."""

from __future__ import annotations

from internlm2_jax.report import curves, plots, svg
from internlm2_jax.report.blocks import (
    Block,
    Cell,
    Fold,
    Grid,
    Headline,
    Section,
    Table,
    clip,
    num,
    percent,
)
from internlm2_jax.report.curves import Level, Line
from internlm2_jax.report.load import ABSENT, DONE, UNFINISHED, Record, Run, series

STAGE = "grpo"
PHASES = ("rollout", "scoring", "update")
MOST_SAMPLES, LETTERS = 24, 300

# Key, name, unit, fixed bottom of the axis: the curves in the order they are read.
CURVES = (
    ("pass_rate", "Pass rate", "share of responses", 0.0),
    ("zero_variance", "Groups that fare alike", "share of groups", 0.0),
    ("all_right", "Groups all right", "share of groups", 0.0),
    ("all_wrong", "Groups all wrong", "share of groups", 0.0),
    ("reward", "Reward", "mean of a response", None),
    ("response_length", "Response length", "tokens", 0.0),
    ("truncated", "Truncated responses", "share without an end", 0.0),
    ("kl", "KL to the reference", "nats per response", 0.0),
    ("entropy", "Entropy", "nats per token, from samples", 0.0),
    ("ratio_at_start", "Ratio before updates", "trainer over sampler", None),
    ("ratio_max", "Largest ratio", "policy over sampler", None),
    ("clip_share", "Clipped ratios", "share of tokens", 0.0),
    ("grad_norm", "Gradient norm", "before clipping", 0.0),
    ("timeouts", "Time-outs", "share of responses", 0.0),
    ("infrastructure_errors", "Infrastructure errors", "share of responses", 0.0),
)


def grpo(run: Run) -> Section:
    """One part for each stage whose name begins with "grpo"."""
    names = [stage for stage in run.stages() if stage.startswith(STAGE)]
    states = {run.status(stage) for stage in names}
    title = "Verified rewards (GRPO)"
    if states <= {ABSENT}:
        return Section(STAGE, title, ABSENT)
    blocks: list[Block] = []
    for name in names:
        rows = run.metrics(name)
        charts = [chart for curve in CURVES if (chart := _curve(name, rows, *curve))]
        if time := _time(run, name):
            charts.append(time)
        if charts:
            blocks.append(Grid(charts))
        if samples := _samples(run, name):
            blocks.append(Fold("Best and worst answers of a group", [samples]))
    lead = (
        "Shares are of all responses that were drawn, those of groups that were drawn again "
        "included; what the machine could not check is in no pass rate. Titles compare the first "
        "and last tenth."
    )
    return Section(STAGE, title, DONE if states == {DONE} else UNFINISHED, lead, blocks)


def _curve(
    stage: str, rows: list[Record], key: str, name: str, unit: str, bottom: float | None
) -> Block | None:
    values = series(rows, key, split="train")
    if not values:
        return None
    lines = curves.with_mean(values)
    if checked := series(rows, key, split="validation"):
        lines[-1] = Line(lines[-1].series, "training")
        lines.append(Line(checked, "held out, greedy", colour=1))
    return curves.change(
        name,
        unit,
        values,
        lines,
        over="iterations",
        source=f"{stage}/metrics.jsonl",
        bottom=bottom,
        levels=[Level(1.0, "agree")] if key == "ratio_at_start" else [],
    )


def _time(run: Run, stage: str) -> Block | None:
    """Where the seconds of an iteration go, the compiling ones left out."""
    rows = run.rows(f"{stage}/timing.jsonl")
    settled = rows[len(rows) // 10 + 1 :] or rows
    spent = {
        phase: sum(seconds for row in settled if (seconds := row.number(phase)) is not None)
        for phase in PHASES
    }
    total = sum(spent.values())
    if not total:
        return None
    bars = [
        (phase, seconds / len(settled), percent(seconds / total))
        for phase, seconds in spent.items()
    ]
    slowest = max(spent, key=spent.__getitem__)
    return svg.picture(
        title=f"{slowest.capitalize()} takes {percent(spent[slowest] / total)} of an iteration",
        alt="Bar chart of seconds per iteration: " + ", ".join(f"{n} {t}" for n, _, t in bars),
        source=f"{stage}/timing.jsonl",
        draw=plots.bar_chart(bars, "seconds per iteration", colour=5),
        height=50 + 26 * len(bars),
    )


def _samples(run: Run, stage: str) -> Table | None:
    rows: list[list[str | Cell]] = [
        [
            Cell(clip(sample.text("prompt"), LETTERS)),
            num(sample.number("step")),
            Cell(clip(sample.text("response"), LETTERS) or "(empty)"),
            sample.text("outcome"),
            num(sample.number("score")),
            percent(sample.number("solved")),
        ]
        for sample in run.rows(f"{stage}/samples.jsonl")[-MOST_SAMPLES:]
    ]
    if not rows:
        return None
    return Table(
        title="Answers",
        head=["Prompt", "Iteration", "Response", "Verdict", "Score", "Group solved"],
        rows=rows,
        source=f"{stage}/samples.jsonl",
        numeric=frozenset({1, 4, 5}),
        stacked=True,
    )


def headlines(run: Run) -> list[Headline]:
    found = []
    for stage in run.stages():
        result = run.result(stage) if stage.startswith(STAGE) else None
        if not result:
            continue
        number = f"{percent(result.number('pass_rate_first'))} → "
        number += percent(result.number("pass_rate_last"))
        reading = f"pass rate of sampled answers over {num(result.number('iterations'))} iterations"
        held_out = result.number("held_out_pass_rate")
        if held_out is not None:
            reading += f"; {percent(held_out)} of held-out problems, greedy"
        found.append(Headline("GRPO", number, f"{reading}.", f"{stage}/result.json", STAGE))
    return found
