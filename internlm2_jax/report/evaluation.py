"""Sections that compare the models of a run: their answers side by side, and their scores."""

from __future__ import annotations

import numpy as np

from internlm2_jax.errors import UserError
from internlm2_jax.report import plots, svg
from internlm2_jax.report.blocks import (
    DASH,
    Block,
    Cell,
    Grid,
    Headline,
    Section,
    Table,
    clip,
    num,
    percent,
    pretty,
)  # fmt: skip
from internlm2_jax.report.load import Record, Run
from internlm2_jax.report.needle import short

EVALUATE = "evaluate"
SOURCE = f"{EVALUATE}/result.json"
SAMPLE_LETTERS = 700
# JSON files have their keys sorted; models are shown in the order in which they came to be.
_LIFE = ("init", "pretrain", "base", "phase", "sft", "ppo", "rlhf")


def _in_order(names: list[str]) -> list[str]:
    def age(name: str) -> tuple[int, str]:
        return next((i for i, p in enumerate(_LIFE) if p in name.lower()), len(_LIFE)), name

    return sorted(names, key=age)


def samples(run: Run) -> Section:
    """The same prompts answered by each model, with the reward model's score."""
    found = run.result(EVALUATE).records("samples")
    models = _in_order(list({name for sample in found for name in sample.texts("responses")}))
    blocks: list[Block] = []
    if found:
        rows = []
        for sample in found:
            responses, scores = sample.texts("responses"), sample.numbers("scores")
            answers = [
                Cell(clip(responses.get(model, DASH), SAMPLE_LETTERS) or "(empty)",
                     f"score {num(scores[model])}" if model in scores else "")
                for model in models
            ]  # fmt: skip
            prompt = Cell(clip(sample.text("prompt"), SAMPLE_LETTERS), sample.text("domain"))
            rows.append([prompt, *answers])
        blocks.append(
            Table(
                title="The same prompts, answered by each model",
                head=["Prompt", *(pretty(model) for model in models)],
                rows=rows, source=SOURCE, stacked=True,
            )
        )  # fmt: skip
    lead = _sample_lead(found, models)
    return Section("samples", "Before and after", run.status(EVALUATE), lead, blocks)


def _sample_lead(found: list[Record], models: list[str]) -> str:
    """Mean scores over the prompts that every model was scored on."""
    scores = [sample.numbers("scores") for sample in found]
    whole = [numbers for numbers in scores if all(model in numbers for model in models)]
    if not whole or not models:
        return ""
    means = [
        f"{pretty(model)} {num(float(np.mean([numbers[model] for numbers in whole])), 2)}"
        for model in models
    ]
    return f"Mean score over these {len(whole)} prompts: {', '.join(means)}."


def evaluation(run: Run) -> Section:
    """Task accuracy per family, validation loss, and the needle grids."""
    result = run.result(EVALUATE)
    models = dict(result.record("models").items())
    order = _in_order(list(models))
    blocks: list[Block] = []
    accuracy = {name: models[name].numbers("task_accuracy") for name in order}
    families = _families(accuracy)
    if families:
        dots = [
            (pretty(family) if family != "all" else "All tasks",
             [(pretty(name), shares[family]) for name, shares in accuracy.items()
              if family in shares])
            for family in families
        ]  # fmt: skip
        blocks.append(
            svg.picture(
                title=_accuracy_title(accuracy),
                alt="Dot chart of verifiable-task accuracy per family and model; exact numbers in "
                "the table below.",
                source=SOURCE,
                draw=plots.dot_chart(dots, "share of tasks answered rightly"),
                height=74 + 28 * len(dots), wide=74 + 28 * len(dots),
                note="The number at the right is the last model's.",
            )
        )  # fmt: skip
        blocks.append(
            Table(
                title="Share of verifiable tasks answered rightly",
                head=["Model", *("All" if f == "all" else pretty(f) for f in families)],
                rows=[
                    [pretty(name), *(percent(shares.get(family)) for family in families)]
                    for name, shares in accuracy.items() if shares
                ],
                source=SOURCE, numeric=frozenset(range(1, len(families) + 1)),
            )
        )  # fmt: skip
    losses = {name: models[name].numbers("validation_loss") for name in order}
    columns = _families(losses)
    if columns:
        blocks.append(
            Table(
                title="Loss on held-out pre-training text: what alignment cost",
                head=["Model", *("All" if c == "all" else pretty(c) for c in columns)],
                rows=[
                    [pretty(name), *(num(numbers.get(column)) for column in columns)]
                    for name, numbers in losses.items() if numbers
                ],
                source=SOURCE, numeric=frozenset(range(1, len(columns) + 1)),
                note="Nats per token.",
            )
        )  # fmt: skip
    needle = _needle(result.record("needle"))
    if needle:
        blocks.append(Grid(needle))
    return Section(EVALUATE, "Evaluation", run.status(EVALUATE), "", blocks)


