"""A pipeline's output folder made of given documents, for tests of what looks at it: real document
shards, attributes, decision, funnel and corpus, with signals and duplicates as the test wants."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from small_corpus import doc

from data_beam import tables
from data_beam.attributes.base import Examined
from data_beam.attributes.facts import Facts
from data_beam.kernels.textstats import Signals
from data_beam.mix import funnel, write
from data_beam.mix.rules import EXACT, NEAR, Rule, Rules
from data_beam.pipelines import ingest
from data_beam.schema import DeadLetter, Document, shard_of
from data_beam.stage import Documents, Output, open_documents

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('text')</script> <b>&amp; \u202e\x1b[31m\n"
COLUMNS = {
    "num_chars": pa.int64(), "mean_word_length": pa.float32(), "letter_share": pa.float32(),
    "max_line_length": pa.int64(), "symbol_word_ratio": pa.float32(),
    "duplicate_line_share": pa.float32(), "generated_mark": pa.bool_(),
}  # fmt: skip
TEXT = (
    Rule("language", "other_language", "language.lang", allowed=("en", "zh", "de")),
    Rule("filter", "too_short", "signals.num_chars", minimum=200),
    Rule("filter", "generated", "signals.generated_mark", maximum=0),
    Rule("filter", "word_length", "signals.mean_word_length", minimum=2.5, maximum=10),
    Rule("filter", "few_letters", "signals.letter_share", minimum=0.55),
    Rule("filter", "symbols", "signals.symbol_word_ratio", maximum=0.1),
    EXACT,
    NEAR,
)
CODE = (
    Rule("filter", "too_short", "signals.num_chars", minimum=100),
    Rule("filter", "long_line", "signals.max_line_length", maximum=1000, lang=("python",)),
    Rule("filter", "repeated_lines", "signals.duplicate_line_share", maximum=0.4),
    EXACT,
    NEAR,
)
RULES: Rules = {"text": TEXT, "code": CODE}

LETTERS = [
    *(DeadLetter(f"in/a.jsonl#{n}", "bad_json", "text", "line ends early", 9) for n in range(9)),
    DeadLetter("in/<b>.gz", "truncated_gzip", "text", "ends early", 77, "\x1f\x8b<script>"),
]


def write_attribute(
    output: Path, documents: Documents, name: str, columns: Mapping[str, pa.DataType], compute
) -> None:
    """One attribute, `compute(document) -> {column: value}`."""
    target = Output(
        tables.folder_of(output, name), "attribute", tables.SUFFIX, ("k",) * documents.shards
    )
    schema = tables.with_id(pa.schema(list(columns.items())))
    for shard in range(documents.shards):
        rows = [{"id": d.id, **compute(d)} for d in documents.read(shard)]
        tables.write_table(target.path(shard), pa.Table.from_pylist(rows, schema))
        target.finish(shard, len(rows))
    target.complete({"attribute": name, "version": 1}, {"documents": documents.digest})


def _signals(signals: Signals) -> dict[str, Any]:
    found = {name: getattr(signals, name) for name in COLUMNS}
    return {**found, "generated_mark": bool(found["generated_mark"])}


def _documents(
    output: Path, documents: Sequence[Document], letters: Sequence[DeadLetter], shards: int
) -> Documents:
    targets = ingest._outputs(output, shards, "test")
    for shard in range(shards):
        rows = [("", letter.to_bytes()) for letter in letters[shard::shards]]
        rows += [(d.id, d.to_bytes()) for d in documents if shard_of(d.id, shards) == shard]
        ingest._write(shard, sorted(rows), *targets)
    for target in targets:
        target.complete({}, {})
    return open_documents(output)


def build(
    output: Path,
    documents: Sequence[Document],
    *,
    exact: Mapping[str, str] | None = None,
    near: Mapping[str, tuple[str, float]] | None = None,
    letters: Sequence[DeadLetter] = (),
    rules: Rules = RULES,
    shards: int = 3,
) -> Path:
    """Everything below `output`. `exact`: id -> survivor, `near`: id -> (survivor, similarity)."""
    exact, near = exact or {}, near or {}
    opened = _documents(output, documents, letters, shards)
    facts = Facts()

    def one_fact(document: Document) -> dict[str, Any]:
        found = facts.compute([Examined(document)])
        return {name: values[0] for name, values in found.items()}

    def duplicates(document: Document) -> dict[str, Any]:
        of, similarity = near.get(document.id, (None, None))
        of_exact = exact.get(document.id)
        return {"exact_of": of_exact, "near_of": of, "similarity": 1.0 if of_exact else similarity}

    write_attribute(output, opened, "facts", {f.name: f.type for f in Facts.schema}, one_fact)
    write_attribute(
        output, opened, "signals", COLUMNS,
        lambda d: _signals(Signals(d.text)),
    )  # fmt: skip
    write_attribute(output, opened, "language", {"lang": pa.string()}, lambda d: {"lang": d.lang})
    write_attribute(
        output, opened, "duplicates",
        {"exact_of": pa.string(), "near_of": pa.string(), "similarity": pa.float32()}, duplicates,
    )  # fmt: skip
    funnel.finish(output, rules, write.Mix(validation_fraction=0.1))
    return output


def sample_documents() -> list[Document]:
    """The project's own sources as code, their docstrings as text, in paragraphs of many sizes."""
    found = []
    for path in sorted((ROOT / "internlm2_jax").rglob("*.py"))[:60]:
        text = path.read_text("utf-8")
        name = path.relative_to(ROOT).as_posix()
        found.append(doc(text, "code", path=name, lang="python", repo="internlm2_jax"))
        for number, part in enumerate(re.findall(r'"""(.*?)"""', text, re.DOTALL)):
            if len(part) > 60:
                lang = "en" if number % 7 else "fr"
                found.append(doc(part + "\n", "text", path=f"{name}/{number}", lang=lang))
    found.append(doc(EVIL * 20, "text", path="<img src=x onerror=alert(1)>\nfake line", lang="en"))
    found.append(doc("x = 1\n" * 99, "code", path="repeated.py", lang="python"))
    found.append(doc("春眠不覺曉，處處聞啼鳥。\n" * 30, "poems", path="poem", lang="zh"))
    return list({document.id: document for document in found}.values())


def _copies(found: list[Document]):
    """Near copies of two texts with known similarities, an exact one, and a copy of a copy."""
    rng = random.Random(0)
    originals = [d for d in found if d.source == "text" and d.lang == "en" and len(d.text) > 400]
    exact, near, extra = {}, {}, []
    for number, original in enumerate(originals[:12]):
        for version in range(6 if number == 0 else 1):
            words = original.text.split(" ")
            words[rng.randrange(len(words))] = f"changed{version}"
            copy = doc(" ".join(words), "text", path=f"{original.path}.copy{version}", lang="en")
            extra.append(copy)
            near[copy.id] = (original.id, 0.7 + 0.02 * len(extra))
    again = doc(extra[0].text, "text", path="again", lang="en")
    exact[again.id] = extra[0].id
    return [*extra, again], exact, near


def build_sample(output: Path) -> Path:
    """Sources, docstrings, hostile documents, copies of several kinds and dead letters."""
    found = sample_documents()
    extra, exact, near = _copies(found)
    return build(output, [*found, *extra], exact=exact, near=near, letters=LETTERS)
