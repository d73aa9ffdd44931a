"""Section on the PPO rounds: curves, patches between rounds, hacking, how answers change."""

from __future__ import annotations

import itertools

from internlm2_jax.report import curves, plots, svg
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
from internlm2_jax.report.curves import Line, Mark, Span
from internlm2_jax.report.load import Record, Run, Series, series

PPO = "ppo"
MAX_TRAILS, TRAIL_LETTERS = 6, 300

# Key, name, unit, fixed bottom of the axis: PPO's curves in the order they are read.
CURVES = (
    ("reward", "Reward", "mean score of the reward model", None),
    ("kl", "KL to the reference", "nats per response token", 0.0),
    ("response_length", "Response length", "tokens", 0.0),
    ("task_accuracy", "Verifiable tasks", "share answered rightly", 0.0),
    ("value_loss", "Value loss", "squared error", 0.0),
    ("policy_loss", "Policy loss", "clipped surrogate", None),
    ("pretrain_loss", "Pre-training loss", "nats per token", None),
    ("clip_share", "Clipped ratios", "share of tokens", 0.0),
    ("truncated", "Truncated responses", "share without an end", 0.0),
)


def ppo(run: Run) -> Section:
    """The rounds of online RLHF: curves, the patches between them, what was hacked."""
    rows, result = run.metrics(PPO), run.result(PPO)
    spans, marks = _rounds(rows), _patches(rows, result)
    charts = [
        chart for curve in CURVES if (chart := _curve(rows, *curve, spans=spans, marks=marks))
    ]
    hacking = _hacking(result)
    if hacking:
        charts.append(hacking)
    blocks: list[Block] = []
    if charts:
        blocks.append(Grid(charts))
    table = _round_table(result)
    if table:
        blocks.append(table)
    trails = _trails(run.rows(f"{PPO}/samples.jsonl"))
    if trails:
        blocks.append(Fold("Answers to the same prompts as training went on", [trails]))
    lead = ""
    if charts:
        lead = (
            "Shaded: the critic warms up and the policy stands still. "
            "Titles compare the first and last tenth of the iterations in which it moves."
        )
    return Section(PPO, "Online RLHF (PPO)", run.status(PPO), lead, blocks)


def _rounds(rows: list[Record]) -> list[Span]:
    """Stretches of one round, warm-up or not, as spans of iterations."""
    steps = sorted(
        (step, row.text("round"), bool(row.value.get("warmup")))
        for row in rows
        if (step := row.number("step")) is not None
    )
    spans = []
    for (number, warmup), group in itertools.groupby(steps, key=lambda item: item[1:]):
        inside = [step for step, _, _ in group]
        label = "warm-up" if warmup else f"round {number}"
        brief = "" if warmup else number
        spans.append((min(inside), max(inside), label, brief, warmup))
    # Each stretch reaches to where the next begins, so that no iteration lies between two.
    stops = [start for start, *_ in spans[1:]] + [span[1] for span in spans[-1:]]
    return [Span(s[0], stop, *s[2:]) for s, stop in zip(spans, stops, strict=True)]


def _patches(rows: list[Record], result: Record) -> list[Mark]:
    """Where the reward model was patched: before each round that follows one with new pairs."""
    marks = []
    patched = [
        record.number("round")
        for record in result.records("rounds")
        if any(pattern.number("num_pairs") for pattern in record.records("hacking"))
    ]
    for number in patched:
        later = [
            step for row in rows
            if (step := row.number("step")) is not None and number is not None
            and (row.number("round") or 0) > number
        ]  # fmt: skip
        if later:
            marks.append(Mark(min(later), "patched"))
    return marks


