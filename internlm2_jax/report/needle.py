"""Needle in a haystack: heat maps of one run, and how several runs decay with length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from internlm2_jax.evals.intervals import CONFIDENCE, student
from internlm2_jax.report import curves, plots, svg
from internlm2_jax.report.arms import by_arm, seeds
from internlm2_jax.report.blocks import (
    DASH,
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
from internlm2_jax.report.load import DONE, Record, Run, Series

STAGE = "needle"
SOURCE = f"{STAGE}/result.json"
_SAMPLES, _LETTERS = 12, 200


def short(count: float) -> str:
    """4096 -> "4k": axis labels of context lengths."""
    if count >= 1024 and count % 1024 == 0:
        return f"{count / 1024:g}k"
    return f"{count / 1000:g}k" if count >= 1000 and count % 1000 == 0 else f"{count:g}"


def needle(run: Run) -> Section:
    """A heat map for each series, the curve over lengths, and answers that missed."""
    result = run.result(STAGE)
    blocks: list[Block] = []
    if result:
        every = dict(result.record("series").items())
        score = result.text("score")
        grids = [_heat_map(result, name, series, score) for name, series in every.items()]
        lines = [
            _line(result, [series], name, i)
            for i, (name, series) in enumerate(every.items())
        ]  # fmt: skip
        note = f"Bands are {CONFIDENCE:.0%} confidence intervals over texts."
        blocks += [_curve(result, lines, SOURCE, note), Grid(grids), _effective(result, every)]
        if missed := _missed(run, score):
            blocks.append(Fold("Answers that missed", [missed]))
    return Section(STAGE, "Needle in a haystack", run.status(STAGE), _lead(result), blocks)


def _lead(result: Record) -> str:
    if not result:
        return ""
    return (
        f"Trained on rows of {num(result.number('trained_length'))} tokens; longer ones are read "
        f"with RoPE option “{result.text('rope')}”."
    )


def _heat_map(result: Record, name: str, series: Record, score: str) -> Block:
    lengths, depths = result.array("lengths"), result.array("depths")
    scores = series.record("scores").array(score)
    mean = percent(float(np.nanmean(scores)))
    return svg.picture(
        title=f"{name}: mean {score} score {mean}",
        alt=f"Heat map of {score} scores, {name}, length across and depth down; mean {mean}.",
        source=SOURCE,
        draw=plots.heat_map(
            scores, [short(n) for n in lengths], [num(d) for d in depths],
            "context length, tokens", "depth of the needle, %",
        ),
        height=90 + 24 * len(depths), note="Cells are scores in per cent.",
    )  # fmt: skip


def _line(result: Record, found: Sequence[Record], label: str, number: int) -> Line:
    """One run: its own interval, over texts. Several, which differ in seeds: that over runs."""
    # Lengths double: one step a doubling.
    x = np.log2(result.array("lengths"))
    if len(found) == 1:
        low, high = found[0].array("low"), found[0].array("high")
        return Line(Series(x, found[0].array("mean")), label, number % 6, low=low, high=high)
    intervals = [student(column) for column in np.array([s.array("mean") for s in found]).T]
    return Line(
        Series(x, np.array([i.mean for i in intervals])),
        label,
        number % 6,
        low=np.array([max(i.low, 0.0) for i in intervals]),
        high=np.array([min(i.high, 1.0) for i in intervals]),
    )


def _curve(result: Record, lines: Sequence[Line], source: str, note: str) -> Block:
    threshold = result.number("threshold") or 0.0
    ends = "; ".join(f"{line.label} {percent(float(line.series.y[-1]))}" for line in lines)
    longest = short(float(result.array("lengths").max()))
    return svg.picture(
        title=f"Mean score over length; at {longest}: {ends}" if len(lines) < 5
        else "Mean score over length",
        alt=f"Line chart of mean needle score over context length; at {longest}: {ends}.",
        source=source,
        draw=curves.line_chart(
            lines, "context length, tokens", "mean score",
            levels=[Level(threshold, "found")], bottom=0.0, top=1.03,
            places={float(np.log2(n)): short(n) for n in result.array("lengths")},
        ),
        height=280, wide=330, note=note,
    )  # fmt: skip


def _effective(result: Record, every: dict[str, Record]) -> Table:
    threshold = percent(result.number("threshold"))
    return Table(
        title=f"Effective length: up to here every mean is {threshold} or more",
        head=["Series", "Tokens"],
        rows=[[name, num(series.number("effective_length"))] for name, series in every.items()],
        source=SOURCE,
        numeric=frozenset({1}),
    )


def _missed(run: Run, score: str) -> Table | None:
    rows = [row for row in run.rows(f"{STAGE}/items.jsonl") if (row.number(score) or 0.0) < 1]
    shown = rows[:: max(1, len(rows) // _SAMPLES)][:_SAMPLES]
    if not shown:
        return None
    return Table(
        title=f"{len(shown)} of {len(rows)} answers that missed a needle",
        head=["Where", "Needles", "Answers"],
        rows=[
            [
                Cell(f"{row.text('series')}, {short(row.number('length') or 0)} tokens",
                     f"depth {row.text('depth')} %"),
                clip(" ".join(row.strings("needles")), _LETTERS),
                clip(" / ".join(row.strings("responses")), _LETTERS) or "(empty)",
            ]
            for row in shown
        ],
        source=f"{STAGE}/items.jsonl",
        stacked=True,
    )  # fmt: skip


def headlines(run: Run) -> list[Headline]:
    result = run.result(STAGE)
    rows = []
    for name, series in result.record("series").items():
        found = series.number("effective_length")
        rows.append(
            Headline(
                "Needle", num(found) if found else DASH,
                f"tokens of effective context ({name}), trained on "
                f"{num(result.number('trained_length'))}.", SOURCE, STAGE,
            )
        )  # fmt: skip
    return rows


def compared(runs: Sequence[Run]) -> Section:
    """The arms of a sweep: the decay of each series over length, and effective lengths."""
    found = by_arm(runs, STAGE)
    blocks: list[Block] = []
    if found:
        results = {arm: [run.result(STAGE) for run in members] for arm, members in found.items()}
        first = next(iter(results.values()))[0]
        for name in first.record("series").value:
            lines = [
                _line(members[0], [m.record("series").record(name) for m in members], arm, i)
                for i, (arm, members) in enumerate(results.items())
            ]
            blocks.append(_curve(first, lines, f"*/{SOURCE}", f"{name}. {seeds(found)}"))
        blocks.append(
            Table(
                title="Effective length of every run, tokens",
                head=["Series", *results],
                rows=[
                    [
                        name,
                        *(
                            ", ".join(
                                num(m.record("series").record(name).number("effective_length"))
                                for m in members
                            )
                            for members in results.values()
                        ),
                    ]
                    for name in first.record("series").value
                ],
                source=f"*/{SOURCE}",
                numeric=frozenset(range(1, len(results) + 1)),
                note=f"Up to here every mean is {percent(first.number('threshold'))} or more; "
                f"{DASH}: not even the shortest.",
            )
        )
    return Section(STAGE, "Needle in a haystack", DONE, "", blocks)
