"""Sections on the rules, one a source: each rule's signal, what it drops, what another cut-off
would drop, and documents on either side of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from data_beam.inspect import show
from data_beam.inspect.corpus import Corpus
from data_beam.inspect.funnel import ratio, source_note, words
from data_beam.inspect.scan import RuleCount, Sample, Scan
from data_beam.mix.curves import MAXIMUM, MINIMUM, Direction
from data_beam.mix.rules import Rule
from internlm2_jax.report import plots, svg
from internlm2_jax.report.blocks import (
    Block,
    Cell,
    Fold,
    Grid,
    Headline,
    Picture,
    Section,
    Table,
    num,
    share,
    size,
)
from internlm2_jax.report.load import ABSENT, DONE
from internlm2_jax.report.svg import tick

# Shares of the documents for which the table of other cut-offs has a row.
_SHARES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5)
_MAX_NAMES = 12
_MAX_SOURCES = 8


def sections(corpus: Corpus, scan: Scan) -> list[Section]:
    """One per source, the largest first; of very many sources only the largest."""
    if not any(scan.rules.values()):
        return [Section("rules", "Rules", ABSENT)]
    order = _sources(scan)
    rest = order[_MAX_SOURCES:]
    found = [_section(corpus, scan, source) for source in order[:_MAX_SOURCES]]
    if rest:
        lead = f"The rules of {len(rest)} smaller sources are not drawn: {', '.join(rest[:20])}."
        found.append(Section("rules-others", "Rules: other sources", DONE, lead, []))
    return found


def _sources(scan: Scan) -> list[str]:
    sums: dict[str, int] = {}
    for (source, _, _), (count, _) in scan.outcomes.items():
        sums[source] = sums.get(source, 0) + count
    return sorted((s for s in sums if scan.rules.get(s)), key=lambda s: (-sums[s], s))


def section_id(scan: Scan, source: str) -> str:
    """Sources are named by whoever wrote the input: their names are no ids."""
    return f"rules-{_sources(scan).index(source)}"


def limits(rule: Rule) -> str:
    """What a rule keeps, as a formula."""
    if rule.of is not None:
        return f"{rule.of} is empty"
    if rule.allowed is not None:
        return f"{rule.signal} is one of {', '.join(rule.allowed)}"
    low = f"{tick(rule.minimum)} ≤ " if math.isfinite(rule.minimum) else ""
    high = f" ≤ {tick(rule.maximum)}" if math.isfinite(rule.maximum) else ""
    text = f"{low}{rule.signal}{high}" if low or high else f"any {rule.signal}"
    return text + (f" (only {', '.join(rule.lang)})" if rule.lang else "")


def _section(corpus: Corpus, scan: Scan, source: str) -> Section:
    counts = [count for count in scan.rules[source] if count.of[0]]
    order = [count for count in counts if count.rule.of is None]  # copies have their own section
    order.sort(key=lambda count: (-count.first[0], count.number))
    lead = (
        f"{len(counts)} rules, applied in this order; the first that a document breaks is the "
        f"reason of its drop. {source_note(corpus)}"
    )
    blocks: list[Block] = [_overview(counts)]
    blocks += [_rule(corpus, count, opened=count is order[0]) for count in order]
    return Section(section_id(scan, source), f"Rules: {source}", DONE, lead, blocks)


def _overview(counts: Sequence[RuleCount]) -> Table:
    busiest = max(counts, key=lambda count: count.first[0])
    lost = share(ratio(busiest.first[0], busiest.of[0]))
    body: list[list[str | Cell]] = []
    for count in counts:
        of, of_bytes = count.of
        body.append([
            words(count.rule.reason), words(count.rule.stage), limits(count.rule),
            share(ratio(count.alone[0], of)), share(ratio(count.first[0], of)),
            share(ratio(count.only[0], of)), size(count.first[1]),
            share(ratio(count.first[1], of_bytes)),
        ])  # fmt: skip
    return Table(
        title=f"{words(busiest.rule.reason).capitalize()} drops most: {lost} of the documents",
        head=["Rule", "Stage", "Keeps", "Alone", "First", "Only", "Size, first", "Share of size"],
        rows=body, source="attributes", numeric=frozenset(range(3, 8)),
        note="Alone: documents that break the rule. First: and no earlier one. Only: and no other "
        "one at all, so they would come back without it. Shares are of all documents of the "
        "source that the rule applies to.",
    )  # fmt: skip


def _rule(corpus: Corpus, count: RuleCount, opened: bool) -> Fold:
    rule, where = count.rule, f"attributes/{count.rule.signal.partition('.')[0]}"
    parts = [
        f"{name} {share(ratio(pair[0], count.of[0]))}"
        for name, pair in (("alone", count.alone), ("first", count.first), ("only", count.only))
    ]
    blocks: list[Block] = []
    if count.has_names:
        blocks.append(_names(count, where))
    else:
        blocks.append(Grid(_pictures(count, where)))
    groups: list[tuple[str, Sequence[Sample]]] = []
    shown: set[str] = set()
    for kind, heading in (
        ("dropped near", "just outside the limit"), ("kept near", "just inside the limit"),
        ("dropped", "outside, at random"), ("kept", "inside, at random"),
    ):  # fmt: skip
        some = [sample for sample in count.chosen(kind) if sample.id not in shown]
        shown |= {sample.id for sample in some}
        groups.append((heading, some))
    if shown:
        blocks.append(show.samples(corpus, groups, where))
    return Fold(f"{words(rule.reason)}: {', '.join(parts)}", blocks, opened)


def _names(count: RuleCount, where: str) -> Table:
    allowed = set(count.rule.allowed or ())
    total = sum(count.names.values())
    top = sorted(count.names.items(), key=lambda item: (-item[1], item[0]))
    return Table(
        title=f"{count.rule.signal}: {num(len(count.names))} different values",
        head=["Value", "Documents", "Share", "Allowed"],
        rows=[
            [show.visible(name) or "(none)", num(times), share(ratio(times, total)),
             "yes" if name in allowed or not name else "no"]
            for name, times in top[:_MAX_NAMES]
        ],
        source=where, numeric=frozenset({1, 2}),
        note=f"The {_MAX_NAMES} most frequent." if len(top) > _MAX_NAMES else "",
    )  # fmt: skip


def _pictures(count: RuleCount, where: str) -> list[Block]:
    rule = count.rule
    if count.is_flag:
        return [_flag(count, where)]
    blocks: list[Block] = [histogram(count, where)]
    for direction, cut in ((MINIMUM, rule.minimum), (MAXIMUM, rule.maximum)):
        if math.isfinite(cut):
            blocks.append(_curve(count, direction, cut, where))
            if other := _other_cuts(count, direction, cut, where):
                blocks.append(other)
    return blocks


def _flag(count: RuleCount, where: str) -> Block:
    """Of a column of true and false."""
    counted = next(iter(count.histograms.values()))
    no, yes = counted.documents[1:-1].tolist()
    name = words(count.rule.signal.partition(".")[2])
    return svg.picture(
        title=f"{name.capitalize()}: true for {share(ratio(yes, no + yes))}",
        alt=f"Bar chart: {count.rule.signal} is true for {num(yes)} documents, false for {num(no)}",
        source=where, height=110,
        draw=plots.bar_chart([("false", no, num(no)), ("true", yes, num(yes))], "documents"),
    )  # fmt: skip


def histogram(count: RuleCount, where: str) -> Picture:
    """The values of a rule's signal, its limits marked; for a rule on copies, of the copies."""
    rule, axis = count.rule, count.axis
    counted = next(iter(count.histograms.values()))
    assert axis is not None
    bars = counted.documents[1:-1].copy()
    bars[0] += counted.documents[0]
    bars[-1] += counted.documents[-1]
    beyond = int(counted.documents[0] + counted.documents[-1])
    none = (math.inf, math.inf)  # nothing lies inside: every copy is dropped
    name = words(rule.signal.partition(".")[2])
    notes = [f"{num(beyond)} beyond the ends are in the end bars." if beyond else ""]
    if counted.missing:
        notes.append(f"{num(counted.missing)} documents have no value and pass.")
    middle = num(counted.quantile(0.5))
    return svg.picture(
        title=f"{name.capitalize()}: half lie below {middle}",
        alt=f"Histogram of {rule.signal} over {num(counted.count)} documents. Kept: "
        f"{limits(rule)}. Quantiles 1 %, 25 %, 50 %, 75 %, 99 %: "
        + ", ".join(num(counted.quantile(q)) for q in (0.01, 0.25, 0.5, 0.75, 0.99)),
        source=where, note=" ".join(filter(None, notes)),
        draw=plots.binned(axis.edges, bars, name, "documents",
                          limits=(rule.minimum, rule.maximum) if rule.of is None else none,
                          log=axis.log),
        height=240,
    )  # fmt: skip


