"""Everything that is known of one document: where it came from, what was measured, which rule
dropped it with which value, of which document it is a copy, and where it stands now."""

from __future__ import annotations

import bisect
import datetime
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_beam.inspect import show
from data_beam.inspect.corpus import DECISION, FACTS, MANIFEST, Corpus, Place
from data_beam.io import storage, writers
from data_beam.mix import rules as rules_module
from data_beam.mix.rules import Rule, rules_for
from data_beam.schema import DeadLetter, Document, shard_of
from internlm2_jax.errors import UserError
from internlm2_jax.report.blocks import num, size

MAX_DOCUMENTS = 5  # told in full; of more, only their ids
_MAX_LISTED = 20
_MIN_PREFIX = 4
_HEX = frozenset("0123456789abcdef")


def history(output: str | os.PathLike, query: str) -> list[str]:
    """Lines of text on the documents that `query` names: an id, the first digits of one (at least
    four), a path or URL, or a part of one; and on dead letters found at such a place.

    Raises UserError when nothing is known by that name.
    """
    corpus = Corpus(output)
    if not query:
        raise UserError("an empty name finds nothing; give an id, a path or a URL")
    places = _places(corpus, query)
    letters = [] if _is_id(query) and places else list(_letters(corpus, query))
    if not places and not letters:
        raise UserError(
            f"{output} knows nothing of {query!r}: no id begins so, no path, URL or dead letter "
            "holds it"
        )
    lines: list[str] = []
    for place in places[:MAX_DOCUMENTS]:
        lines += [*_document(corpus, place), ""]
    if len(places) > MAX_DOCUMENTS:
        lines.append(f"{len(places) - MAX_DOCUMENTS:,} more documents match:")
        shown = places[MAX_DOCUMENTS : MAX_DOCUMENTS + _MAX_LISTED]
        found = corpus.read(shown)
        lines += [f"  {found[place].id}  {show.title(found[place])}" for place in shown]
        lines.append("")
    for letter in letters[:_MAX_LISTED]:
        lines += [*_letter(letter), ""]
    if len(letters) > _MAX_LISTED:
        lines += [f"{len(letters) - _MAX_LISTED:,} more dead letters match.", ""]
    return [show.visible(line).replace("\n", "␊") for line in lines[:-1]]


# --- finding ----------------------------------------------------------------------------------


def _is_id(query: str) -> bool:
    return _MIN_PREFIX <= len(query) <= 32 and set(query.lower()) <= _HEX


def _places(corpus: Corpus, query: str) -> list[Place]:
    if _is_id(query):
        found = _by_prefix(corpus, query.lower())
        if found:
            return found
    return _by_origin(corpus, query)


def _by_prefix(corpus: Corpus, prefix: str) -> list[Place]:
    """Ids ascend in a shard, and 16 digits tell the shard."""
    count = corpus.documents.shards
    found = []
    for shard in range(count) if len(prefix) < 16 else [shard_of(prefix, count)]:
        ids = np.array(corpus.columns(shard, ["facts.id"])["facts.id"].to_pylist(), "U32")
        first, last = np.searchsorted(ids, [prefix, prefix + "g"])
        found += [Place(shard, row) for row in range(first, last)]
    return found


def _by_origin(corpus: Corpus, query: str) -> list[Place]:
    """Documents whose path or URL is `query`; else those where it ends so; else those that hold
    it."""
    tests: tuple[Callable[[pa.ChunkedArray], pa.ChunkedArray], ...] = (
        lambda column: pc.equal(column, query),
        lambda column: pc.ends_with(column, "/" + query),
        lambda column: pc.match_substring(column, query),
    )
    found: list[list[Place]] = [[] for _ in tests]
    for shard in range(corpus.documents.shards):
        columns = corpus.columns(shard, ["facts.path", "facts.url"])
        for test, some in zip(tests, found, strict=True):
            hit = pc.or_(test(columns["facts.path"]), test(columns["facts.url"]))
            some += [Place(shard, row) for row in np.flatnonzero(hit.to_numpy()).tolist()]
    return next((some for some in found if some), [])