def _families(tables: dict[str, dict[str, float]]) -> list[str]:
    """Every column, "all" first."""
    names = sorted({name for numbers in tables.values() for name in numbers})
    return sorted(names, key=lambda name: name != "all")


def _accuracy_title(accuracy: dict[str, dict[str, float]]) -> str:
    overall = [(name, shares["all"]) for name, shares in accuracy.items() if "all" in shares]
    if not overall:
        return "Verifiable tasks by family"
    return "All verifiable tasks: " + " → ".join(f"{pretty(n)} {percent(v)}" for n, v in overall)


def _needle(needle: Record) -> list[Block]:
    """One heat map a model, [depths, lengths]; a grid of another shape is a UserError."""
    lengths, depths = needle.array("lengths"), needle.array("depths")
    grids = needle.record("scores")
    blocks: list[Block] = []
    for name in _in_order(list(grids.value)):
        scores = grids.array(name)
        if scores.shape != (len(depths), len(lengths)):
            raise UserError(
                f"{SOURCE}: needle.scores.{name} is {' x '.join(map(str, scores.shape))}, not "
                f"{len(depths)} depths x {len(lengths)} lengths; run evaluate again"
            )
        if not scores.size:
            continue
        mean = percent(float(np.nanmean(scores))) if np.isfinite(scores).any() else DASH
        blocks.append(
            svg.picture(
                title=f"Needle, {pretty(name)}: mean score {mean}",
                alt=f"Heat map of needle scores of {name}, context length across and depth down; "
                f"mean {mean}.",
                source=SOURCE,
                draw=plots.heat_map(
                    scores, [short(n) for n in lengths], [num(d) for d in depths],
                    "context length, tokens", "depth of the needle, %",
                ),
                height=90 + 24 * len(depths), note=_scoring(needle, name),
            )
        )  # fmt: skip
    return blocks


def _chance(needle: Record, name: str) -> float | None:
    """What guessing scores: stated in the file, or a half for a grid named "(likelihood)"."""
    stated = needle.number("chance")
    return 0.5 if stated is None and "likelihood" in name else stated


def _scoring(needle: Record, name: str) -> str:
    """What a cell's number means."""
    chance = _chance(needle, name)
    return "Cells are scores in per cent" + (f"; chance is {percent(chance)}." if chance else ".")


def headlines(run: Run) -> list[Headline]:
    result = run.result(EVALUATE)
    rows = []
    models = {
        name: record.numbers("task_accuracy") for name, record in result.record("models").items()
    }
    overall = [(n, models[n]["all"]) for n in _in_order(list(models)) if "all" in models[n]]
    if len(overall) > 1:
        (first, before), (last, after) = overall[0], overall[-1]
        reading = f"of verifiable tasks answered rightly: {pretty(first)} → {pretty(last)}."
        number = f"{percent(before)} → {percent(after)}"
        rows.append(Headline("Evaluation", number, reading, SOURCE, EVALUATE))
    elif overall:
        reading = f"of verifiable tasks answered rightly by {pretty(overall[0][0])}."
        rows.append(Headline("Evaluation", percent(overall[0][1]), reading, SOURCE, EVALUATE))
    needle = result.record("needle")
    for name in _in_order(list(needle.record("scores").value))[:1]:
        scores, lengths = needle.record("scores").array(name), needle.array("lengths")
        if np.isfinite(scores).any() and lengths.size:
            reading = f"mean needle score of {pretty(name)}, up to {num(lengths.max())} tokens"
            reading += (
                f"; chance is {percent(chance)}." if (chance := _chance(needle, name)) else "."
            )
            rows.append(
                Headline("Needle", percent(float(np.nanmean(scores))), reading, SOURCE, EVALUATE)
            )
    return rows
