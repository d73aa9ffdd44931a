"""Sections on what went in and what is left: overall, by source, by language."""

from __future__ import annotations

from collections.abc import Sequence

from data_beam.code import grades
from data_beam.inspect.corpus import FUNNEL, MANIFEST, Corpus
from data_beam.inspect.scan import KEPT, Scan
from data_beam.mix.rules import merged
from internlm2_jax.report import plots, svg
from internlm2_jax.report.blocks import (
    DASH,
    Block,
    Cell,
    Grid,
    Headline,
    Section,
    Table,
    num,
    share,
    size,
)
from internlm2_jax.report.load import ABSENT, DONE, Record

_MAX_LANGUAGES = 25
_TOKENS = "tokens/manifest.json"
_GRADE = "grade"


def words(name: str) -> str:
    """A name of a stage or reason as the page prints it."""
    return name.replace("_", " ")


def ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def stages_of(record: Record) -> list[Record]:
    """The stages that judge documents; those that choose files to read are not losses."""
    return [stage for stage in record.records("stages") if stage.text("unit") != "file"]


def source_note(corpus: Corpus) -> str:
    """What the counts of a scan stand for."""
    if not corpus.is_sampled:
        return ""
    return (
        f"Counted over {num(len(corpus.shards))} of {num(corpus.documents.shards)} shards, "
        "a random sample of the documents."
    )


# --- overall ----------------------------------------------------------------------------------


def funnel(corpus: Corpus) -> Section:
    """What is left after each stage, and what was dropped for which reason."""
    stages = stages_of(corpus.record(FUNNEL))
    if not stages:
        return Section("funnel", "Funnel", ABSENT)
    lead = (
        f"{num(_sum(corpus, 'input_documents'))} documents ({size(_sum(corpus, 'input_bytes'))}) "
        f"were read; {num(_sum(corpus, 'kept_documents'))} ({size(_sum(corpus, 'kept_bytes'))}) "
        "are kept."
    )
    if corpus.outdated():
        lead += (
            f" The decision is older than the attributes {', '.join(corpus.outdated())}: run the "
            "pipeline again to apply the rules to their new values."
        )
    kept = {unit: ratio(_sum(corpus, f"kept_{unit}"), _sum(corpus, f"input_{unit}"))
            for unit in ("documents", "bytes")}  # fmt: skip
    blocks: list[Block] = [Grid([_bars(stages, unit, part) for unit, part in kept.items()])]
    drops = _drops(stages)
    if drops:
        blocks.append(drops)
    return Section("funnel", "Funnel", DONE, lead, blocks)


def _sum(corpus: Corpus, key: str) -> float:
    """A count over all sources."""
    return sum(row.number(key) or 0.0 for _, row in corpus.record(FUNNEL).record("sources").items())


def _bars(stages: Sequence[Record], unit: str, kept: float | None) -> Block:
    write = size if unit == "bytes" else num
    first = stages[0].number(f"{unit}_in") or 0.0
    counts = [("input", first)]
    counts += [(words(row.text("stage")), row.number(f"{unit}_out") or 0.0) for row in stages]
    rows = [(name, 100 * (ratio(count, first) or 0), write(count)) for name, count in counts]
    return svg.picture(
        title=f"{share(kept)} of the {unit} are kept",
        alt=f"Bar chart of {unit} left after each stage: "
        + ", ".join(f"{name} {text}" for name, _, text in rows),
        source=FUNNEL, draw=plots.bar_chart(rows, f"% of the {unit} left after the stage"),
        height=50 + 26 * len(rows),
    )  # fmt: skip


