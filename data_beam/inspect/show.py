"""Documents as the page shows them: an excerpt, where it is from, what became of it. Their texts
are anybody's: they are only ever text, and signs that would not be seen are made visible."""

from __future__ import annotations

import re
from collections.abc import Sequence

from data_beam.inspect.corpus import Corpus
from data_beam.inspect.scan import Sample
from data_beam.schema import Document
from internlm2_jax.report.blocks import Cell, Table, clip, size
from internlm2_jax.report.svg import tick

EXCERPT = 500  # characters
# Controls, signs that turn the direction of what follows them or hide in the text, lone surrogates.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """`text` with code points in place of signs that would not be seen."""
    return _INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def excerpt(text: str, length: int = EXCERPT) -> str:
    """The beginning of a text, and how much was left out."""
    return visible(clip(text, length))


def title(document: Document) -> str:
    """What a document calls itself: its path, else its URL, else its id."""
    name = document.path or document.url or document.id
    if document.repo and document.path:
        name = f"{document.repo}: {name}"
    return visible(name if len(name) <= 160 else f"{name[:120]} … {name[-30:]}")


def origin(document: Document) -> str:
    """Source, language, size and id in one line."""
    parts = [document.source, document.lang, document.dump, size(document.num_bytes), document.id]
    return visible(" · ".join(part for part in parts if part))


def fate(stage_and_reason: tuple[str, str] | None) -> str:
    if stage_and_reason is None:
        return "kept"
    return f"dropped: {stage_and_reason[1]}".replace("_", " ")


def samples(corpus: Corpus, groups: Sequence[tuple[str, Sequence[Sample]]], where: str) -> Table:
    """A table of documents: (heading, samples) one after the other."""
    documents = corpus.read(sample.place for _, some in groups for sample in some)
    rows: list[list[str | Cell]] = []
    for heading, some in groups:
        for sample in some:
            document = documents[sample.place]
            value = "" if sample.value != sample.value else f"{tick(sample.value)} · "
            about = f"{value}{heading}\n{title(document)}"
            rows.append([
                Cell(about, f"{fate(sample.fate)} · {origin(document)}"),
                Cell(excerpt(document.text), mono=True),
            ])  # fmt: skip
    return Table(
        title="Documents to judge it by", head=["Value and document", "Text"], rows=rows,
        source=where, stacked=True,
    )  # fmt: skip
