"""The section on copies: how large the clusters are, and copies beside the document that stayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from data_beam.inspect import scan as scanning
from data_beam.inspect import show, signals
from data_beam.inspect.corpus import Corpus
from data_beam.inspect.diff import compare
from data_beam.inspect.funnel import ratio, source_note, words
from data_beam.inspect.scan import Clusters, Member, Scan
from data_beam.schema import Document
from internlm2_jax.report import plots, svg
from internlm2_jax.report.blocks import (
    Block,
    Compare,
    Fold,
    Grid,
    Headline,
    Section,
    Table,
    num,
    share,
)
from internlm2_jax.report.load import ABSENT, DONE

_WHERE = f"attributes/{scanning.DECISION}"
_ROWS = 16  # of a comparison


def section(corpus: Corpus, scan: Scan, clusters: Clusters) -> Section:
    """The clusters of the whole corpus, by what each copy was dropped for."""
    title = "Duplicates"
    if not corpus.is_decided:
        return Section("duplicates", title, ABSENT)
    if not clusters.copies:
        return Section("duplicates", title, DONE, "No document was dropped as a copy.", [])
    copies = sum(clusters.copies.values())
    lead = (
        f"{num(copies)} documents were dropped as copies of {num(len(clusters.copies))} others; "
        f"the largest cluster has {num(max(clusters.copies.values()) + 1)} documents. "
        f"{source_note(corpus)}"
    )
    blocks: list[Block] = [Grid([_sizes(clusters.sizes()), _stages(corpus, scan)])]
    blocks += _similarities(scan)
    documents = _documents(corpus, clusters)
    if clusters.doubtful:
        pairs = [
            _pair(documents[of], documents[member.id], member)
            for of, member in clusters.doubtful
            if of in documents
        ]
        name = f"The {len(pairs)} copies least like their survivor"
        blocks.append(Fold(name, pairs, open=True))
    for of in clusters.members:
        if of in documents:
            blocks.append(_cluster(clusters, of, documents))
    return Section("duplicates", title, DONE, lead, blocks)


def _documents(corpus: Corpus, clusters: Clusters) -> dict[str, Document]:
    """Every document that is shown, by id."""
    members = [member for some in clusters.members.values() for member in some]
    members += [member for _, member in clusters.doubtful]
    survivors = corpus.find([*clusters.members, *(of for of, _ in clusters.doubtful)])
    places = {*survivors.values(), *(member.place for member in members)}
    return {document.id: document for document in corpus.read(sorted(places)).values()}


def _sizes(sizes: Mapping[int, int]) -> Block:
    """Bars over ranges of sizes that double."""
    rows: list[tuple[str, float, str]] = []
    low = 2
    while low <= max(sizes):
        high = low if low < 4 else 2 * low - 1
        count = sum(times for size, times in sizes.items() if low <= size <= high)
        name = num(low) if low == high else f"{num(low)} to {num(high)}"
        rows.append((name, count, num(count)))
        low = high + 1
    return svg.picture(
        title=f"{share(ratio(sizes.get(2, 0), sum(sizes.values())))} of the clusters are pairs",
        alt="Bar chart of clusters by their number of documents: "
        + ", ".join(f"{name}: {text}" for name, _, text in rows),
        source=_WHERE, draw=plots.bar_chart(rows, "clusters with so many documents", colour=2),
        height=50 + 26 * len(rows),
    )  # fmt: skip


def _stages(corpus: Corpus, scan: Scan) -> Table:
    """Copies by stage and source."""
    stages = list(dict.fromkeys(
        rule.stage for some in corpus.rules.values() for rule in some if rule.of is not None
    ))  # fmt: skip
    rows = []
    for stage in stages:
        for source in sorted({source for source, _, _ in scan.outcomes}):
            found = [(key[2], count) for key, count in scan.outcomes.items() if key[0] == source]
            lost = sum(count[0] for name, count in found if name == stage)
            total = sum(count[0] for _, count in found)
            if lost:
                rows.append([words(stage), source, num(lost), share(ratio(lost, total))])
    return Table(
        title="Copies by source", head=["Stage", "Source", "Documents", "Share"], rows=rows,
        source=_WHERE, numeric=frozenset({2, 3}), note="Share: of all documents of the source.",
    )  # fmt: skip


def _similarities(scan: Scan) -> list[Block]:
    """How alike the copies of each source are that are not all equal."""
    pictures: list[Block] = []
    for source, counts in sorted(scan.rules.items()):
        for count in counts:
            counted = list(count.histograms.values())
            if count.rule.of is not None and counted and np.count_nonzero(counted[0].documents) > 1:
                name = f"Copies in {source}: {words(count.rule.reason)}"
                where = f"attributes/{count.rule.signal.partition('.')[0]}"
                pictures.append(dataclasses.replace(signals.histogram(count, where), title=name))
    return [Grid(pictures)] if pictures else []


def _cluster(clusters: Clusters, of: str, documents: Mapping[str, Document]) -> Block:
    members = clusters.members[of]
    pairs = [_pair(documents[of], documents[member.id], member) for member in members]
    count = clusters.copies[of]
    more = f", {len(pairs)} of them shown, the least similar" if count > len(pairs) else ""
    return Fold(f"{num(count + 1)} documents: {show.title(documents[of])}{more}", pairs)


def _pair(survivor: Document, copy: Document, member: Member) -> Block:
    alike = "" if member.value != member.value else f", similarity {num(member.value)}"
    return Compare(
        title=f"{words(member.stage)}{alike}".capitalize(),
        left=f"Kept: {show.title(survivor)} ({show.origin(survivor)})",
        right=f"Dropped: {show.title(copy)} ({show.origin(copy)})",
        rows=compare(show.visible(survivor.text), show.visible(copy.text), _ROWS),
        source=_WHERE,
    )


def headlines(clusters: Clusters, scan: Scan) -> list[Headline]:
    if not clusters.copies:
        return []
    largest = max(clusters.copies.values()) + 1
    part = share(ratio(sum(clusters.copies.values()), scan.documents))
    reading = f"of the documents are copies; the largest cluster has {num(largest)}."
    return [Headline("Copies", part, reading, _WHERE, "duplicates")]