def _drops(stages: Sequence[Record]) -> Table | None:
    rows: list[tuple[str, str, float, float | None, float | None, float | None]] = []
    for stage in stages:
        came, came_bytes = stage.number("documents_in"), stage.number("bytes_in")
        for reason, dropped in stage.record("dropped").items():
            count, lost = dropped.number("documents") or 0.0, dropped.number("bytes")
            shares = ratio(count, came), ratio(lost, came_bytes)
            rows.append((stage.text("stage"), reason, count, lost, *shares))
    rows.sort(key=lambda row: (-row[2], row[0], row[1]))
    if not rows:
        return None
    return Table(
        title=f"Most documents were dropped for: {words(rows[0][1])}",
        head=["Reason", "Stage", "Documents", "Share", "Size", "Share of size"],
        rows=[
            [words(reason), words(stage), num(count), share(part), size(lost), share(of_bytes)]
            for stage, reason, count, lost, part, of_bytes in rows
        ],
        source=FUNNEL, numeric=frozenset({2, 3, 4, 5}),
        note="Shares are of what came into the stage.",
    )  # fmt: skip


# --- sources ----------------------------------------------------------------------------------


def sources(corpus: Corpus, scan: Scan) -> Section:
    """Shares of the mixture as in Table 1 of the InternLM2 report, removal by stage, lengths."""
    record = corpus.record(FUNNEL).record("sources")
    blocks: list[Block] = []
    if record:
        blocks += [_table_1(record), *_removal(record)]
    blocks += [table for table in (_grades(corpus), _divided(corpus, set(record.value))) if table]
    blocks.append(_lengths(corpus, scan))
    tokens = _tokens(corpus)
    if tokens:
        blocks.append(tokens)
    return Section("sources", "Sources", DONE, "", blocks)


def _table_1(record: Record) -> Table:
    rows = [(name, row) for name, row in record.items()]
    total = sum(row.number("kept_bytes") or 0.0 for _, row in rows)
    documents = sum(row.number("kept_documents") or 0.0 for _, row in rows)
    rows.sort(key=lambda item: (-(item[1].number("kept_bytes") or 0.0), item[0]))
    body: list[list[str | Cell]] = [
        [
            name, num(row.number("kept_documents")), size(row.number("kept_bytes")),
            share(ratio(row.number("kept_bytes"), total)),
            share(ratio(row.number("kept_documents"), row.number("input_documents"))),
            share(ratio(row.number("kept_bytes"), row.number("input_bytes"))),
        ]
        for name, row in rows
    ]  # fmt: skip
    body.append(["Together", num(documents), size(total), share(1.0), "", ""])
    biggest = rows[0][0] if rows else ""
    return Table(
        title=f"{biggest} is {share(ratio(rows[0][1].number('kept_bytes'), total))} of the corpus",
        head=["Source", "Documents", "Size", "Share of size", "Documents kept", "Size kept"],
        rows=body, source=FUNNEL, numeric=frozenset(range(1, 6)),
        note="The first columns are those of Table 1 of the InternLM2 report; the last two are "
        "the part of the source's input that is kept.",
    )  # fmt: skip


def _removal(record: Record) -> list[Table]:
    """Per source and stage, the share of what came into the stage that it removed."""
    order = merged(
        [stage.text("stage") for stage in stages_of(source)] for _, source in record.items()
    )
    body: list[list[str | Cell]] = []
    for name, source in record.items():
        by_name = {stage.text("stage"): stage for stage in stages_of(source)}
        row: list[str | Cell] = [name]
        for stage_name in order:
            stage = by_name.get(stage_name)
            if stage is None:
                row.append(DASH)
                continue
            lost = [
                1 - out if (out := ratio(stage.number(f"{unit}_out"), stage.number(f"{unit}_in")))
                is not None else None
                for unit in ("documents", "bytes")
            ]  # fmt: skip
            row.append(Cell(share(lost[0]), f"{share(lost[1])} of size"))
        body.append(row)
    if not order:
        return []
    return [
        Table(
            title="What each stage removes of each source",
            head=["Source", *map(words, order)],
            rows=body, source=FUNNEL, numeric=frozenset(range(1, len(order) + 1)),
            note="Documents, under them size, of what came into the stage.",
        )
    ]  # fmt: skip


