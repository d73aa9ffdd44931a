"""Sections on the two stages that minimise a language-model loss: pre-training and SFT."""

from __future__ import annotations

from internlm2_jax.report import curves, plots, svg
from internlm2_jax.report.blocks import Block, Grid, Headline, Section, Table, num, percent, pretty
from internlm2_jax.report.curves import Level, Line, Span
from internlm2_jax.report.load import Record, Run, Series, series

PRETRAIN, SFT = "pretrain", "sft"
NATS = "loss, nats per token"


def pretrain(run: Run) -> Section:
    """Loss over the three phases, validation per domain against a model blind to context."""
    rows, result = run.metrics(PRETRAIN), run.result(PRETRAIN)
    source = f"{PRETRAIN}/metrics.jsonl"
    spans = phases(rows, result)
    levels = _unigram(result)
    blocks: list[Block] = []
    train = series(rows, "loss", split="train")
    validation = series(rows, "loss", split="validation")
    top = _top(levels, [train, validation])
    lead = _pretrain_lead(result)
    if train or validation:
        blocks.append(
            svg.picture(
                title=f"Training loss {_change(train)} over {len(spans) or 1} "
                f"phase{'s' if len(spans) > 1 else ''}",
                alt=f"Line chart of training and validation loss over steps. Training loss "
                f"{_change(train)}; validation loss {_change(validation)}.",
                source=f"{source}, {PRETRAIN}/result.json",
                draw=curves.line_chart(
                    [*_train_lines(train), Line(validation, "validation", 1)],
                    "step", NATS, spans=spans, levels=levels, top=top,
                ),
                height=260, wide=330,
                note="Thin line: every logged step; thick line: running mean." + _legend(spans),
            )
        )  # fmt: skip
    small = [
        _by_domain(rows, spans, levels, source),
        _by_source(rows, spans, source),
        _plain_chart(rows, "learning_rate", "Learning rate", "learning rate", spans, source),
        _plain_chart(rows, "batch_size", "Batch", "rows", spans, source),
        _plain_chart(rows, "grad_norm", "Gradient norm", "norm before clipping", spans, source),
    ]
    charts = [chart for chart in small if chart]
    if charts:
        blocks.append(Grid(charts))
    table = _phase_table(result)
    if table:
        blocks.append(table)
    return Section(PRETRAIN, "Pre-training", run.status(PRETRAIN), lead, blocks)


def _top(levels: list[Level], curves_shown: list[Series]) -> float | None:
    """Just above the context-blind line, so that the start does not flatten the rest.

    None, for all of the data, when there is no such line or a curve never comes down to it.
    """
    if not levels or any(len(curve.y) and curve.y.min() > levels[0].y for curve in curves_shown):
        return None
    return 1.1 * max(level.y for level in levels)


def _pretrain_lead(result: Record) -> str:
    loss, unigram = result.number("validation_loss"), result.numbers("unigram_entropy").get("all")
    parts = []
    if result.number("num_params"):
        parts.append(
            f"{num(result.number('num_params'))} parameters, "
            f"{num(result.number('tokens_seen'))} training tokens."
        )
    if loss is not None and unigram is not None:
        parts.append(
            f"Validation loss ends at {num(loss)} nats per token. A model that knows how common "
            f"each token is, and nothing else, scores {num(unigram)}: the dashed line."
        )
    return " ".join(parts)


def _legend(spans: list[Span]) -> str:
    """The numbers that stand for phases where their names have no room."""
    names = ", ".join(f"{span.brief} {span.label}" for span in spans)
    return f" Phases: {names}." if names else ""


