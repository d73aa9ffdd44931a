"""Section on the PPO rounds: curves, patches between rounds, hacking, how answers change."""

from __future__ import annotations

from internlm2_jax.report import curves, plots, rounds, svg
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
from internlm2_jax.report.curves import Line, Span
from internlm2_jax.report.load import Record, Run, Series, series
from internlm2_jax.report.rounds import Rounds

MAX_TRAILS, TRAIL_LETTERS = 6, 300

# Key, name, unit, fixed bottom of the axis: PPO's curves in the order they are read.
CURVES = (
    ("reward", "Reward", "mean score of the reward model", None),
    ("kl", "KL to the reference", "nats per response", 0.0),
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
    found = rounds.load(run)
    charts = [chart for curve in CURVES if (chart := _curve(found, *curve))]
    hacking = _hacking(found)
    if hacking:
        charts.append(hacking)
    tables = (_round_table(found), _patch_table(found))
    blocks: list[Block] = [Grid(charts)] if charts else []
    blocks += [table for table in tables if table]
    trails = _trails(found)
    if trails:
        blocks.append(Fold("Answers as training went on", [trails]))
    lead = ""
    if charts:
        lead = (
            "Shaded: the critic warms up and the policy stands still. "
            "Titles compare the first and last tenth of the iterations in which it moves."
        )
    if found.marks:
        lead += " Rewards before and after a patch come from two reward models."
    return Section(rounds.ROUND, "Online RLHF (PPO)", found.status, lead, blocks)


def _curve(found: Rounds, key: str, name: str, unit: str, bottom: float | None) -> Block | None:
    values = series(found.rows, key)
    moving = [row for row in found.rows if not row.value.get("warmup")]
    if not values:
        return None
    return curves.change(
        name,
        unit,
        series(moving, key) or values,
        _by_round(values, found.spans),
        over="PPO iterations",
        source=found.sources("metrics.jsonl"),
        bottom=bottom,
        spans=found.spans,
        marks=found.marks,
    )


def _by_round(values: Series, spans: list[Span]) -> list[Line]:
    """One curve a stretch: a mean over both sides of a patch would draw a slope that is none."""
    if len(values.y) < 20:
        return [Line(values)]
    window = max(len(values.y) // 20, 3)
    lines = []
    for number, span in enumerate(spans):
        last = number == len(spans) - 1
        inside = (values.x >= span.start) & ((values.x < span.stop) | last)
        lines += curves.with_mean(Series(values.x[inside], values.y[inside]), window)
    return lines


def _hacking(found: Rounds) -> Block | None:
    """How often each pattern occurs before and after the round that it was searched in."""
    dots, rises = [], []
    for one in found.rounds:
        for pattern in one.findings:
            early, late = pattern.number("early_rate"), pattern.number("late_rate")
            if early is None or late is None:
                continue
            name = pattern.text("pattern").replace("_", " ")
            dots.append((f"{one.name}: {name}", [("before", early), ("after", late)]))
            rises.append((late - early, f"{name}, {percent(early)} → {percent(late)}"))
    if not dots:
        return None
    rise = max(rises)[1]
    return svg.picture(
        title=f"Hacking patterns; the largest rise: {rise}"
        if max(rises)[0] > 0
        else "Hacking patterns: none became more frequent",
        alt="Dot chart of how often hacking patterns occur before and after a round: "
        + ", ".join(text for _, text in rises),
        source=_patch_sources(found),
        draw=plots.dot_chart(dots, "share of responses"),
        height=76 + 24 * len(dots),
        note="Names begin with the round.",
    )


def _patch_sources(found: Rounds) -> str:
    return ", ".join(one.patch.source for one in found.rounds if one.patch)


def _round_table(found: Rounds) -> Table | None:
    rows = [
        [
            one.name,
            num(one.result.number("iterations")),
            num(one.result.number("reward_first")),
            num(one.result.number("reward_last")),
            num(one.result.number("kl_last")),
        ]
        for one in found.rounds
        if one.result
    ]
    if not rows:
        return None
    return Table(
        title="The rounds",
        head=["Round", "Iterations", "First reward", "Last reward", "KL at the end"],
        rows=rows,
        source=found.sources("result.json"),
        numeric=frozenset(range(5)),
        note="Rewards are means over the first and last three iterations; KL in nats per response.",
    )


def _patch_table(found: Rounds) -> Table | None:
    """What each patch was made against, and what it did to the ranking of its own pairs."""
    rows = []
    for one in found.rounds:
        hacking = one.patch.record("hacking")
        if not hacking:
            continue
        ranked = [hacking.number(f"patch_accuracy_{when}") for when in ("before", "after")]
        liked = [hacking.number(f"reward_of_{when}") for when in ("early", "late")]
        rows.append(
            [
                one.name,
                hacking.text("pattern").replace("_", " "),
                " → ".join(percent(hacking.number(f"{when}_rate")) for when in ("early", "late")),
                num(hacking.number("p_value"), 2),
                "yes" if hacking.value.get("observed") else "no",
                num(hacking.number("num_pairs")),
                " → ".join(map(percent, ranked)),
                " → ".join(num(value, 2) for value in liked),
            ]
        )
    if not rows:
        return None
    return Table(
        title="The patches of the reward model",
        head=[
            "After round", "Strongest pattern", "Share of responses", "p", "Hacked?", "Pairs",
            "Its pairs ranked right", "Unpatched reward",
        ],
        rows=rows,
        source=_patch_sources(found),
        numeric=frozenset({0, 2, 3, 5, 6, 7}),
        note="Share of responses and unpatched reward: before → after the round; ranked right: "
        "before → after the patch. p is the chance of such a rise if nothing had changed, "
        "corrected for the number of patterns tried.",
    )  # fmt: skip


def _trails(found: Rounds) -> Table | None:
    """Per prompt, the first and the last response of each round."""
    prompts: dict[str, dict[str, list[Record]]] = {}
    for sample in found.samples:
        by_round = prompts.setdefault(sample.text("prompt"), {})
        by_round.setdefault(sample.text("round"), []).append(sample)
    # The prompts seen most often say most about change.
    chosen = sorted(prompts.items(), key=lambda item: -sum(map(len, item[1].values())))[:MAX_TRAILS]
    rows: list[list[str | Cell]] = []
    for prompt, by_round in chosen:
        for number, samples in sorted(by_round.items()):
            for record in samples if len(samples) == 1 else (samples[0], samples[-1]):
                answer = record.text("response")
                rows.append(
                    [
                        Cell(clip(prompt, TRAIL_LETTERS), record.text("domain")),
                        number,
                        num(record.number("step")),
                        Cell(clip(answer, TRAIL_LETTERS) or "(empty)"),
                        num(record.number("score")),
                    ]
                )
    if not rows:
        return None
    return Table(
        title="First and last answer of each round",
        head=["Prompt", "Round", "Iteration", "Response", "Score"],
        rows=rows,
        source=found.sources("samples.jsonl"),
        numeric=frozenset({1, 2, 4}),
        stacked=True,
    )


def headlines(run: Run) -> list[Headline]:
    found = rounds.load(run)
    finished = [one for one in found.rounds if one.result]
    if not finished:
        return []
    first, last = finished[0].result, finished[-1].result
    searched = [one for one in finished if one.patch]
    hacked = [one for one in searched if one.patch.record("hacking").value.get("observed")]
    reading = (
        f"mean reward, first to last, over {len(finished)} "
        f"round{'s' if len(finished) > 1 else ''}; KL at the end "
        f"{num(last.number('kl_last'), 2)} nats per response"
    )
    if searched:
        reading += f"; reward hacking found after {len(hacked)} of {len(searched)} searched"
    number = f"{num(first.number('reward_first'), 2)} → {num(last.number('reward_last'), 2)}"
    return [Headline("PPO", number, f"{reading}.", "ppo*/result.json", rounds.ROUND)]
