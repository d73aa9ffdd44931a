"""One page about several runs: what differs between their settings, their curves, their results.

Runs that differ in seeds alone are one variant: a line is then the mean of its runs, the band
reaches from the lowest to the highest.
"""

from __future__ import annotations

import ast
import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.report import arms, curves, needle, svg
from internlm2_jax.report.alignment import alignment
from internlm2_jax.report.alignment import headlines as of_arms
from internlm2_jax.report.arms import arm_of
from internlm2_jax.report.blocks import (
    DASH,
    Block,
    Cell,
    Grid,
    Headline,
    Section,
    Table,
    num,
    pretty,
)
from internlm2_jax.report.curves import Line, Span, over_seeds
from internlm2_jax.report.load import DONE, Run, series
from internlm2_jax.report.page import layout
from internlm2_jax.report.training import NATS, PRETRAIN, phases

_LABEL = 26  # letters that a line's name may have; longer ones are numbered
_SETTINGS = "config.txt"
_TITLES = {PRETRAIN: "Pre-training"}


@dataclass(frozen=True)
class Variant:
    """Runs of one setting; `label` names it in plots, `settings` are those in which all differ."""

    label: str
    runs: list[Run]
    settings: Mapping[str, str]


def build(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Writes the page about `folders` to the file `out`.

    Errors: UserError when a folder is no run, or all of them are one.
    """
    runs = [Run(folder) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < 2:
        raise UserError("give two or more different run folders to compare")
    found = variants(runs)
    sections = [
        alignment(runs),
        arms.arms(runs),
        needle.compared(runs),
        _settings(found),
        *_training(found),
        _results(found),
    ]
    page = layout(
        name=" · ".join(variant.label for variant in found),
        kind="comparison",
        about=f"Comparison of {len(runs)} runs, made from the files in their folders.",
        headlines=[*of_arms(runs), *_headlines(found)],
        sections=[section for section in sections if section.blocks],
    )
    files.atomic_write(out, page)
    return Path(out)


# ------------------------------------------------------------------------------ variants


def settings(run: Run) -> dict[str, str]:
    """{dotted path: value as text} of all settings of a run."""
    lines = (line.partition(" = ") for line in run.text(_SETTINGS).splitlines())
    return {path: value for path, separator, value in lines if separator}


def variants(runs: Sequence[Run]) -> list[Variant]:
    """Runs grouped by their settings but for seeds, in the order given."""
    all_settings = [settings(run) for run in runs]
    paths = dict.fromkeys(path for found in all_settings for path in found)
    differ = [p for p in paths if len({found.get(p) for found in all_settings}) > 1]
    telling = [p for p in differ if p.rpartition(".")[2] != "seed"]
    groups: dict[tuple, list[Run]] = collections.defaultdict(list)
    for run, found in zip(runs, all_settings, strict=True):
        # A run without saved settings is like no other.
        key = tuple(found.get(p, DASH) for p in telling) if found else (str(run.folder),)
        groups[key].append(run)
    made = []
    for number, (values, members) in enumerate(groups.items(), start=1):
        mine = dict(zip(telling, values, strict=False)) if settings(members[0]) else {}
        label = ", ".join(f"{_short(p, telling)} {_plain(v)}" for p, v in mine.items())
        if not label or len(label) > _LABEL:
            label = members[0].name if len(members[0].name) <= _LABEL else f"variant {number}"
        made.append(Variant(arm_of(members[0]) or label, members, mine))
    twice = collections.Counter(variant.label for variant in made)
    return [
        Variant(f"{v.label} ({i})", v.runs, v.settings) if twice[v.label] > 1 else v
        for i, v in enumerate(made, start=1)
    ]


def _short(path: str, paths: Sequence[str]) -> str:
    """The last parts of a dotted path, as many as tell it from the others."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        tail = ".".join(parts[-count:])
        if sum(f".{other}".endswith(f".{tail}") for other in paths) == 1:
            return tail
    return path


def _plain(value: str) -> str:
    try:
        return str(ast.literal_eval(value))
    except (ValueError, SyntaxError):
        return value


# -------------------------------------------------------------------------------- series


def lines(
    found: Sequence[Variant], stage: str, key: str, split: str, *, smooth: bool = False
) -> list[Line]:
    """One line a variant; runs that have not logged `key` are left out."""
    made = []
    for number, variant in enumerate(found):
        logged = [series(run.metrics(stage), key, split=split) for run in variant.runs]
        logged = [s.smooth(max(len(s.y) // 40, 1)) if smooth else s for s in logged if s]
        if logged:
            made.append(over_seeds(logged, variant.label, number % len(svg.COLOURS)))
    return [line for line in made if line.series]


# ------------------------------------------------------------------------------ sections


def _stages(found: Sequence[Variant]) -> list[str]:
    """Stages of which some run has a log with a loss, in pipeline order."""
    runs = [run for variant in found for run in variant.runs]
    names = dict.fromkeys(stage for run in runs for stage in run.stages())
    return [n for n in names if any(series(run.metrics(n), "loss") for run in runs)]


def spans(found: Sequence[Variant], stage: str) -> tuple[list[Span], str]:
    """Phases to draw behind the lines, and a remark where the runs do not agree on them."""
    if stage != PRETRAIN:
        return [], ""
    all_spans = [
        phases(run.metrics(stage), run.result(stage)) for variant in found for run in variant.runs
    ]
    all_spans = [spans for spans in all_spans if spans]
    if not all_spans:
        return [], ""
    longest = max(all_spans, key=lambda spans: spans[-1].stop)
    bounds = {tuple((s.start, s.stop) for s in spans) for spans in all_spans}
    names = ", ".join(f"{span.brief} {span.label}" for span in longest)
    note = f"Phases: {names}."
    return longest, note if len(bounds) == 1 else f"{note} They are of the longest run."


def _training(found: Sequence[Variant]) -> list[Section]:
    sections = []
    many = any(len(variant.runs) > 1 for variant in found)
    band = "Lines are means over seeds, bands reach from lowest to highest. " if many else ""
    for stage in _stages(found):
        behind, note = spans(found, stage)
        source = f"*/{stage}/metrics.jsonl"
        keys = dict.fromkeys(
            key
            for variant in found
            for run in variant.runs
            for row in run.metrics(stage)
            for key in row.value
            if key.startswith("loss/") and row.value.get("split") == "validation"
        )
        charts = [
            ("Validation loss", lines(found, stage, "loss", "validation"), NATS),
            ("Training loss", lines(found, stage, "loss", "train", smooth=True), NATS),
            *(
                (f"Validation loss, {key.removeprefix('loss/')}",
                 lines(found, stage, key, "validation"), NATS)
                for key in keys if len(keys) > 1
            ),
            ("Learning rate", lines(found, stage, "learning_rate", "train"), "learning rate"),
            ("Batch", lines(found, stage, "batch_size", "train"), "rows"),
            ("Gradient norm", lines(found, stage, "grad_norm", "train", smooth=True), "norm"),
        ]  # fmt: skip
        pictures: list[Block] = []
        for title, drawn, unit in charts:
            if not drawn:
                continue
            if title == "Batch" and len({tuple(line.series.y) for line in drawn}) == 1:
                continue
            ends = ", ".join(f"{line.label}: {num(float(line.series.y[-1]))}" for line in drawn)
            first = not pictures
            pictures.append(
                svg.picture(
                    title=f"{title} at the end, {ends}" if len(drawn) < 4 else title,
                    alt=f"Line chart of {title.lower()} over steps; it ends at {ends}.",
                    source=source,
                    draw=curves.line_chart(drawn, "step", unit, spans=behind),
                    height=260,
                    wide=330 if first else 0,
                    note=f"{band}{note}" if first else "",
                )
            )
        if pictures:
            blocks: list[Block] = [pictures[0]]
            blocks += [Grid(pictures[1:])] if pictures[1:] else []
            sections.append(Section(stage, _TITLES.get(stage, pretty(stage)), DONE, "", blocks))
    return sections


def _settings(found: Sequence[Variant]) -> Section:
    paths = dict.fromkeys(path for variant in found for path in variant.settings)
    blocks: list[Block] = []
    names = [variant.label for variant in found]
    if paths:
        blocks.append(
            Table(
                title="Settings that differ, seeds apart",
                head=["Setting", *names],
                rows=[
                    [Cell(path, mono=True), *(_plain(v.settings.get(path, DASH)) for v in found)]
                    for path in paths
                ],
                source=f"*/{_SETTINGS}",
            )
        )
    blocks.append(
        Table(
            title="Runs",
            head=["Variant", "Runs"],
            rows=[[v.label, ", ".join(run.name for run in v.runs)] for v in found],
            source="*/pipeline.json",
        )
    )
    return Section("settings", "Settings", DONE, "", blocks)


def numbers(run: Run) -> dict[str, float]:
    """Results by name: the numbers of each stage's result.json, and of the groups in it."""
    found: dict[str, float] = {}
    for stage in run.stages():
        result = run.result(stage)
        for key, value in result.value.items():
            if isinstance(value, dict):
                found |= {
                    f"{stage}/{key}/{name}": float(v)
                    for name, v in value.items()
                    if isinstance(v, (int, float)) and not isinstance(v, bool)
                }
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                found[f"{stage}/{key}"] = float(value)
    return found


def mean_and_spread(values: Sequence[float]) -> str:
    """ "4.58", or "4.58 ± 0.02" with the standard deviation over seeds."""
    if len(values) == 1:
        return num(values[0])
    return f"{num(float(np.mean(values)))} ± {num(float(np.std(values, ddof=1)), 2)}"


def table(found: Sequence[Variant]) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row for each result in which the variants differ, a column for each."""
    measured = [[numbers(run) for run in variant.runs] for variant in found]
    names = dict.fromkeys(name for runs in measured for result in runs for name in result)
    rows = []
    for name in names:
        columns = [[r[name] for r in runs if name in r] for runs in measured]
        if len({value for column in columns for value in column}) < 2 and all(columns):
            continue
        rows.append([name, *(mean_and_spread(c) if c else DASH for c in columns)])
    return ["Result", *(variant.label for variant in found)], rows


def _results(found: Sequence[Variant]) -> Section:
    head, rows = table(found)
    blocks: list[Block] = []
    if rows:
        blocks.append(
            Table(
                title="Results that differ",
                head=head,
                rows=[[Cell(row[0], mono=True), *row[1:]] for row in rows],
                source="*/result.json",
                numeric=frozenset(range(1, len(head))),
                note="After ±, the standard deviation over seeds.",
            )
        )
    return Section("results", "Results", DONE, "", blocks)


def _headlines(found: Sequence[Variant]) -> list[Headline]:
    """The validation loss of each variant after pre-training."""
    key = f"{PRETRAIN}/validation_loss"
    rows = []
    for variant in found:
        values: list[Any] = [numbers(run).get(key) for run in variant.runs]
        values = [value for value in values if value is not None]
        if values:
            seeds = f", {len(values)} seeds" if len(values) > 1 else ""
            rows.append(
                Headline(
                    variant.label,
                    mean_and_spread(values),
                    f"nats per token on held-out text{seeds}.",
                    f"*/{PRETRAIN}/result.json",
                    "results",
                )
            )
    return rows