def _train_lines(train: Series) -> list[Line]:
    """Raw values thin, their running mean (1/40 of the run wide) thick."""
    if len(train.y) < 40:
        return [Line(train, "train", 0)]
    return [Line(train, faint=True), Line(train.smooth(max(len(train.y) // 40, 3)), "train", 0)]


def _change(values: Series) -> str:
    """ "fell from 6.2 to 3.1", in words that fit the numbers."""
    if not values:
        return "is not there"
    first, last = values.y[0], values.y[-1]
    if len(values.y) == 1:
        return f"is {num(last)}"
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    return f"{verb} from {num(first)} to {num(last)}"


def phases(rows: list[Record], result: Record) -> list[Span]:
    """Phases as spans of steps: from the result, or from the log while the stage still runs."""
    listed = result.records("phases")
    names = [record.text("name") for record in listed]
    ends = [(record.number("first_step"), record.number("last_step")) for record in listed]
    if not listed:
        steps: dict[str, list[float]] = {}
        for row in rows:
            step = row.number("step")
            if row.text("phase") and step is not None:
                steps.setdefault(row.text("phase"), []).append(step)
        names, ends = list(steps), [(min(found), max(found)) for found in steps.values()]
    spans = []
    for number, (name, (first, last)) in enumerate(zip(names, ends, strict=True), start=1):
        if first is not None and last is not None:
            length = listed[number - 1].number("sequence_length") if listed else None
            label = pretty(name) + (f" (T = {num(length)})" if length else "")
            spans.append(Span(first, last, label, brief=str(number)))
    return spans


def _unigram(result: Record) -> list[Level]:
    entropies = result.numbers("unigram_entropy")
    return [
        Level(value, "unigram" if name == "all" else f"unigram, {name}")
        for name, value in entropies.items()
    ]


def _by_domain(
    rows: list[Record], spans: list[Span], levels: list[Level], source: str
) -> Block | None:
    lines = _losses_by_name(rows, "validation")
    if not lines:
        return None
    ends = ", ".join(f"{line.label} {num(line.series.y[-1])}" for line in lines)
    return svg.picture(
        title=f"Validation loss by domain: {ends}",
        alt=f"Line chart of validation loss per domain over steps; last values {ends} nats/token.",
        source=source,
        draw=curves.line_chart(lines, "step", NATS, spans=spans, levels=levels),
        height=250,
    )


def _by_source(rows: list[Record], spans: list[Span], source: str) -> Block | None:
    lines = _losses_by_name(rows, "train", smooth=True)
    if len(lines) < 2:
        return None
    ends = ", ".join(f"{line.label} {num(line.series.y[-1])}" for line in lines)
    return svg.picture(
        title="Training loss by source of the mixture",
        alt=f"Line chart of training loss per source over steps; last values {ends} nats/token.",
        source=source,
        draw=curves.line_chart(lines, "step", NATS, spans=spans),
        height=250,
        note="Running means, each over the steps whose batch has the source.",
    )


def _losses_by_name(rows: list[Record], split: str, smooth: bool = False) -> list[Line]:
    """A line for each loss/NAME of a split, as many as there are colours."""
    mine = [row for row in rows if row.value.get("split") == split]
    keys = dict.fromkeys(key for row in mine for key in row.value if key.startswith("loss/"))
    found = [(key.removeprefix("loss/"), series(mine, key)) for key in keys]
    found = [(name, values) for name, values in found if values][: len(svg.COLOURS)]
    return [
        Line(values.smooth(max(len(values.y) // 20, 1)) if smooth else values, name, colour)
        for colour, (name, values) in enumerate(found)
    ]


def _plain_chart(
    rows: list[Record], key: str, name: str, unit: str, spans: list[Span], source: str
) -> Block | None:
    values = series(rows, key, split="train")
    if not values:
        return None
    low, high = num(values.y.min(), 2), num(values.y.max(), 2)
    return svg.picture(
        title=f"{name}: {low} to {high}",
        alt=f"Line chart of {name.lower()} over steps, from {low} to {high}.",
        source=source,
        draw=curves.line_chart([Line(values)], "step", unit, spans=spans, bottom=0),
        height=250,
    )


def _phase_table(result: Record) -> Table | None:
    listed = result.records("phases")
    columns = [
        ("Steps", "steps"), ("Tokens a row", "sequence_length"), ("Rows a batch", "batch_size"),
        ("RoPE base", "rope_theta"), ("Peak learning rate", "learning_rate"),
        ("Validation loss at its end", "validation_loss"),
    ]  # fmt: skip
    if not listed:
        return None
    return Table(
        title="The phases",
        head=["Phase", *(title for title, _ in columns)],
        rows=[
            [pretty(phase.text("name")), *(num(phase.number(key)) for _, key in columns)]
            for phase in listed
        ],
        source=f"{PRETRAIN}/result.json", numeric=frozenset(range(1, 7)),
    )  # fmt: skip


def sft(run: Run) -> Section:
    """Loss on instructions, and accuracy on tasks a program can check."""
    rows, result = run.metrics(SFT), run.result(SFT)
    train = series(rows, "loss", split="train")
    validation = series(rows, "loss", split="validation")
    blocks: list[Block] = []
    if train or validation:
        blocks.append(
            svg.picture(
                title=f"Loss on held-out answers {_change(validation)}"
                if validation
                else f"Training loss {_change(train)}",
                alt=f"Line chart of SFT loss over steps: train {_change(train)}, "
                f"validation {_change(validation)}.",
                source=f"{SFT}/metrics.jsonl",
                draw=curves.line_chart(
                    [*_train_lines(train), Line(validation, "validation", 1)], "step", NATS
                ),
                height=240,
                note="Only the tokens of the assistant's answers count.",
            )
        )
    accuracy = result.numbers("task_accuracy")
    accuracy = dict(sorted(accuracy.items(), key=lambda item: item[0] != "all"))
    if accuracy:
        bars = [
            ("All tasks" if name == "all" else pretty(name), share, percent(share))
            for name, share in accuracy.items()
        ]
        blocks.append(
            svg.picture(
                title="Verifiable tasks answered rightly",
                alt="Bar chart of task accuracy: " + ", ".join(f"{n} {t}" for n, _, t in bars),
                source=f"{SFT}/result.json",
                draw=plots.bar_chart(bars, "share of tasks answered rightly", colour=2),
                height=54 + 26 * len(bars),
            )
        )
    lead = ""
    if result.number("validation_loss") is not None:
        lead = f"Final validation loss {num(result.number('validation_loss'))} nats per token"
        if result.number("epochs") is not None:
            epochs, count = num(result.number("epochs"), 2), num(result.number("rows"))
            lead += f" after {epochs} epochs over {count} packed rows"
        lead += "."
    return Section(SFT, "Supervised fine-tuning", run.status(SFT), lead,
                   [Grid(blocks)] if blocks else [])  # fmt: skip


def headlines(run: Run) -> list[Headline]:
    rows = []
    result, source = run.result(PRETRAIN), f"{PRETRAIN}/result.json"
    loss, unigram = result.number("validation_loss"), result.numbers("unigram_entropy").get("all")
    if loss is not None:
        reading = "nats per token on held-out text."
        if unigram is not None:
            gap = f"{num(unigram - loss, 2)} below" if loss < unigram else "not below"
            reading = (
                f"nats per token on held-out text, {gap} the {num(unigram)} of a model "
                "blind to context."
            )
        rows.append(Headline("Pre-training", num(loss), reading, source, PRETRAIN))
    result, source = run.result(SFT), f"{SFT}/result.json"
    accuracy = result.numbers("task_accuracy")
    if accuracy:
        overall = accuracy.get("all", sum(accuracy.values()) / len(accuracy))
        reading = "of the verifiable tasks answered rightly after supervised fine-tuning."
        rows.append(Headline("SFT", percent(overall), reading, source, SFT))
    elif result.number("validation_loss") is not None:
        reading = "nats per token on held-out answers after supervised fine-tuning."
        number = num(result.number("validation_loss"))
        rows.append(Headline("SFT", number, reading, source, SFT))
    return rows
