"""The corpus itself: kept documents, edited where the mix says so, in a split, one worker a shard.

Output shards follow the document shards, so nothing is shuffled. One document shard gives one file
per split and source that it holds documents of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import orjson

from data_beam import progress, runners, tables  # runners first: it imports Beam without its noise
from data_beam.io import storage, writers
from data_beam.mix import decide
from data_beam.schema import Document, Drop, hash63, shard_of
from data_beam.stage import Documents, open_documents, part_name, read_manifest
from internlm2_jax.files import fingerprint

beam = runners.beam
EXCERPT = 400  # characters of a sample
SAMPLES = 3  # per source and outcome
ASSEMBLY_DROPS = "assembly_drops"
_PARTS = "parts"


class Assemble(Protocol):
    """A dataclass: documents of a shard in the order of their ids, by which those of one repository
    stand together -> other documents, the source unchanged, and a `Drop` for each that is in
    none of them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document | Drop]: ...


@dataclasses.dataclass(frozen=True)
class Mix:
    """How the kept documents become the corpus; columns are named "attribute.column".

    `edits` are columns of spans (lists of start, end, start, end ... in characters) cut out of the
    texts. `licence` is a column that becomes the document's. `suffix` is a column that becomes the
    document's meta "grade" and is appended to its source ("code" -> "code_high"), so that training
    can weigh grades differently. `assemble` makes the kept documents of a shard into others (the
    files of a repository into one). `validation_fraction` of each source's documents validate, at
    least one when there are two; `split_by` "repo" keeps repositories whole.
    """

    seed: int = 0
    validation_fraction: float = 0.02
    split_by: str = "id"
    edits: tuple[str, ...] = ()
    licence: str | None = None
    suffix: str | None = None
    assemble: Assemble | None = None

    def settings(self) -> dict[str, Any]:
        """In JSON types, for resume keys and manifests."""
        made = self.assemble and dataclasses.asdict(self.assemble)
        return {**vars(self), "assemble": made}

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column for column in (*self.edits, self.licence, self.suffix) if column)

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(sorted({column.partition(".")[0] for column in self.columns}))


def split_of(number: int, extremes: Sequence[int], fraction: float) -> str:
    """The split of a document with the 63-bit hash `number`: validation below `fraction` of the
    range. Of two or more documents of a source the one with the smallest hash always validates,
    the one with the largest always trains."""
    if number == extremes[1]:
        return "train"
    return "validation" if number == extremes[0] or number < fraction * 2**63 else "train"


def cut(text: str, spans: Sequence[int]) -> str:
    """`text` without the spans [start, end, start, end ...], which are sorted and apart."""
    kept, last = [], 0
    for start, end in zip(spans[0::2], spans[1::2], strict=True):
        kept.append(text[last:start])
        last = end
    return "".join([*kept, text[last:]])