def _letters(corpus: Corpus, query: str) -> Iterator[DeadLetter]:
    return (letter for letter in corpus.dead_letters() if query in letter.where)


# --- telling ----------------------------------------------------------------------------------


def _document(corpus: Corpus, place: Place) -> Iterator[str]:
    document = corpus.read([place])[place]
    yield f"document {document.id}"
    yield from _origin(document)
    name = corpus.documents.names[place.shard]
    yield f"  stored      documents/{name}, record {place.row:,}"
    yield from _attributes(corpus, place)
    yield from _decision(corpus, document, place)
    yield from _copies(corpus, document.id)
    head = " ".join(document.text[:200].split())
    yield f"  text        {head}{' …' if len(document.text) > 200 else ''}"


def _origin(document: Document) -> Iterator[str]:
    yield f"  source      {document.source}"
    for name in ("path", "url", "repo", "dump", "license"):
        if value := getattr(document, name):
            yield f"  {name:<11} {value}"
    if document.timestamp:
        when = datetime.datetime.fromtimestamp(document.timestamp, datetime.UTC)
        yield f"  time        {when:%Y-%m-%d %H:%M:%S} UTC"
    yield f"  size        {size(document.num_bytes)}, language {document.lang}"
    for name, value in sorted(document.meta.items()):
        yield f"  meta        {name} = {_value(value)}"


def _attributes(corpus: Corpus, place: Place) -> Iterator[str]:
    for name in corpus.attributes:
        if name in (FACTS, DECISION):
            continue
        row = corpus.row(name, place).to_pylist()[0]
        for column, value in row.items():
            if column != "id":
                yield f"  measured    {name}.{column} = {_value(value)}"