def _grades(corpus: Corpus) -> Table | None:
    """Programs by grade, as in Table 2 of the InternLM2 report."""
    manifest = Record(corpus.attributes.get(_GRADE, {}), "attributes/grade/manifest.json")
    sums = {name: [0.0, 0.0] for name in grades.EPOCHS}
    for row in manifest.records("shards"):
        for name, entry in sums.items():
            found = row.record("grades").record(name)
            entry[0] += found.number("files") or 0.0
            entry[1] += found.number("bytes") or 0.0
    total = sum(entry[1] for entry in sums.values())
    if not total:
        return None
    used = {0: "dropped", 1: "once"}
    by_model = [lang for lang, cut in manifest.record("cuts").items()
                if cut.text("scorer") == grades.BY_MODEL]  # fmt: skip
    how = f"by a model in {', '.join(by_model)}, by rules elsewhere" if by_model else "by rules"
    return Table(
        title="Grades of code", head=["Grade", "Files", "Size", "Share", "In the report", "Used"],
        rows=[
            [name, num(sums[name][0]), size(sums[name][1]), share(ratio(sums[name][1], total)),
             share(aimed), used.get(times, f"{times} times")]
            for (name, times), aimed in zip(
                grades.EPOCHS.items(), grades.REPORT_SHARES, strict=True)
        ],
        source=manifest.source, numeric=frozenset({1, 2, 3, 4}),
        note=f"Programs that no other rule drops, graded {how}.",
    )  # fmt: skip


def _divided(corpus: Corpus, known: set[str]) -> Table | None:
    """The corpus by the names its files carry, where the mix divided a source by grade."""
    sums: dict[str, list[float]] = {}
    for row in corpus.record(MANIFEST).records("shards"):
        entry = sums.setdefault(row.text("source"), [0.0, 0.0])
        entry[0] += row.number("documents") or 0.0
        entry[1] += row.number("bytes") or 0.0
    if not set(sums) - known:
        return None
    total = sum(entry[1] for entry in sums.values())
    return Table(
        title="The sources that the mix divided",
        head=["Source in the corpus", "Documents", "Size", "Share of size"],
        rows=[[name, num(entry[0]), size(entry[1]), share(ratio(entry[1], total))]
              for name, entry in sorted(sums.items())],
        source=MANIFEST, numeric=frozenset({1, 2, 3}),
    )  # fmt: skip


def _lengths(corpus: Corpus, scan: Scan) -> Table:
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    body: list[list[str | Cell]] = []
    for source, kept in sorted(scan.lengths, key=lambda key: (key[0], not key[1])):
        lengths = scan.lengths[source, kept]
        if lengths.count:
            what = ("kept" if kept else "dropped") if corpus.is_decided else "all"
            mean = float(lengths.weights.sum()) / lengths.count
            body.append([
                f"{source}, {what}", num(lengths.count), size(mean),
                *(size(round(lengths.quantile(q))) for q in quantiles),
            ])  # fmt: skip
    return Table(
        title="How long documents are",
        head=["Source", "Documents", "Mean", *(f"{100 * q:g} %" for q in quantiles)],
        rows=body, source="attributes/facts", numeric=frozenset(range(1, 3 + len(quantiles))),
        note=f"UTF-8 bytes below which that share of the documents lies, to within 1 %. "
        f"{source_note(corpus)}",
    )  # fmt: skip


def _tokens(corpus: Corpus) -> Table | None:
    """Tokens per split and source, when the corpus was tokenized into the same folder."""
    record = corpus.record(_TOKENS)
    rows: list[list[str | Cell]] = []
    for split, by_source in record.record("splits").items():
        for source, row in by_source.items():
            tokens, num_bytes = row.number("tokens"), row.number("bytes")
            rows.append([
                f"{source}, {split}", num(row.number("documents")), num(tokens),
                num(ratio(num_bytes, tokens)),
            ])  # fmt: skip
    if not rows:
        return None
    return Table(
        title="Tokens", head=["Source", "Documents", "Tokens", "Bytes a token"],
        rows=rows, source=_TOKENS, numeric=frozenset({1, 2, 3}),
    )  # fmt: skip


# --- languages --------------------------------------------------------------------------------