def _curve(count: RuleCount, direction: Direction, cut: float, where: str) -> Block:
    assert count.axis is not None
    curve = count.histograms[direction].curve()
    documents, num_bytes = curve.at(cut)
    end = "Lower" if direction == MINIMUM else "Upper"
    shares = f"{share(documents)} of documents, {share(num_bytes)} of bytes"
    name = words(count.rule.signal.partition(".")[2])
    return svg.picture(
        title=f"{end} cut-off {tick(cut)} drops {shares}",
        alt=f"Share of documents and bytes that other cut-offs of {count.rule.signal} would drop: "
        + "; ".join(f"{tick(float(curve.thresholds[i]))}: {share(float(curve.documents[i]))}"
                    for i in np.linspace(0, len(curve.thresholds) - 1, 7).round().astype(int)),
        source=where,
        draw=plots.share_curves(
            curve.thresholds,
            [plots.Shares("documents", curve.documents),
             plots.Shares("bytes", curve.bytes, dashed=True)],
            f"{'lower' if direction == MINIMUM else 'upper'} cut-off, {name}", "dropped",
            cut=cut, log=count.axis.log, small=True,
        ),
        height=240,
    )  # fmt: skip


def _other_cuts(count: RuleCount, direction: Direction, cut: float, where: str) -> Table | None:
    """The strictest of the known cut-offs that drop no more than a round share."""
    curve = count.histograms[direction].curve()
    order = np.argsort(curve.documents, kind="stable")
    rows: dict[float, list[str | Cell]] = {}
    for limit in _SHARES:
        place = int(np.searchsorted(curve.documents[order], limit, side="right")) - 1
        if place < 0 or curve.documents[order[place]] < limit / 5:
            continue
        at = order[place]
        threshold = float(curve.thresholds[at])
        if count.is_whole:  # the whole number that does the same
            threshold = math.ceil(threshold) if direction == MINIMUM else math.floor(threshold)
        rows.setdefault(threshold, [
            tick(threshold), share(float(curve.documents[at])), share(float(curve.bytes[at])),
        ])  # fmt: skip
    if len(rows) < 2:
        return None
    now = curve.at(cut)
    rows[cut] = [f"{tick(cut)} (now)", share(now[0]), share(now[1])]
    return Table(
        title="What other cut-offs would drop", head=["Cut-off", "Documents", "Bytes"],
        rows=[row for _, row in sorted(rows.items())], source=where, numeric=frozenset({0, 1, 2}),
    )  # fmt: skip


def headlines(scan: Scan) -> list[Headline]:
    counts = [count for some in scan.rules.values() for count in some if count.of[0]]
    if not counts:
        return []
    busiest = max(counts, key=lambda count: count.first[0])
    reading = f"of {busiest.source} fall to its rule {words(busiest.rule.reason)} first."
    part = share(ratio(busiest.first[0], busiest.of[0]))
    where = section_id(scan, busiest.source)
    return [Headline("Busiest rule", part, reading, "attributes", where)]