def _value(value: Any) -> str:
    """A value in one short piece of text; a dash for what says nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        shown = ", ".join(_value(item) for item in value[:6])
        return f"[{shown}{f', … {len(value):,} in all' if len(value) > 6 else ''}]"
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]} …"


def _decision(corpus: Corpus, document: Document, place: Place) -> Iterator[str]:
    if not corpus.is_decided:
        yield "  decision    none yet: no rules were applied"
        return
    row = corpus.row(DECISION, place).to_pylist()[0]
    broken = _broken(corpus, document.source, place)
    if row["stage"] is None:
        count = len(rules_for(document.source, corpus.rules))
        yield f"  decision    kept: breaks none of the {count} rules for {document.source}"
        yield from _written(corpus, document, place)
    else:
        why = next((text for rule, text in broken if rule.reason == row["reason"]), "")
        verdict = f"dropped in stage {row['stage']} for {row['reason']}"
        yield f"  decision    {verdict}{why and ': ' + why}"
        if row["of_id"]:
            yield from _survivors(corpus, row["of_id"], row["value"])
    for rule, text in broken:
        if rule.reason != row["reason"]:
            yield f"  also        breaks {rule.stage}, {rule.reason}: {text}"
    if outdated := corpus.outdated():
        yield (
            f"  warning     {', '.join(outdated)} changed since this decision; run the pipeline "
            "again"
        )


def _broken(corpus: Corpus, source: str, place: Place) -> list[tuple[Rule, str]]:
    """Every rule that the document breaks, in order, with the value and what it should be."""
    found = []
    tables: dict[str, pa.Table] = {}
    for rule in rules_for(source, corpus.rules):
        wanted = [*rule.columns, *([corpus.lang] if rule.lang else [])]
        columns = {}
        for column in wanted:
            attribute, _, name = column.partition(".")
            if attribute not in tables:
                tables[attribute] = corpus.row(attribute, place)
            columns[column] = tables[attribute][name]
        if rule.lang and not rules_module.among(columns[corpus.lang], rule.lang)[0]:
            continue
        if rules_module.broken(rule, columns)[0]:
            found.append((rule, _why(rule, columns[rule.signal][0].as_py())))
    return found


def _why(rule: Rule, value: Any) -> str:
    if rule.of is not None:
        return f"similarity {_value(value)}"
    if rule.allowed is not None:
        return f"{rule.signal} is {_value(value)}, not one of {', '.join(rule.allowed)}"
    if value < rule.minimum:
        return f"{rule.signal} is {_value(value)}, below the minimum of {rule.minimum:g}"
    return f"{rule.signal} is {_value(value)}, above the maximum of {rule.maximum:g}"


def _survivors(corpus: Corpus, of_id: str, value: float | None) -> Iterator[str]:
    """The document that stayed instead, and, if it was dropped itself, for which one."""
    seen: set[str] = set()
    while of_id and of_id not in seen:
        seen.add(of_id)
        place = corpus.find([of_id]).get(of_id)
        if place is None:
            yield f"  copy of     {of_id}, which is not among the documents"
            return
        other = corpus.read([place])[place]
        alike = f", similarity {_value(value)}" if value is not None else ""
        row = corpus.row(DECISION, place).to_pylist()[0]
        fate = "kept" if row["stage"] is None else f"itself dropped for {row['reason']}"
        yield f"  copy of     {of_id}  {show.title(other)} ({fate}{alike})"
        of_id, value = row["of_id"] or "", row["value"]


def _copies(corpus: Corpus, id: str) -> Iterator[str]:
    """The documents that were dropped as copies of this one."""
    if not corpus.is_decided:
        return
    found: list[tuple[Place, float | None]] = []
    for shard in range(corpus.documents.shards):
        columns = corpus.columns(shard, [f"{DECISION}.of_id", f"{DECISION}.value"])
        mine = pc.fill_null(pc.equal(columns[f"{DECISION}.of_id"], id), False).to_numpy()
        for row in np.flatnonzero(mine).tolist():
            found.append((Place(shard, row), columns[f"{DECISION}.value"][row].as_py()))
    if not found:
        return
    yield f"  survivor of {num(len(found))} copies"
    documents = corpus.read(place for place, _ in found[:_MAX_LISTED])
    for place, value in found[:_MAX_LISTED]:
        document = documents[place]
        yield f"    {document.id}  {show.title(document)} (similarity {_value(value)})"
    if len(found) > _MAX_LISTED:
        yield f"    and {len(found) - _MAX_LISTED:,} more"


def _written(corpus: Corpus, document: Document, place: Place) -> Iterator[str]:
    """Where the kept document stands in the corpus, and what was cut out of it."""
    rows = corpus.record(MANIFEST).records("shards")
    if not rows:
        yield "  corpus      not written yet"
        return
    suffix = f"-{place.shard:05d}-of-{corpus.documents.shards:05d}.arrayrecord"
    files = [(row.text("name"), int(row.number("documents") or 0)) for row in rows]
    files.sort(key=lambda file: (not file[0].endswith(suffix), file))
    for name, count in files:
        with storage.local_copy(storage.join(corpus.output, "corpus", name)) as path:
            records = _Records(path, count)
            row = bisect.bisect_left(records, document.id)
            if row < len(records) and records[row] == document.id:
                written = records.document(row)
                yield f"  corpus      corpus/{name}, record {row:,}"
                if cut := len(document.text) - len(written.text):
                    yield f"  edited      {cut:,} of {len(document.text):,} characters cut out"
                return
            if document.repo:
                row = bisect.bisect_left(records, document.id[:16])
                if row < len(records) and records[row].startswith(document.id[:16]):
                    yield (
                        f"  corpus      corpus/{name}, record {row:,}, in the document "
                        f"{records[row]} of its repository"
                    )
                    return
    yield "  corpus      in none of its files; run the pipeline again"


class _Records(Sequence[str]):
    """The ids of an ArrayRecord file of documents, read one by one: they ascend."""

    def __init__(self, path: Path, count: int):
        self.path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row):
        return self.document(row).id

    def document(self, row: int) -> Document:
        (record,) = writers.read_array_record(self.path, row, row + 1)
        return Document.from_bytes(record)


def _letter(letter: DeadLetter) -> Iterator[str]:
    yield f"dead letter {letter.where}"
    yield f"  source      {letter.source}"
    yield f"  reason      {letter.reason}{letter.detail and ': ' + letter.detail}"
    yield f"  size        {size(letter.num_bytes)}"
    if letter.head:
        yield f"  beginning   {' '.join(letter.head.split())}"
