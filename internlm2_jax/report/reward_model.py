"""Section on the conditional reward model."""

from __future__ import annotations

import numpy as np

from internlm2_jax.report import curves, plots, svg
from internlm2_jax.report.blocks import Block, Grid, Headline, Section, num, percent, pretty
from internlm2_jax.report.curves import Line
from internlm2_jax.report.load import Record, Run, series
from internlm2_jax.report.rounds import PATCH

REWARD = "reward_model"


def reward_model(run: Run) -> Section:
    """How well held-out pairs are ranked, and whether the system prompt decides conflicts."""
    name = _first(run)
    rows, result = run.metrics(name), run.result(name)
    blocks: list[Block] = []
    trained = [(name, result), *_patched(run, name)]
    accuracy = {stage: record.numbers("accuracy") for stage, record in trained}
    if accuracy[name]:
        dots = [
            (pretty(name), [(pretty(stage), shares[name]) for stage, shares in accuracy.items()
                            if name in shares])
            for name in accuracy[_first(run)]
        ]  # fmt: skip
        blocks.append(
            svg.picture(
                title="Held-out pairs ranked as their label says",
                alt="Dot chart of accuracy per domain: "
                + ", ".join(f"{d} {percent(share)}" for d, share in accuracy[name].items()),
                source=", ".join(record.source for _, record in trained),
                draw=plots.dot_chart(dots, "share of pairs", chance=0.5),
                height=74 + 28 * len(dots),
            )
        )
    flip = _flip(result)
    if flip:
        blocks.append(flip)
    blocks += _calibration(result)
    blocks += _histograms(result)
    blocks += _reward_curves(rows)
    flipped, pairs = result.record("flip").number("flipped_share"), result.record("flip")
    lead = ""
    if flipped is not None:
        lead = (
            f"In {percent(flipped)} of {num(pairs.number('pairs'))} pairs where being helpful and "
            "being harmless pull apart, changing the system prompt changes the winner."
        )
    return Section(REWARD, "Reward model", run.status(name), lead,
                   [Grid(blocks)] if blocks else [])  # fmt: skip


def _first(run: Run) -> str:
    """The stage of the first reward model: of a run, or of the first round."""
    return next((stage for stage in run.stages() if stage.startswith(REWARD)), REWARD)


def _patched(run: Run, first: str) -> list[tuple[str, Record]]:
    """Reward models that were trained further against hacking, in order."""
    stages = [s for s in run.stages() if (PATCH in s or s.startswith(REWARD)) and s != first]
    found = [(stage, run.result(stage)) for stage in stages]
    return [(stage, result) for stage, result in found if result.numbers("accuracy")]


def _flip(result: Record) -> Block | None:
    flip = result.record("flip")
    unconditional = result.number("unconditional_conflict_accuracy")
    if unconditional is None:
        unconditional = flip.number("unconditional_conflict_accuracy")
    named = (
        *((f"asked for {pretty(name.removeprefix('accuracy_')).lower()}", flip.number(name))
          for name in flip.value if name.startswith("accuracy_")),
        ("no system prompt", unconditional),
    )  # fmt: skip
    dots = [(name, [("accuracy", share)]) for name, share in named if share is not None]
    if not dots:
        return None
    return svg.picture(
        title=f"The system prompt flips {percent(flip.number('flipped_share'))} "
        "of the conflicting pairs",
        alt="Dot chart of accuracy on conflicting pairs: "
        + ", ".join(f"{name} {percent(share)}" for name, share in named if share is not None),
        source=f"{REWARD}*/result.json",
        draw=plots.dot_chart(dots, "share of conflicting pairs ranked right", chance=0.5),
        height=58 + 28 * len(dots),
    )


def _calibration(result: Record) -> list[Block]:
    """How often the model is right where it is so and so sure."""
    found = result.record("calibration")
    bins = [(b.number("confidence"), b.number("accuracy"), b.number("pairs"))
            for b in found.records("bins")]  # fmt: skip
    if not bins:
        return []
    dots = [
        (f"{num(pairs)} pairs", [("confidence", sure), ("right", right)])
        for sure, right, pairs in bins
        if sure is not None and right is not None
    ]
    error = percent(found.number("error"))
    return [
        svg.picture(
            title=f"Confidence is off by {error} on average",
            alt="Dot chart of the confidence of the reward model and the share of pairs it ranks "
            "right: " + ", ".join(f"{percent(s)} sure, {percent(r)} right" for s, r, _ in bins),
            source=f"{REWARD}*/result.json",
            draw=plots.dot_chart(dots, "confidence, and share of pairs ranked right"),
            height=74 + 28 * len(dots),
            note="Confidence is the sigmoid of the margin; pairs are grouped by it.",
        )
    ]


def _histograms(result: Record) -> list[Block]:
    blocks: list[Block] = []
    for domain, scores in result.record("scores").items():
        groups = [(name, scores.array(name)) for name in ("chosen", "rejected")]
        groups = [(name, values[np.isfinite(values)]) for name, values in groups]
        if not all(len(values) for _, values in groups):
            continue
        gap = float(groups[0][1].mean() - groups[1][1].mean())
        blocks.append(
            svg.picture(
                title=f"{pretty(domain)}: chosen answers score {num(abs(gap), 2)} "
                f"{'higher' if gap >= 0 else 'lower'} on average",
                alt=f"Histograms of scores of chosen and rejected answers in {domain}; means "
                + " and ".join(num(float(values.mean())) for _, values in groups),
                source=f"{REWARD}*/result.json",
                draw=plots.histogram(groups, "score"),
                height=230,
            )
        )
    return blocks


def _reward_curves(rows: list[Record]) -> list[Block]:
    blocks: list[Block] = []
    for key, name in (
        ("ranking", "Ranking loss"), ("penalty", "Penalty on large scores"),
        ("accuracy", "Accuracy"),
    ):  # fmt: skip
        lines = _split_lines(rows, key)
        if lines:
            last = ", ".join(
                f"{line.label} {num(line.series.y[-1])}" for line in lines if line.label
            )
            blocks.append(
                svg.picture(
                    title=f"{name} ends at {last}",
                    alt=f"Line chart of the reward model's {name.lower()} over steps; {last}.",
                    source=f"{REWARD}*/metrics.jsonl",
                    draw=curves.line_chart(lines, "step", name.lower()),
                    height=230,
                )
            )
    return blocks


def _split_lines(rows: list[Record], key: str) -> list[Line]:
    lines = []
    for colour, split in enumerate(("train", "validation")):
        values = series(rows, key, split=split)
        if len(values.y) > 80:
            lines += [Line(values, colour=colour, faint=True)]
            values = values.smooth(len(values.y) // 25)
        if values:
            lines.append(Line(values, split, colour))
    return lines


def headlines(run: Run) -> list[Headline]:
    rows = []
    result = run.result(_first(run))
    accuracy = result.numbers("accuracy")
    if accuracy:
        overall = accuracy.get("all", sum(accuracy.values()) / len(accuracy))
        flipped = result.record("flip").number("flipped_share")
        reading = "of held-out pairs ranked as their label says, the mean over domains"
        if flipped is not None:
            reading += f"; the system prompt flips {percent(flipped)} of the conflicting ones"
        rows.append(
            Headline("Reward model", percent(overall), f"{reading}.", result.source, REWARD)
        )
    return rows
