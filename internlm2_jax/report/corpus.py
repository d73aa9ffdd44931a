"""Sections on the corpus and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from internlm2_jax.report import plots, svg
from internlm2_jax.report.blocks import (
    DASH,
    Block,
    Cell,
    Fold,
    Grid,
    Headline,
    Pieces,
    Section,
    Table,
    clip,
    megabytes,
    num,
    percent,
    pretty,
)  # fmt: skip
from internlm2_jax.report.load import Record, Run

FUNNEL, SAMPLES = "corpus/corpus/funnel.json", "corpus/corpus/samples.json"
INSTRUCTIONS = "instructions/result.json"
TOKENIZER = "tokenizer/result.json"
MAX_SAMPLES, SAMPLE_LETTERS = 40, 400


def corpus(run: Run) -> Section:
    """What went into the corpus, what each stage dropped and why."""
    funnel = run.record(FUNNEL)
    stages = _cleaning(funnel)
    blocks: list[Block] = []
    lead = ""
    if stages:
        first, last = stages[0], stages[-1]
        lead = (
            f"{num(first.number('documents_in'))} documents "
            f"({megabytes(first.number('bytes_in'))}) were read; "
            f"{num(last.number('documents_out'))} ({megabytes(last.number('bytes_out'))}) are left."
            f"{_selection(funnel)}"
        )
        blocks += [Grid([_funnel(stages, "documents"), _funnel(stages, "bytes")])]
    drops = _drops(stages)
    if drops:
        blocks.append(drops)
    sources = _sources(funnel)
    if sources:
        blocks.append(sources)
    samples = list(_samples(run.json(SAMPLES)))
    if samples:
        table = Table(
            title="Documents to judge the rules by",
            head=["What became of it", "Text"],
            rows=[[label, Cell(clip(text, SAMPLE_LETTERS))] for label, text in samples],
            source=SAMPLES, stacked=True,
        )  # fmt: skip
        blocks.append(Fold(f"{len(samples)} sample documents, kept and dropped", [table]))
    return Section("corpus", "Corpus", run.status("corpus"), lead, blocks)


def _cleaning(funnel: Record) -> list[Record]:
    """The stages that judge documents; those that choose files to read are not losses."""
    return [stage for stage in funnel.records("stages") if stage.text("unit") != "file"]


def _selection(funnel: Record) -> str:
    """How many of the files at hand were read at all, when a budget left some out."""
    for stage in funnel.records("stages"):
        found, chosen = stage.number("documents_in"), stage.number("documents_out")
        if stage.text("unit") == "file" and found and chosen is not None and chosen < found:
            return f" The byte budget let in {num(chosen)} of the {num(found)} files found."
    return ""


def _funnel(stages: list[Record], unit: str) -> Block:
    """Bars of what is left after each stage, from the raw input down."""
    scale, name, write = (1e6, "MB", megabytes) if unit == "bytes" else (1, "documents", num)
    first = stages[0].number(f"{unit}_in") or 0.0
    counts = [("input", first)]
    counts += [
        (stage.text("stage").replace("_", " "), stage.number(f"{unit}_out") or 0.0)
        for stage in stages
    ]
    kept = counts[-1][1] / first if first else None
    rows = [(label, count / scale, write(count)) for label, count in counts]
    return svg.picture(
        title=f"{percent(kept)} of the {'bytes' if unit == 'bytes' else 'documents'} survive",
        alt=f"Bar chart of {name} left after each stage: "
        + ", ".join(f"{label} {text}" for label, _, text in rows),
        source=FUNNEL, draw=plots.bar_chart(rows, f"{name} left after the stage"),
        height=50 + 26 * len(rows),
    )  # fmt: skip


def _drops(stages: list[Record]) -> Table | None:
    rows = []
    for stage in stages:
        documents_in = stage.number("documents_in")
        for reason, dropped in stage.record("dropped").items():
            count = dropped.number("documents") or 0.0
            share = count / documents_in if documents_in else None
            rows.append((stage.text("stage"), reason, count, dropped.number("bytes"), share))
    rows.sort(key=lambda row: -row[2])
    if not rows:
        return None
    return Table(
        title=f"Most documents were dropped for: {rows[0][1].replace('_', ' ')}",
        head=["Stage", "Reason", "Documents", "Size", "Share"],
        rows=[
            [pretty(stage), reason.replace("_", " "), num(count), megabytes(size), percent(share)]
            for stage, reason, count, size, share in rows
        ],
        source=FUNNEL, numeric=frozenset({2, 3, 4}),
        note="Share: of the documents that came into the stage.",
    )  # fmt: skip


def _sources(funnel: Record) -> Table | None:
    """Kept per source: whatever numbers the funnel has of each."""
    sources = {
        name: {key: value.number(key) for key in value.value if _is_number(value.value[key])}
        for name, value in funnel.record("sources").items()
    }
    columns = list(dict.fromkeys(key for numbers in sources.values() for key in numbers))
    columns.sort(key=lambda column: ("documents" not in column, "bytes" not in column))
    if not columns:
        return None
    return Table(
        title="What each source brings",
        head=["Source", *(pretty(column) for column in columns)],
        rows=[
            [name, *((megabytes if "bytes" in c else num)(numbers.get(c)) for c in columns)]
            for name, numbers in sources.items()
        ],
        source=FUNNEL, numeric=frozenset(range(1, len(columns) + 1)),
    )  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _samples(value: object, label: str = "") -> Iterator[tuple[str, str]]:
    """(what became of it, text) of every document in a nest of lists and named groups."""
    if isinstance(value, list):
        for item in value[:MAX_SAMPLES]:
            yield from _samples(item, label)
    elif isinstance(value, dict) and isinstance(value.get("text"), str):
        parts = [str(value[key]) for key in ("stage", "reason", "source", "path") if value.get(key)]
        if value.get("of_path"):
            parts.append(f"same as {value['of_path']}")
        yield " · ".join([label, *parts] if label else parts) or DASH, value["text"]
    elif isinstance(value, dict):
        for key, item in value.items():
            name = str(key).replace("_", " ")
            yield from _samples(item, f"{label} · {name}" if label else name)
    elif isinstance(value, str):
        yield label or DASH, value


def tokenizer(run: Run) -> Section:
    """Size of the vocabulary, how far a token reaches, and texts cut into pieces."""
    result = run.record(TOKENIZER)
    rates = result.numbers("bytes_per_token")
    blocks: list[Block] = []
    lead = ""
    if result.number("vocab_size") is not None:
        lead = f"{num(result.number('vocab_size'))} tokens, bytes included, trained on the corpus."
    if rates:
        rows = [(name, rate, num(rate)) for name, rate in rates.items()]
        blocks.append(
            Grid(
                [
                    svg.picture(
                        title="One token covers "
                        + " and ".join(
                            f"{num(rate, 2)} bytes of {name}" for name, rate in rates.items()
                        ),
                        alt="Bar chart of bytes per token: "
                        + ", ".join(f"{name} {text}" for name, _, text in rows),
                        source=TOKENIZER,
                        draw=plots.bar_chart(rows, "bytes per token (more is shorter sequences)"),
                        height=54 + 26 * len(rows),
                    )
                ]
            )
        )
    examples = [example.strings("pieces") for example in result.records("examples")]
    if any(examples):
        title = "Texts as the model reads them, one box a token"
        blocks.append(Pieces(title, [e for e in examples if e], TOKENIZER))
    if result.text("sha256"):
        row: list[str | Cell] = ["SHA-256 of the model file", Cell(result.text("sha256"))]
        blocks.append(Table("Identity", ["What", "Value"], [row], TOKENIZER))
    return Section("tokenizer", "Tokenizer", run.status("tokenizer"), lead, blocks)


def instructions(run: Run) -> Section:
    """What the later stages are taught with: rows of each set, and what they consist of."""
    result = run.record(INSTRUCTIONS)
    rows: list[list[str | Cell]] = []
    for name in [key for key, value in result.value.items() if isinstance(value, dict)]:
        content = result.record(name)
        parts = []
        for kind in [key for key, value in content.value.items() if isinstance(value, dict)]:
            counts = [f"{key} {num(count)}" for key, count in content.numbers(kind).items()]
            parts.append(f"{kind}: {', '.join(counts)}".replace("_", " "))
        if content.number("rows") is not None:
            rows.append([pretty(name), num(content.number("rows")), Cell("\n".join(parts))])
    blocks: list[Block] = []
    if rows:
        table = Table(
            title="Sets of the alignment stages",
            head=["Set", "Rows", "Made of"],
            rows=rows, source=INSTRUCTIONS, numeric=frozenset({1}),
        )  # fmt: skip
        blocks.append(table)
    status = run.status("instructions")
    return Section("instructions", "Instructions and preferences", status, "", blocks)


def headlines(run: Run) -> list[Headline]:
    stages = _cleaning(run.record(FUNNEL))
    rows = []
    if stages:
        before, after = stages[0].number("bytes_in"), stages[-1].number("bytes_out")
        share = after / before if after is not None and before else None
        reading = f"of {megabytes(before)} of raw text survive cleaning: {megabytes(after)}."
        rows.append(Headline("Corpus", percent(share), reading, FUNNEL, "corpus"))
    result = run.record(TOKENIZER)
    rates = result.numbers("bytes_per_token")
    if rates:
        number = " / ".join(num(rate, 2) for rate in rates.values())
        reading = (
            f"bytes per token on {' / '.join(rates)}, "
            f"with a vocabulary of {num(result.number('vocab_size'))}."
        )
        rows.append(Headline("Tokenizer", number, reading, TOKENIZER, "tokenizer"))
    return rows