def _ends(values: Series) -> tuple[float, float]:
    """Means over the first and the last tenth."""
    part = max(len(values.y) // 10, 1)
    return float(values.y[:part].mean()), float(values.y[-part:].mean())


def _curve(
    rows: list[Record], key: str, name: str, unit: str, bottom: float | None,
    *, spans: list[Span], marks: list[Mark],
) -> Block | None:  # fmt: skip
    values = series(rows, key)
    moving = [row for row in rows if not row.value.get("warmup")]
    if not values:
        return None
    first, last = _ends(series(moving, key) or values)
    write = percent if unit.startswith("share") else num
    return svg.picture(
        title=f"{name}: {write(first)} → {write(last)}",
        alt=f"Line chart of {name.lower()} ({unit}) over PPO iterations, from {write(first)} to "
        f"{write(last)}.",
        source=f"{PPO}/metrics.jsonl",
        draw=curves.line_chart(
            _by_round(values, spans), "iteration", unit, spans=spans, marks=marks, bottom=bottom
        ),
        height=240,
    )


def _by_round(values: Series, spans: list[Span]) -> list[Line]:
    """One curve a stretch: a mean over both sides of a patch would draw a slope that is none."""
    if len(values.y) < 20:
        return [Line(values)]
    window = max(len(values.y) // 20, 3)
    lines = [Line(values, faint=True)]
    for number, span in enumerate(spans):
        last = number == len(spans) - 1
        inside = (values.x >= span.start) & ((values.x < span.stop) | last)
        lines.append(Line(Series(values.x[inside], values.y[inside]).smooth(window)))
    return lines


def _hacking(result: Record) -> Block | None:
    """How often each searched-for pattern occurs early and late in its round."""
    dots, rises = [], []
    for record in result.records("rounds"):
        for pattern in record.records("hacking"):
            early, late = pattern.number("early_rate"), pattern.number("late_rate")
            if early is None or late is None:
                continue
            name = pattern.text("pattern").replace("_", " ")
            dots.append((f"{record.text('round')}: {name}", [("early", early), ("late", late)]))
            rises.append((late - early, f"{name}, {percent(early)} → {percent(late)}"))
    if not dots:
        return None
    return svg.picture(
        title=f"Hacking patterns; the largest rise: {max(rises)[1]}",
        alt="Dot chart of how often hacking patterns occur early and late in each round: "
        + ", ".join(text for _, text in rises),
        source=f"{PPO}/result.json", draw=plots.dot_chart(dots, "share of responses"),
        height=76 + 30 * len(dots), note="Names begin with the round.",
    )  # fmt: skip


def _round_table(result: Record) -> Table | None:
    rows = []
    for record in result.records("rounds"):
        rewards = [num(record.number(key)) for key in ("reward_first", "reward_last")]
        start = [record.text("round"), num(record.number("iterations")), " → ".join(rewards),
                 num(record.number("kl_last"))]  # fmt: skip
        for pattern in record.records("hacking") or [Record({}, result.source)]:
            rates = [percent(pattern.number(key)) for key in ("early_rate", "late_rate")]
            observed = pattern.value.get("observed")
            verdict = DASH if observed is None else "yes" if observed else "no"
            rows.append(
                [*start, pattern.text("pattern").replace("_", " ") or DASH, " → ".join(rates),
                 num(pattern.number("p_value"), 2), verdict, num(pattern.number("num_pairs"))]
            )  # fmt: skip
    if not rows:
        return None
    return Table(
        title="The rounds, and the pattern each was searched for",
        head=["Round", "Iterations", "Reward, first → last", "KL at the end", "Hacking pattern",
              "Rate, early → late", "p", "Hacked?", "Pairs in the patch"],
        rows=rows, source=f"{PPO}/result.json", numeric=frozenset({0, 1, 2, 3, 5, 6, 8}),
        note="Rates are shares of responses that show the pattern, early and late in the round; "
        "p is the chance of such a rise if nothing had changed.",
    )  # fmt: skip


def _trails(samples: list[Record]) -> Table | None:
    """Per prompt, the first and the last response of each round."""
    prompts: dict[str, dict[str, list[Record]]] = {}
    for sample in samples:
        rounds = prompts.setdefault(sample.text("prompt"), {})
        rounds.setdefault(sample.text("round"), []).append(sample)
    # The prompts seen most often say most about change.
    chosen = sorted(prompts.items(), key=lambda item: -sum(map(len, item[1].values())))[:MAX_TRAILS]
    rows: list[list[str | Cell]] = []
    for prompt, rounds in chosen:
        for number, found in sorted(rounds.items()):
            for record in found if len(found) == 1 else (found[0], found[-1]):
                score = num(record.number("score"))
                rows.append(
                    [Cell(clip(prompt, TRAIL_LETTERS), record.text("domain")), number,
                     record.text("step"), Cell(clip(record.text("response"), TRAIL_LETTERS)), score]
                )  # fmt: skip
    if not rows:
        return None
    return Table(
        title="First and last answer of each round",
        head=["Prompt", "Round", "Iteration", "Response", "Score"],
        rows=rows, source=f"{PPO}/samples.jsonl", numeric=frozenset({1, 2, 4}), stacked=True,
    )  # fmt: skip


def headlines(run: Run) -> list[Headline]:
    rounds = run.result(PPO).records("rounds")
    if not rounds:
        return []
    first, last = rounds[0].number("reward_first"), rounds[-1].number("reward_last")
    hacked = [r for r in rounds if any(h.value.get("observed") for h in r.records("hacking"))]
    reading = (
        f"mean reward, first to last, in {len(rounds)} round(s); KL at the end "
        f"{num(rounds[-1].number('kl_last'), 2)}; reward hacking seen in {len(hacked)} of them."
    )
    number = f"{num(first, 2)} → {num(last, 2)}"
    return [Headline("PPO", number, reading, f"{PPO}/result.json", PPO)]
