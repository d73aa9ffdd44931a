"""Sections on the corpus as it was written: sample documents, and what it was made with."""

from __future__ import annotations

from typing import Any

from data_beam.inspect import show
from data_beam.inspect.corpus import MANIFEST, SAMPLES, Corpus
from data_beam.inspect.funnel import words
from data_beam.io import storage
from internlm2_jax import files
from internlm2_jax.report.blocks import Block, Cell, Fold, Section, Table, Text, num, size
from internlm2_jax.report.load import ABSENT, DONE, Record
from internlm2_jax.report.svg import tick


def samples(corpus: Corpus) -> Section:
    """A few documents of every outcome, as the pipeline chose them."""
    record = corpus.record(SAMPLES)
    blocks: list[Block] = []
    kept, dropped = record.records("kept"), record.records("dropped")
    for source in sorted({row.text("source") for row in kept}):
        some = [row for row in kept if row.text("source") == source]
        blocks.append(Fold(f"kept of {source}: {len(some)} documents", [_table(some)]))
    for reason in sorted({row.text("reason") for row in dropped}):
        some = [row for row in dropped if row.text("reason") == reason]
        blocks.append(Fold(f"dropped, {words(reason)}: {len(some)} documents", [_table(some)]))
    return Section("samples", "Samples", DONE if blocks else ABSENT, "", blocks)


def _table(rows: list[Record]) -> Table:
    body: list[list[str | Cell]] = []
    for row in rows:
        value = row.number("value")
        name = show.visible(row.text("path") or row.text("id"))
        notes = [row.text("source"), size(row.number("bytes")), row.text("id")]
        if row.text("of_path"):
            notes.insert(0, f"copy of {row.text('of_path')}")
        head = f"{tick(value)} · {name}" if value and row.text("reason") else name
        body.append([
            Cell(head, show.visible(" · ".join(notes))),
            Cell(show.excerpt(row.text("text")), mono=True),
        ])  # fmt: skip
    return Table(
        title="Chosen by a hash of their ids", head=["Document", "Text"], rows=body,
        source=SAMPLES, stacked=True,
    )  # fmt: skip


def section(corpus: Corpus) -> Section:
    """The attributes and their settings, and every setting of the mix."""
    rows: list[list[str | Cell]] = []
    for name, manifest in corpus.attributes.items():
        chosen = manifest.get("settings")
        plain = dict(chosen) if isinstance(chosen, dict) else {}
        version = plain.pop("version", None)
        plain.pop("attribute", None)
        plain.pop("rules", None)
        text = ", ".join(f"{key} = {_brief(value)}" for key, value in sorted(plain.items()))
        rows.append([name, num(version), Cell(show.visible(text) or "none")])
    blocks: list[Block] = [
        Table(
            title=f"{len(rows)} attributes", head=["Attribute", "Version", "Settings"], rows=rows,
            source="attributes/*/manifest.json", numeric=frozenset({1}),
        )
    ]  # fmt: skip
    mix = corpus.record(MANIFEST).record("settings")
    if mix:
        text = files.json_bytes(mix.value, indent=True).decode()
        name = f"Settings of the mix, {len(text.splitlines())} lines"
        blocks.append(Fold(name, [Text(show.visible(text), "As JSON", MANIFEST)]))
    count, shards = sum(corpus.documents.counts), corpus.documents.shards
    lead = f"{num(count)} documents ({size(sum(corpus.documents.num_bytes))}) in {shards} shards."
    return Section("settings", "Attributes and settings", DONE, lead, blocks)


def _brief(value: Any) -> str:
    """A value in JSON, not too long; of a path only the name, as the page may be read elsewhere."""
    if isinstance(value, str) and "/" in value:
        value = value.rstrip("/").rsplit("/", 1)[-1]
    text = files.json_bytes(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def classifiers(corpus: Corpus) -> dict[str, str]:
    """Folders of the classifiers that the corpus was made with, where they are still there, by the
    name of the score."""
    found: dict[str, str] = {}
    for settings in corpus.record(MANIFEST).record("settings").value.values():
        folders = settings.get("classifiers") if isinstance(settings, dict) else None
        if isinstance(folders, dict):
            found |= {str(name): str(folder) for name, folder in folders.items()}
    return {
        name: folder
        for name, folder in found.items()
        if storage.exists(storage.join(folder, "result.json"))
    }
