"""The section on dead letters: what could not be read, why, and what it looked like."""

from __future__ import annotations

from data_beam.inspect import show
from data_beam.inspect.corpus import Corpus
from data_beam.inspect.funnel import ratio, words
from data_beam.schema import DeadLetter, hash63
from internlm2_jax.report.blocks import (
    Block,
    Cell,
    Fold,
    Headline,
    Section,
    Table,
    num,
    share,
    size,
)
from internlm2_jax.report.load import DONE

_EXAMPLES = 5  # per reason
_WHERE = "dead_letters"


def section(corpus: Corpus) -> Section:
    """Counts of all; of every reason a few examples, chosen by a hash of where they were found."""
    counts = corpus.dead_counts()
    total = sum(count for count, _ in counts.values())
    read = sum(corpus.documents.counts)
    if not total:
        return Section("dead-letters", "Dead letters", DONE, "Every record could be read.", [])
    lead = (
        f"{num(total)} records ({share(ratio(total, total + read))} of all) gave no document. "
        "None is lost silently: each stands in the dead letters with its place and reason."
    )
    rows = sorted(counts.items(), key=lambda item: (-item[1][0], item[0]))
    table = Table(
        title=f"Most often: {words(rows[0][0][1])}",
        head=["Reason", "Source", "Records", "Share of all", "Size"],
        rows=[
            [words(reason), source, num(count), share(ratio(count, total + read)), size(num_bytes)]
            for (source, reason), (count, num_bytes) in rows
        ],
        source=_WHERE, numeric=frozenset({2, 3, 4}),
        note="Share: of the dead letters and documents together. Size: of the input, where known.",
    )  # fmt: skip
    blocks: list[Block] = [table]
    for reason, letters in _examples(corpus).items():
        blocks.append(Fold(f"{words(reason)}: {len(letters)} examples", [_table(letters)]))
    return Section("dead-letters", "Dead letters", DONE, lead, blocks)


def _examples(corpus: Corpus) -> dict[str, list[DeadLetter]]:
    best: dict[str, list[tuple[int, DeadLetter]]] = {}
    for letter in corpus.dead_letters(corpus.shards):
        some = best.setdefault(letter.reason, [])
        some.append((hash63(letter.where, purpose="letters"), letter))
        some.sort()
        del some[_EXAMPLES:]
    return {reason: [letter for _, letter in some] for reason, some in sorted(best.items())}


def _table(letters: list[DeadLetter]) -> Table:
    return Table(
        title="Where, and what was there", head=["Where", "Beginning"],
        rows=[
            [
                Cell(show.visible(letter.where),
                     show.visible(" · ".join(filter(None, (
                         letter.source, size(letter.num_bytes), letter.detail))))),
                Cell(show.visible(letter.head) or "(nothing)", mono=True),
            ]
            for letter in letters
        ],
        source=_WHERE, stacked=True,
    )  # fmt: skip


def headlines(corpus: Corpus) -> list[Headline]:
    count = sum(number for number, _ in corpus.dead_counts().values())
    part = ratio(count, count + sum(corpus.documents.counts))
    reading = f"of the records gave no document: {num(count)}."
    return [Headline("Dead letters", share(part), reading, _WHERE, "dead-letters")]