def run(
    output: str | os.PathLike, mix: Mix, *, beam_options: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Writes OUTPUT/corpus from the documents and the attribute "decision".

    Returns a row per output file: name, split, source, documents, bytes, digest; and leaves samples
    in OUTPUT/corpus/samples.json. The manifest is the caller's (`funnel.finish`).
    """
    documents = open_documents(output)
    decisions = read_manifest(tables.folder_of(output, decide.NAME), "attribute")
    extremes = {
        source: counts["extremes"] for source, counts in decide.merge_counts(decisions).items()
    }
    inputs = {
        name: read_manifest(tables.folder_of(output, name), "attribute")["digest"]
        for name in mix.attributes
    }
    folder = storage.join(output, "corpus")
    key = fingerprint([mix.settings(), documents.digest, decisions["digest"], inputs])
    parts = _Parts(folder, documents.shards, key, extremes)
    if pending := parts.pending():
        storage.delete(storage.join(folder, "manifest.json"))
        work = _WriteKept(os.fspath(output), documents, mix, parts)
        count = sum(documents.counts[shard] for shard in pending)
        runners.run_over(pending, "WriteKept", work, beam_options, shown="write", documents=count)
    rows = [row for shard in range(documents.shards) for row in parts.read(shard)["files"]]
    _remove_others(folder, {row["name"] for row in rows})
    _write_samples(output, documents, parts)
    return sorted(rows, key=lambda row: row["name"])


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Per document shard one JSON file that lists what was written of it."""

    folder: str
    shards: int
    key: str
    extremes: Mapping[str, Any]

    def path(self, shard: int) -> str:
        return storage.join(self.folder, _PARTS, part_name(shard, self.shards, ".json"))

    def read(self, shard: int) -> dict[str, Any]:
        return storage.read_json(self.path(shard))

    def pending(self) -> list[int]:
        return [shard for shard in range(self.shards) if not self._is_done(shard)]

    def _is_done(self, shard: int) -> bool:
        if not storage.exists(self.path(shard)):
            return False
        row = self.read(shard)
        return row.get("key") == self.key and all(
            storage.exists(storage.join(self.folder, file["name"])) for file in row["files"]
        )


def _remove_others(folder: str, names: set[str]) -> None:
    """Shards of an earlier mix that this one does not have."""
    for info in storage.list_files(folder):
        name = info.path.rsplit("/", 1)[-1]
        if name.endswith(".arrayrecord") and name not in names:
            storage.delete(info.path)


class _WriteKept(beam.DoFn):
    def __init__(self, output: str, documents: Documents, mix: Mix, parts: _Parts):
        super().__init__()
        self.output, self.documents, self.mix, self.parts = output, documents, mix, parts

    def process(self, shard):
        files: dict[str, dict[str, Any]] = {}
        samples = _Samples(self.mix.seed)
        assembly = _Assembly(self.mix.assemble)
        with contextlib.ExitStack() as stack:
            open_files: dict[str, Any] = {}
            for document in assembly.run(self._kept(shard, samples)):
                samples.kept(document)
                split, source = self._destination(document)
                name = part_name(shard, self.documents.shards, ".arrayrecord", f"{split}-{source}")
                if name not in open_files:
                    path = storage.join(self.parts.folder, name)
                    open_files[name] = stack.enter_context(
                        writers.array_record_writer(
                            stack.enter_context(storage.whole(path)), writers.DOCUMENTS_OPTIONS
                        )
                    )
                    files[name] = {"name": name, "split": split, "source": source,
                                   "documents": 0, "bytes": 0}  # fmt: skip
                open_files[name].write(document.to_bytes())
                files[name]["documents"] += 1
                files[name]["bytes"] += document.num_bytes
        for file in files.values():
            file["digest"] = storage.digest(storage.join(self.parts.folder, file["name"]))
        if assembly.drops:
            path = storage.join(self.parts.folder, ASSEMBLY_DROPS)
            path = storage.join(path, part_name(shard, self.documents.shards, ".jsonl.zst"))
            with storage.whole(path) as temporary:
                writers.write_lines_zst(temporary, assembly.drops)
        row = {"key": self.parts.key, "files": [files[k] for k in sorted(files)],
               "samples": samples.rows(), "assembly": assembly.counts}  # fmt: skip
        storage.write_json(self.parts.path(shard), row)

    def _kept(self, shard: int, samples: _Samples) -> Iterator[Document]:
        """The kept documents, edited; the dropped ones are offered to the samples."""
        columns = self._columns(shard)
        for row, document in enumerate(self.documents.read(shard)):
            progress.bump()
            if columns["stage"][row] is None:
                yield self._edit(document, columns, row)
            else:
                samples.dropped(document, columns, row)

    def _columns(self, shard: int) -> dict[str, list[Any]]:
        table = tables.read_attribute(self.output, decide.NAME, shard)
        columns = {name: table[name].to_pylist() for name in table.column_names}
        for column in self.mix.columns:
            attribute, _, name = column.partition(".")
            values = tables.read_attribute(self.output, attribute, shard, [name])[name]
            columns[column] = values.to_pylist()
        return columns

    def _edit(self, document: Document, columns: Mapping[str, list], row: int) -> Document:
        spans = sorted(
            pair for column in self.mix.edits for pair in _pairs(columns[column][row] or ())
        )
        if spans:
            document = document._replace(text=cut(document.text, _joined(spans)))
        if self.mix.licence and (licence := columns[self.mix.licence][row]):
            document = document._replace(license=licence)
        if self.mix.suffix and (suffix := columns[self.mix.suffix][row]):
            document = document._replace(meta={**document.meta, "grade": suffix})
        return document

    def _destination(self, document: Document) -> tuple[str, str]:
        """(split, source with its grade) of a finished document."""
        key = decide.split_key(document.id, document.repo, self.mix.split_by)
        number = decide.split_hash(key, self.mix.seed)
        extremes = self.parts.extremes[document.source]
        split = split_of(number, extremes, self.mix.validation_fraction)
        grade = document.meta.get("grade") if self.mix.suffix else None
        return split, f"{document.source}_{grade}" if grade else document.source


def _pairs(spans: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(spans[0::2], spans[1::2], strict=True))


def _joined(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Overlapping spans of several edits become one."""
    flat: list[int] = []
    for start, end in pairs:
        if flat and start <= flat[-1]:
            flat[-1] = max(flat[-1], end)
        else:
            flat += [start, end]
    return flat


class _Assembly:
    """Runs the mix's `assemble`, if it has one, and keeps account of what it leaves out."""

    def __init__(self, assemble: Assemble | None):
        self.assemble = assemble
        self.drops: list[bytes] = []
        # source -> {"in": [documents, bytes], "out": ..., "dropped": {reason: ...}}
        self.counts: dict[str, dict[str, Any]] = {}
        self._sizes: dict[str, tuple[str, int]] = {}

    def run(self, documents: Iterable[Document]) -> Iterator[Document]:
        if self.assemble is None:
            yield from documents
            return
        for item in self.assemble(self._entering(documents)):
            if isinstance(item, Document):
                _add(self._of(item.source)["out"], item.num_bytes)
                yield item
            else:
                source, size = self._sizes[item.id]
                _add(self._of(source)["dropped"].setdefault(item.reason, [0, 0]), size)
                self.drops.append(item.to_bytes())

    def _entering(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self._sizes[document.id] = document.source, document.num_bytes
            _add(self._of(document.source)["in"], document.num_bytes)
            yield document

    def _of(self, source: str) -> dict[str, Any]:
        return self.counts.setdefault(source, {"in": [0, 0], "out": [0, 0], "dropped": {}})


def _add(count: list[int], size: int) -> None:
    count[0] += 1
    count[1] += size


def assembly_counts(output: str | os.PathLike, shards: int) -> dict[str, dict[str, Any]]:
    """What the parts of a written corpus say of their assembly, summed, per source."""
    total: dict[str, dict[str, Any]] = {}
    for shard in range(shards):
        name = part_name(shard, shards, ".json")
        row = storage.read_json(storage.join(output, "corpus", _PARTS, name))
        for source, counts in row["assembly"].items():
            entry = total.setdefault(source, {"in": [0, 0], "out": [0, 0], "dropped": {}})
            for event in ("in", "out"):
                entry[event] = [a + b for a, b in zip(entry[event], counts[event], strict=True)]
            for reason, count in counts["dropped"].items():
                before = entry["dropped"].get(reason, [0, 0])
                entry["dropped"][reason] = [a + b for a, b in zip(before, count, strict=True)]
    return total


# --- samples ----------------------------------------------------------------------------------


class _Samples:
    """The few documents per outcome whose hash is smallest: the same few however it is run."""

    def __init__(self, seed: int):
        self.seed = seed
        self.heaps: dict[str, list[tuple[int, bytes]]] = {}

    def kept(self, document: Document) -> None:
        self._add(f"kept {document.source}", document, {})

    def dropped(self, document: Document, columns: Mapping[str, list], row: int) -> None:
        value = columns["value"][row]
        drop = {"stage": columns["stage"][row], "reason": columns["reason"][row],
                "value": 0.0 if value is None or np.isnan(value) else round(value, 4),
                "of_id": columns["of_id"][row] or ""}  # fmt: skip
        self._add(f"dropped {drop['reason']}", document, drop)

    def _add(self, outcome: str, document: Document, drop: dict[str, Any]) -> None:
        heap = self.heaps.setdefault(outcome, [])
        order = -hash63(document.id, self.seed, "sample")
        if len(heap) == SAMPLES and order <= heap[0][0]:
            return
        row = {"id": document.id, "source": document.source, "path": document.path or document.url,
               "bytes": document.num_bytes, "text": document.text[:EXCERPT], **drop}  # fmt: skip
        push = heapq.heappush if len(heap) < SAMPLES else heapq.heapreplace
        push(heap, (order, orjson.dumps(row)))

    def rows(self) -> list[list[Any]]:
        return sorted(
            [outcome, -order, orjson.loads(row)]
            for outcome, heap in self.heaps.items()
            for order, row in heap
        )


def _write_samples(output, documents: Documents, parts: _Parts) -> None:
    """samples.json: {"kept": [...], "dropped": [...]}; a duplicate comes with its survivor."""
    merged: dict[str, list[list[Any]]] = {}
    for shard in range(documents.shards):
        for row in parts.read(shard)["samples"]:
            merged.setdefault(row[0], []).append(row)
    chosen = [
        row for outcome in sorted(merged)
        for row in sorted(merged[outcome], key=lambda r: r[1])[:SAMPLES]
    ]  # fmt: skip
    kept = [row for outcome, _, row in chosen if outcome.startswith("kept ")]
    dropped = [row for outcome, _, row in chosen if outcome.startswith("dropped ")]
    survivors = find(output, {row["of_id"] for row in dropped if row["of_id"]})
    for row in dropped:
        if twin := survivors.get(row["of_id"]):
            row |= {"of_path": twin.path or twin.url, "of_text": twin.text[:EXCERPT]}
    storage.write_json(
        storage.join(parts.folder, "samples.json"), {"kept": kept, "dropped": dropped}
    )


def find(output: str | os.PathLike, ids: set[str]) -> dict[str, Document]:
    """The documents with these ids, by id; ids that do not exist are left out."""
    documents = open_documents(output)
    wanted: dict[int, list[str]] = {}
    for id in ids:
        wanted.setdefault(shard_of(id, documents.shards), []).append(id)
    found = {}
    for shard, some in sorted(wanted.items()):
        position = {
            id: row
            for row, id in enumerate(
                tables.read_attribute(output, "facts", shard, ["id"])["id"].to_pylist()
            )
        }
        with storage.local_copy(documents.path(shard)) as path:
            for id in some:
                if (row := position.get(id)) is not None:
                    (record,) = writers.read_array_record(path, row, row + 1)
                    found[id] = Document.from_bytes(record)
    return found
