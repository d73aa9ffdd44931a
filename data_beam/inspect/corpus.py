"""The output folder of the pipelines, opened for looking at it. Needs no Beam.

What was not run yet is empty, never an error; what is there but damaged is a UserError that names
it. Columns of attributes are read shard by shard, documents one by one at their place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_beam import stage, tables
from data_beam.io import storage, writers
from data_beam.mix.rules import Rules, from_json
from data_beam.schema import DeadLetter, Document, shard_of
from internlm2_jax.errors import UserError
from internlm2_jax.report.load import Record

DECISION = "decision"
FACTS = "facts"
LANGUAGE = "language"
FUNNEL, SAMPLES, MANIFEST = "corpus/funnel.json", "corpus/samples.json", "corpus/manifest.json"
CONTAMINATION = "attributes/contamination/report.json"


class Place(NamedTuple):
    """Where a document stands: its shard, and its row there."""

    shard: int
    row: int


class Corpus:
    """An output folder.

    `documents` are its document shards; `attributes` the manifests of its complete attributes by
    name; `rules` those by which it was decided (empty before that); `shards` the numbers of the
    shards to look at.
    """

    def __init__(self, output: str | os.PathLike, max_shards: int | None = None):
        """Opens the folder `output`; with `max_shards`, only so many of its shards are looked at,
        spread evenly. A document's shard is a hash of its content, so they are a fair sample."""
        self.output = os.fspath(output)
        self.documents = stage.open_documents(output)
        self.attributes = _attributes(self.output)
        self._schemas: dict[str, pa.Schema] = {}
        if FACTS not in self.attributes:
            raise UserError(
                f"{output} has no attribute {FACTS!r}; compute attributes first (any pipeline does)"
            )
        decision = self.attributes.get(DECISION, {})
        self.rules: Rules = {
            source: tuple(map(from_json, rows))
            for source, rows in decision.get("settings", {}).get("rules", {}).items()
        }
        count = self.documents.shards
        if max_shards is not None and max_shards < 1:
            raise UserError(f"max_shards {max_shards} is not at least 1")
        chosen = min(max_shards or count, count)
        self.shards = sorted({shard * count // chosen for shard in range(chosen)})

    @property
    def name(self) -> str:
        return self.output.rstrip("/").rsplit("/", 1)[-1]

    @property
    def is_decided(self) -> bool:
        return DECISION in self.attributes

    @property
    def is_sampled(self) -> bool:
        """Whether some shards are left out."""
        return len(self.shards) < self.documents.shards

    def outdated(self) -> list[str]:
        """Attributes that were computed again after the decision was made from them."""
        upstream = self.attributes.get(DECISION, {}).get("upstream", {})
        return sorted(
            name
            for name, digest in upstream.items()
            if name in self.attributes and self.attributes[name]["digest"] != digest
        )

    def json(self, path: str) -> Any:
        """A JSON file below the folder; None when it is not there."""
        full = storage.join(self.output, path)
        return storage.read_json(full) if storage.exists(full) else None

    def record(self, path: str) -> Record:
        """A JSON object below the folder, empty when it is not there."""
        value = self.json(path)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{storage.join(self.output, path)} holds no JSON object; delete it")
        return Record(value or {}, path)

    def has(self, column: str) -> bool:
        """Whether "attribute.column" can be read."""
        attribute, _, name = column.partition(".")
        return attribute in self.attributes and name in self.schema(attribute).names

    def schema(self, attribute: str) -> pa.Schema:
        if attribute not in self._schemas:
            with storage.local_copy(self._path(attribute, 0)) as path:
                try:
                    self._schemas[attribute] = pq.read_schema(path)
                except (OSError, pa.ArrowInvalid) as error:
                    raise UserError(
                        f"{path} is damaged ({error}); delete it and run the job again"
                    ) from error
        return self._schemas[attribute]

    def columns(self, shard: int, wanted: Iterable[str]) -> dict[str, pa.ChunkedArray]:
        """ "attribute.column" -> its values for the documents of a shard, in their order."""
        by_attribute: dict[str, list[str]] = {}
        for column in dict.fromkeys(wanted):
            attribute, _, name = column.partition(".")
            by_attribute.setdefault(attribute, []).append(name)
        found: dict[str, pa.ChunkedArray] = {}
        for attribute, names in by_attribute.items():
            if attribute not in self.attributes:
                raise UserError(
                    f"{self.output} has no attribute {attribute!r}, which its rules read; run the "
                    "pipeline again"
                )
            with storage.local_copy(self._path(attribute, shard)) as path:
                table = tables.read_table(path, names)
            if len(table) != self.documents.counts[shard]:
                raise UserError(
                    f"{self._path(attribute, shard)} has {len(table):,} rows for "
                    f"{self.documents.counts[shard]:,} documents; delete it, run the job again"
                )
            found |= {f"{attribute}.{name}": table[name] for name in names}
        return found

    def row(self, attribute: str, place: Place) -> pa.Table:
        """All columns of an attribute for one document; reads its row group alone."""
        path = self._path(attribute, place.shard)
        try:
            with storage.local_copy(path) as local, pq.ParquetFile(local) as file:
                left = place.row
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if left < count:
                        return file.read_row_group(group).slice(left, 1)
                    left -= count
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{path} is damaged ({error}); delete it and run the job again"
            ) from error
        raise UserError(f"{path} has no row {place.row}; delete it and run the job again")

    def _path(self, attribute: str, shard: int) -> str:
        name = self.attributes[attribute]["shards"][shard]["name"]
        return storage.join(tables.folder_of(self.output, attribute), name)

    @property
    def lang(self) -> str:
        """The column that rules and tables take a document's language from."""
        return f"{LANGUAGE}.lang" if self.has(f"{LANGUAGE}.lang") else f"{FACTS}.lang"

    def read(self, places: Iterable[Place]) -> dict[Place, Document]:
        """The documents at some places, each shard opened once."""
        found: dict[Place, Document] = {}
        by_shard: dict[int, list[Place]] = {}
        for place in places:
            by_shard.setdefault(place.shard, []).append(place)
        for shard, some in sorted(by_shard.items()):
            with storage.local_copy(self.documents.path(shard)) as path:
                for place in some:
                    (record,) = writers.read_array_record(path, place.row, place.row + 1)
                    found[place] = Document.from_bytes(record)
        return found

    def find(self, ids: Iterable[str]) -> dict[str, Place]:
        """The places of documents, by id; unknown ids are left out."""
        found: dict[str, Place] = {}
        by_shard: dict[int, list[str]] = {}
        for id in sorted(set(ids)):
            by_shard.setdefault(shard_of(id, self.documents.shards), []).append(id)
        for shard, some in sorted(by_shard.items()):
            here = np.array(self.columns(shard, ["facts.id"])["facts.id"].to_pylist(), "U32")
            rows = np.searchsorted(here, some)
            for id, row in zip(some, rows.tolist(), strict=True):
                if row < len(here) and here[row] == id:
                    found[id] = Place(shard, row)
        return found

    def dead_letters(self, shards: Sequence[int] | None = None) -> Iterator[DeadLetter]:
        """What gave no document, one by one (of some shards only)."""
        folder = storage.join(self.output, "dead_letters")
        if not storage.exists(storage.join(folder, stage.MANIFEST)):
            return
        rows = stage.read_manifest(folder, "dead_letters")["shards"]
        for shard in range(len(rows)) if shards is None else shards:
            with storage.local_copy(storage.join(folder, rows[shard]["name"])) as path:
                for line in writers.read_lines_zst(path):
                    yield DeadLetter.from_bytes(line)

    def dead_counts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(source, reason) -> records and bytes that gave no document, of all shards."""
        manifest = self.record("dead_letters/manifest.json")
        sums: dict[tuple[str, str], tuple[int, int]] = {}
        for row in manifest.records("shards"):
            for key, count in row.value.get("sources", {}).items():
                source, _, reason = key.partition("\t")
                before = sums.get((source, reason), (0, 0))
                sums[source, reason] = (before[0] + count[0], before[1] + count[1])
        return sums


def _attributes(output: str) -> dict[str, Mapping[str, Any]]:
    """The manifests of the attributes that are complete."""
    found = {}
    for info in storage.list_files(storage.join(output, "attributes", "*", stage.MANIFEST)):
        manifest = storage.read_json(info.path)
        if isinstance(manifest, dict) and manifest.get("kind") == "attribute":
            found[info.path.replace(os.sep, "/").split("/")[-2]] = manifest
    return dict(sorted(found.items()))


def _damaged(path: str | os.PathLike) -> UserError:
    return UserError(f"{path} is damaged; delete it and run the job again")
