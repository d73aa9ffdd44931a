"""The headline table, and the sections on the run itself: time, versions, settings."""

from __future__ import annotations

from collections.abc import Callable

from internlm2_jax.report import (
    contamination,
    corpus,
    evaluation,
    grpo,
    needle,
    plots,
    ppo,
    reward_model,
    svg,
    training,
)
from internlm2_jax.report.blocks import (
    Block,
    Fold,
    Headline,
    Section,
    Table,
    Text,
    duration,
    percent,
    pretty,
)  # fmt: skip
from internlm2_jax.report.load import ABSENT, DONE, Run

Sources = tuple[Callable[[Run], list[Headline]], ...]
_HEADLINES: Sources = (
    corpus.headlines,
    training.headlines,
    reward_model.headlines,
    ppo.headlines,
    grpo.headlines,
    evaluation.headlines,
    needle.headlines,
    contamination.headlines,
)


def headlines(run: Run) -> list[Headline]:
    """The handful of numbers that sum the run up, in the order of its stages."""
    rows = [row for find in _HEADLINES for row in find(run)]
    seconds = _seconds(run)
    if seconds:
        total = duration(sum(seconds.values()))
        reading = f"of wall time for the {len(seconds)} finished stages."
        rows.append(Headline("Time", total, reading, "*/done.json", "time"))
    return rows


def progress(run: Run) -> list[tuple[str, str]]:
    """(stage, status) for every stage of the pipeline but the one that makes this page."""
    return [(stage, run.status(stage)) for stage in run.stages() if stage != "report"]


def _seconds(run: Run) -> dict[str, float]:
    found = {
        stage: run.record(f"{stage}/done.json").number("wall_seconds") for stage, _ in progress(run)
    }
    return {stage: seconds for stage, seconds in found.items() if seconds is not None}


def time(run: Run) -> Section:
    """Wall time per stage."""
    seconds = _seconds(run)
    total = sum(seconds.values())
    blocks: list[Block] = []
    if seconds:
        slowest = max(seconds, key=seconds.__getitem__)
        unit, scale = ("minutes", 60) if max(seconds.values()) >= 120 else ("seconds", 1)
        bars = [(pretty(stage), value / scale, duration(value)) for stage, value in seconds.items()]
        blocks.append(
            svg.picture(
                title=f"{pretty(slowest)} takes {percent(seconds[slowest] / total if total else 0)}"
                " of the time",
                alt="Bar chart of time per stage: "
                + ", ".join(f"{name} {text}" for name, _, text in bars),
                source="*/done.json", draw=plots.bar_chart(bars, unit, colour=5),
                height=50 + 26 * len(bars), wide=50 + 26 * len(bars),
            )
        )  # fmt: skip
        blocks.append(
            Table(
                title="Wall time, restarts included",
                head=["Stage", "Status", "Wall time", "Share"],
                rows=[
                    [pretty(stage), run.status(stage), duration(seconds.get(stage)),
                     percent(seconds[stage] / total if stage in seconds and total else None)]
                    for stage, _ in progress(run)
                ] + [["Together", "", duration(total), ""]],
                source="*/done.json", numeric=frozenset({2, 3}),
            )
        )  # fmt: skip
    lead = f"{duration(total)} for {len(seconds)} stages." if seconds else ""
    return Section("time", "Wall time", DONE if seconds else ABSENT, lead, blocks)


def environment(run: Run) -> Section:
    """What the run was made with: command, versions, settings."""
    record = run.record("pipeline.json")
    facts = [
        [name.capitalize(), record.text(name)]
        for name in ("name", "command", "seed", "platform")
        if record.text(name)
    ]
    versions = [[name, version] for name, version in record.texts("versions").items()]
    blocks: list[Block] = []
    if facts:
        blocks.append(Table("The run", ["What", "Value"], facts, "pipeline.json"))
    if versions:
        table = Table("Versions", ["Package", "Version"], versions, "pipeline.json")
        blocks.append(Fold(f"{len(versions)} package versions", [table]))
    settings = run.text("config.txt")
    if settings.strip():
        text = Text(settings.rstrip(), "Every setting of the run", "config.txt")
        blocks.append(Fold(f"Settings, {len(settings.splitlines())} lines", [text]))
    return Section(
        "environment", "Environment and settings", DONE if blocks else ABSENT, "", blocks
    )
