"""Whether a test set was trained on: losses, deltas with intervals, examples in the corpus."""

from __future__ import annotations

from internlm2_jax.report import svg
from internlm2_jax.report.blocks import Block, Cell, Headline, Section, Table, num, percent
from internlm2_jax.report.intervals import interval_chart
from internlm2_jax.report.load import Record, Run

STAGE = "contamination"
SOURCE = f"{STAGE}/result.json"
_DELTAS = (
    ("delta1", "test − reference", "test_leak", "test set trained on"),
    ("delta2", "test − train", "train_fit", "training set trained on"),
)


def contamination(run: Run) -> Section:
    """The verdicts of evals/contamination.py."""
    result = run.result(STAGE)
    blocks: list[Block] = []
    lead = ""
    if result:
        losses = result.numbers("losses")
        blocks += [
            Table(
                title="Loss, nats per token",
                head=["Train", "Test", "Reference"],
                rows=[[num(losses.get(name)) for name in ("train", "test", "reference")]],
                source=SOURCE,
                numeric=frozenset(range(3)),
            ),
            _chart(result),
        ]
        if overlap := dict(result.record("overlap").items()):
            blocks.append(_overlap(overlap))
        lead = ". ".join(result.strings("summary")) + "."
    return Section(STAGE, "Contamination", run.status(STAGE), lead, blocks)


def _chart(result: Record) -> Block:
    rows = []
    for key, name, _, _ in _DELTAS:
        delta = result.record(key)
        mean, low, high = (delta.number(n) or 0.0 for n in ("mean", "low", "high"))
        rows.append((name, mean, low, high, num(mean, 2)))
    said = ", ".join(f"{name} {written}" for name, *_, written in rows)
    margin = num(result.number("margin"), 2)
    return svg.picture(
        title=f"Differences of losses: {said}",
        alt=f"Differences of mean losses with their intervals: {said}.",
        source=SOURCE,
        draw=interval_chart(rows, "nats per token", shares=False, zero="line"),
        height=70 + 34 * len(rows),
        note=f"Intervals at confidence {result.text('confidence')}. The test set counts as trained "
        f"on when the first lies wholly below −{margin}, the training set when the second lies "
        f"wholly above {margin}.",
    )


def _overlap(overlap: dict[str, Record]) -> Block:
    rows: list[list[str | Cell]] = [
        [name, num(o.number("indexed")), num(o.number("found")), percent(o.number("share")),
         Cell(", ".join(f"{s.text('example')} in {s.text('document')}"
                        for s in o.records("samples")[:3]) or "none")]
        for name, o in overlap.items()
    ]  # fmt: skip
    return Table(
        title="Examples that stand in the corpus, by runs of 13 words or whole short questions",
        head=["Set", "Looked for", "Found", "Share", "For instance"],
        rows=rows,
        source=SOURCE,
        numeric=frozenset({1, 2, 3}),
    )


def headlines(run: Run) -> list[Headline]:
    result = run.result(STAGE)
    if not result:
        return []
    found = [said for _, _, key, said in _DELTAS if result.value.get(key)]
    mean = num(result.record("delta1").number("mean"), 2)
    reading = "nats per token, test − reference: " + (
        "; ".join(found) if found else "no sign of contamination"
    )
    return [Headline("Contamination", mean, f"{reading}.", SOURCE, STAGE)]