def languages(corpus: Corpus, scan: Scan) -> Section:
    """What came in and what is kept in each language, and what removed the rest."""
    sums: dict[str, dict[str, tuple[int, int]]] = {}
    for (_, lang, stage), count in scan.outcomes.items():
        entry = sums.setdefault(lang or "und", {})
        before = entry.get(stage, (0, 0))
        entry[stage] = (before[0] + count[0], before[1] + count[1])
    order = sorted(sums, key=lambda lang: (-_total(sums[lang])[0], lang))
    if len(order) > _MAX_LANGUAGES:
        rest: dict[str, tuple[int, int]] = {}
        for lang in order[_MAX_LANGUAGES:]:
            for stage, count in sums[lang].items():
                before = rest.get(stage, (0, 0))
                rest[stage] = (before[0] + count[0], before[1] + count[1])
        name = f"{len(order) - _MAX_LANGUAGES} others"
        sums[name] = rest
        order = [*order[:_MAX_LANGUAGES], name]
    where = f"attributes/{corpus.lang.partition('.')[0]}"
    total = sum(_total(sums[lang])[1] for lang in order)
    kept_total = sum(sums[lang].get(KEPT, (0, 0))[1] for lang in order)
    body: list[list[str | Cell]] = []
    for lang in order:
        documents, num_bytes = _total(sums[lang])
        kept = sums[lang].get(KEPT, (0, 0))
        body.append([
            lang, num(documents), size(num_bytes), share(ratio(num_bytes, total)),
            share(ratio(kept[0], documents)), size(kept[1]), share(ratio(kept[1], kept_total)),
        ])  # fmt: skip
    blocks: list[Block] = [
        Table(
            title=f"{len(sums)} languages; {order[0]} is the largest" if order else "No documents",
            head=["Language", "Documents", "Size", "Share", "Documents kept", "Size kept",
                  "Share of corpus"],
            rows=body, source=where, numeric=frozenset(range(1, 7)), note=source_note(corpus),
        )
    ]  # fmt: skip
    if corpus.is_decided:
        blocks.append(_by_stage(corpus, sums, order, where))
    return Section("languages", "Languages", DONE, "", blocks)


def _total(entry: dict[str, tuple[int, int]]) -> tuple[int, int]:
    return sum(count for count, _ in entry.values()), sum(size for _, size in entry.values())


def _by_stage(
    corpus: Corpus, sums: dict[str, dict[str, tuple[int, int]]], order: Sequence[str], where: str
) -> Table:
    stages = merged([rule.stage for rule in some] for some in corpus.rules.values())
    body: list[list[str | Cell]] = []
    for lang in order:
        left = _total(sums[lang])[0]
        row: list[str | Cell] = [lang]
        for stage in stages:
            lost = sums[lang].get(stage, (0, 0))[0]
            row.append(share(ratio(lost, left)))
            left -= lost
        body.append(row)
    return Table(
        title="What each stage removes of each language", head=["Language", *map(words, stages)],
        rows=body, source=where, numeric=frozenset(range(1, len(stages) + 1)),
        note=f"Share of the documents that came into the stage. {source_note(corpus)}",
    )  # fmt: skip


def _lost_bytes(stage: Record) -> float:
    return (stage.number("bytes_in") or 0.0) - (stage.number("bytes_out") or 0.0)


def headlines(corpus: Corpus) -> list[Headline]:
    """The handful of numbers that sum the corpus up."""
    rows: list[Headline] = []
    stages = stages_of(corpus.record(FUNNEL))
    if stages:
        kept, total = _sum(corpus, "kept_bytes"), _sum(corpus, "input_bytes")
        part = ratio(kept, total)
        reading = (
            f"of {size(total)} read are kept: {size(kept)} in "
            f"{num(_sum(corpus, 'kept_documents'))} documents."
        )
        rows.append(Headline("Kept", share(part), reading, FUNNEL, "funnel"))
        worst = max(stages, key=_lost_bytes)
        lost = ratio(_lost_bytes(worst), worst.number("bytes_in"))
        reading = f"of its bytes go in the stage {words(worst.text('stage'))}, the most of all."
        rows.append(Headline("Greatest loss", share(lost), reading, FUNNEL, "funnel"))
    return rows
