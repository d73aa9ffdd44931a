"""One page about any set of evaluated models: scores, tests, and the items on which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internlm2_jax import files
from internlm2_jax.evals import comparison
from internlm2_jax.evals.comparison import Compared
from internlm2_jax.report import plots, svg
from internlm2_jax.report.blocks import (
    DASH,
    Block,
    Cell,
    Fold,
    Headline,
    Section,
    Table,
    clip,
    num,
    percent,
    pretty,
)
from internlm2_jax.report.load import DONE
from internlm2_jax.report.page import layout

DRILLED = 30  # items of a suite that are shown whole
LISTED = 400  # items of a suite that are listed
SOURCE = "*/totals.json, */items.jsonl"


def build(folders: Sequence[Path], out: Path) -> tuple[Path, Path]:
    """Writes the page to `out` and the same as JSON beside it; gives both paths.

    Errors: UserError when a folder has no finished evaluation, or a file in it is damaged.
    """
    compared = comparison.find(folders)
    data = out.with_suffix(".json")
    files.write_json(data, comparison.plain(compared))
    files.atomic_write(out, render(compared))
    return out, data


def render(compared: Sequence[Compared]) -> str:
    """The page as text."""
    models = list(dict.fromkeys(r.model for c in compared for r in c.results))
    return layout(
        name=" · ".join(models),
        kind="leaderboard",
        about=f"{len(models)} {'model' if len(models) == 1 else 'models'} on {len(compared)} "
        "suites, made from what internlm2 evaluate has left.",
        headlines=[_headline(c) for c in compared],
        sections=[_overview(compared, models), *(_suite(c) for c in compared)],
    )


def _headline(c: Compared) -> Headline:
    ranked = sorted(c.results, key=lambda r: -(r.totals["score"] or 0))
    best = ranked[0]
    if best.totals["score"] is None:
        return Headline(c.suite, DASH, "answered, not graded.", SOURCE, c.suite)
    reading = f"{best.model}, {best.totals['graded']} items"
    for a, b, test in c.pairs:
        if len(ranked) > 1 and {a, b} == {best.model, ranked[1].model}:
            reading += f"; p = {num(test.p, 2)} against {ranked[1].model}"
    number = percent(best.totals["score"])
    return Headline(c.suite, number, f"{reading}.", SOURCE, c.suite)


# ------------------------------------------------------------------------------ all suites


def _overview(compared: Sequence[Compared], models: list[str]) -> Section:
    dots, rows = [], []
    for c in compared:
        scores = {r.model: r.totals for r in c.results if r.totals["score"] is not None}
        best = max((t["score"] for t in scores.values()), default=None)
        if scores:
            dots.append((c.suite, [(m, scores[m]["score"]) for m in models if m in scores]))
        cells = [_score(scores.get(m), best if len(scores) > 1 else None) for m in models]
        rows.append([c.suite, pretty(c.dimension), *cells])
    blocks: list[Block] = []
    if dots:
        height = 90 + 28 * len(dots) + 16 * (len(models) // 3)
        blocks.append(
            svg.picture(
                title="Score of every model on every suite",
                alt="Dot chart of scores, a row a suite; exact numbers in the table below.",
                source=SOURCE, draw=plots.dot_chart(dots, "score"), height=height, wide=height,
                note="The number at the right is the last model's.",
            )
        )  # fmt: skip
    blocks.append(
        Table(
            title="Scores", head=["Suite", "Dimension", *models], rows=rows, source=SOURCE,
            numeric=frozenset(range(2, 2 + len(models))),
            note="In small letters the 95% bootstrap interval over items; ▲ the best of a row.",
        )
    )  # fmt: skip
    return Section("scores", "Scores", DONE, "", blocks)


def _score(totals: dict[str, Any] | None, best: float | None) -> str | Cell:
    if totals is None:
        return DASH
    low, high = totals["interval"]
    mark = "▲ " if totals["score"] == best else ""
    return Cell(f"{mark}{_exact(totals['score'])}", f"{_exact(low)} to {_exact(high)}")


def _exact(score: float) -> str:
    return f"{100 * score:.1f} %"


# ------------------------------------------------------------------------------ one suite


def _suite(c: Compared) -> Section:
    blocks: list[Block] = [_totals(c)]
    if c.pairs:
        blocks.append(_tests(c))
    if (groups := _groups(c)) is not None:
        blocks.append(Fold("Scores by group", [groups]))
    shown = c.differ if len(c.results) > 1 else list(c.results[0].lines)
    if shown:
        kind = "Items on which models differ" if len(c.results) > 1 else "Items"
        more = f", {DRILLED} of {len(shown)}" if len(shown) > DRILLED else f", {len(shown)}"
        folds: list[Block] = [_item(c, key) for key in shown[:DRILLED]]
        blocks.append(Fold(f"{kind}{more}", folds, open=len(c.results) > 1))
    blocks.append(Fold("All items", [_all(c)]))
    lead = "".join(f"{w[:1].upper()}{w[1:]}. " for w in c.warnings)
    return Section(c.suite, c.suite, DONE, lead.strip(), blocks)


def _totals(c: Compared) -> Table:
    extra = [k for k in ("macro", "majority") if any(k in r.totals for r in c.results)]
    names = {"macro": "Mean of groups", "majority": "Majority"}
    passes = dict.fromkeys(k for r in c.results for k in r.totals.get("pass_at_k", {}))
    noted = {"cut": "prompts cut", "unfinished": "unfinished", "timeouts": "timeouts",
             "infrastructure": "not graded", "inconsistent": "changed with the order"}  # fmt: skip
    rows = []
    for r in c.results:
        t = r.totals
        notes = [f"{t[k]} {said}" for k, said in noted.items() if t.get(k)]
        score = DASH if t["score"] is None else _score(t, None)
        rows.append(
            [
                r.model, score, *(_exact(t[k]) if k in t else DASH for k in extra),
                *(_rate(t.get("pass_at_k", {}).get(k)) for k in passes),
                f"{t['graded']:,} of {t['items']:,}", f"{t['shots']} shots, {t['method']}",
                ", ".join(notes) or DASH,
            ]
        )  # fmt: skip
    head = ["Model", "Score", *(names[k] for k in extra), *(f"pass@{k}" for k in passes),
            "Graded", "Asked", "Noted"]  # fmt: skip
    last = 2 + len(extra) + len(passes)
    return Table(
        title="Totals", head=head, rows=rows, source=SOURCE, numeric=frozenset(range(1, last + 1))
    )


def _rate(value: float | None) -> str:
    return DASH if value is None else _exact(value)


def _tests(c: Compared) -> Table:
    rows: list[list[str | Cell]] = [
        [
            f"{b} − {a}", Cell(_points(t.difference), f"{_points(t.low)} to {_points(t.high)}"),
            num(t.p, 2), str(t.better), str(t.worse), f"{t.items:,}",
        ]
        for a, b, t in c.pairs
    ]  # fmt: skip
    return Table(
        title="Paired differences",
        head=["Models", "Difference, points", "p", "Better on", "Worse on", "Items"],
        rows=rows, source=SOURCE, numeric=frozenset(range(1, 6)),
        note="p is two-sided: McNemar's exact test, or random signs where scores are shares; it is "
        "not corrected for the number of comparisons.",
    )  # fmt: skip


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _groups(c: Compared) -> Table | None:
    names = dict.fromkeys(g for r in c.results for g in r.totals.get("groups", {}))
    if not names:
        return None
    rows = []
    for name in names:
        found = [r.totals.get("groups", {}).get(name) for r in c.results]
        count = next(g["items"] for g in found if g)
        rows.append([pretty(name), str(count), *(_exact(g["score"]) if g else DASH for g in found)])
    return Table(
        title="Groups", head=["Group", "Items", *(r.model for r in c.results)], rows=rows,
        source=SOURCE, numeric=frozenset(range(1, 2 + len(c.results))),
    )  # fmt: skip


def _item(c: Compared, key: str) -> Fold:
    """One item whole: how it was asked, what is right, what each model said."""
    mine = [(r, r.lines[key]) for r in c.results if key in r.lines]
    line = mine[0][1]
    rows: list[list[str | Cell]] = [
        ["asked", Cell(clip(line["question"], 2400))],
        ["right", Cell(clip(" | ".join(line["answers"]) or DASH, 300), mono=True)],
    ]
    rows += [
        [Cell(r.model, _mark(found)), Cell(said(found), _why(found), mono=True)]
        for r, found in mine
    ]
    marks = " · ".join(f"{r.model} {_mark(found)}" for r, found in mine)
    return Fold(
        f"{key}: {marks}",
        [
            Table(
                title="Answers", head=["Who", "What"], stacked=True, rows=rows,
                source=Path(line["where"]).name,
            )
        ],
    )  # fmt: skip


def said(line: dict[str, Any], length: int = 1200) -> str:
    """What a model answered to an item, whatever the method."""
    if "outputs" in line:
        texts = [o["text"].strip() or "(nothing)" for o in line["outputs"]]
        shown = texts if len(texts) == 1 else [f"{i}. {t}" for i, t in enumerate(texts, 1)]
        return clip("\n\n".join(clip(t, length // min(len(shown), 4)) for t in shown), 2 * length)
    if "steps" in line:
        return clip("\n\n".join(f"{s['code'] or s['text']}\n{s['output']}" for s in line["steps"]))
    logprobs = line["logprobs"]
    if isinstance(line["said"], list):
        return f"{line['said'][0]}, and with the answers swapped {line['said'][1]}"
    nats = ", ".join(f"{chr(65 + i)} {p:.3f}" for i, p in enumerate(logprobs))
    return f"{line['said']} ({nats} nats)"


def _why(line: dict[str, Any]) -> str:
    details = dict.fromkeys(o["detail"] for o in line.get("outputs", ()) if o["detail"])
    return clip("; ".join(details), 200)


def _mark(line: dict[str, Any]) -> str:
    score = line["score"]
    if score is None:
        return DASH
    return {0.0: "✗", 1.0: "✓"}.get(score, percent(score))


def _all(c: Compared) -> Table:
    keys = list(dict.fromkeys(key for r in c.results for key in r.lines))
    rows: list[list[str | Cell]] = [
        [
            Cell(key, mono=True),
            *(_mark(r.lines[key]) if key in r.lines else DASH for r in c.results),
        ]
        for key in keys[:LISTED]
    ]
    left = len(keys) - LISTED
    note = f"{left:,} more are in items.jsonl." if left > 0 else ""
    return Table(
        title="Items", head=["Item", *(r.model for r in c.results)], rows=rows, source=SOURCE,
        numeric=frozenset(range(1, 1 + len(c.results))), note=note,
    )  # fmt: skip
