"""The section on evaluation sets found in the documents (`data_beam.contamination.report`)."""

from __future__ import annotations

import dataclasses

from data_beam.inspect import show
from data_beam.inspect.corpus import CONTAMINATION, Corpus
from data_beam.inspect.diff import compare
from data_beam.inspect.funnel import ratio
from internlm2_jax.report.blocks import (
    Block,
    Cell,
    Compare,
    Fold,
    Piece,
    Row,
    Section,
    Table,
    num,
    share,
)
from internlm2_jax.report.load import ABSENT, DONE, Record


def section(corpus: Corpus) -> Section:
    """How much of each set is in how many documents, and examples beside what was found."""
    record = corpus.record(CONTAMINATION)
    sets = record.records("sets")
    if not sets:
        return Section("contamination", "Contamination", ABSENT)
    hit, documents = record.number("documents_hit"), record.number("documents")
    lead = (
        f"{num(hit)} of {num(documents)} documents ({share(ratio(hit, documents))}) hold a run of "
        f"{num(record.number('n'))} words, or a short question whole, of an evaluation set."
    )
    blocks: list[Block] = [_table(sets)]
    blocks += [_samples(row) for row in sets if row.records("samples")]
    return Section("contamination", "Contamination", DONE, lead, blocks)


def _table(sets: list[Record]) -> Table:
    worst = max(sets, key=lambda row: (_part(row) or 0.0, row.text("name")))
    body: list[list[str | Cell]] = []
    for row in sets:
        by_source = sorted(row.numbers("sources").items(), key=lambda item: (-item[1], item[0]))
        body.append([
            row.text("name"), num(row.number("examples")), num(row.number("too_short")),
            num(row.number("examples_hit")), share(_part(row)), num(row.number("documents_hit")),
            num(row.number("answer_hits")),
            ", ".join(f"{name} {num(count)}" for name, count in by_source) or "none",
        ])  # fmt: skip
    if worst.number("examples_hit"):
        title = f"{worst.text('name')} is hit most: {share(_part(worst))} of its examples"
    else:
        title = "No example of any set was found"
    return Table(
        title=title,
        head=["Set", "Examples", "Too short", "Found", "Share", "Documents", "With the answer",
              "In sources"],
        rows=body, source=CONTAMINATION, numeric=frozenset(range(1, 7)),
        note="Too short: examples without a run long enough to look for. Share: found, of all. "
        "With the answer: documents in which the answer stands near the question.",
    )  # fmt: skip


def _part(row: Record) -> float | None:
    return ratio(row.number("examples_hit"), row.number("examples"))


def _samples(row: Record) -> Block:
    pairs: list[Block] = []
    for sample in row.records("samples"):
        document = sample.text("path") or sample.text("url") or sample.text("id")
        found = f"{share(sample.number('example_share'))} of the example"
        pairs.append(
            Compare(
                title=f"{sample.text('example')}: {found} found",
                left=f"Example {sample.text('example')}",
                right=show.visible(f"{document} ({sample.text('source')} · {sample.text('id')})"),
                rows=_shared(
                    _line(f"{sample.text('question')} {sample.text('answer')}"),
                    _line(sample.text("excerpt")),
                ),
                source=CONTAMINATION,
                note="What is marked stands in both.",
            )
        )
    return Fold(f"{row.text('name')}: {len(pairs)} examples beside what was found", pairs)


def _shared(left: str, right: str) -> list[Row]:
    """Two lines with what they have in common marked."""
    rows = []
    for row in compare(left, right):
        if row.same is not None:
            both = [Piece(row.same, True)]
            rows.append(Row(left=both, right=both))
            continue
        sides = (
            [dataclasses.replace(piece, changed=not piece.changed) for piece in side]
            for side in (row.left, row.right)
        )
        rows.append(Row(skipped=row.skipped, left=next(sides), right=next(sides)))
    return rows


def _line(text: str) -> str:
    """One line: the words count here, however they are set."""
    return show.visible(" ".join(text.split()))
