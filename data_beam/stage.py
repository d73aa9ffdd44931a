"""What a job leaves behind and how it is continued: folders of co-partitioned shards.

Shard `s` of every folder of a corpus speaks of the same documents in the same order. Beside each
shard file lies a sidecar, FILE.json: the key it was made under (a hash of the settings, the code's
version and the inputs), its counts and its digest. A shard whose sidecar has the key of today is
not made again. The folder's manifest.json is written last, so a folder with a manifest is complete.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_beam.io import storage
from data_beam.io.writers import iter_array_record
from data_beam.schema import Document
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

MANIFEST = "manifest.json"


def part_name(shard: int, shards: int, suffix: str, prefix: str = "part") -> str:
    return f"{prefix}-{shard:05d}-of-{shards:05d}{suffix}"


@dataclasses.dataclass(frozen=True)
class Output:
    """A folder of shards that a job writes. `keys` has one key per shard."""

    folder: str
    kind: str
    suffix: str
    keys: tuple[str, ...]

    @property
    def shards(self) -> int:
        return len(self.keys)

    def path(self, shard: int) -> str:
        return storage.join(self.folder, part_name(shard, self.shards, self.suffix))

    def sidecar(self, shard: int) -> dict[str, Any] | None:
        """What is known of a finished shard; None when it must be made (again)."""
        path = self.path(shard)
        if not (storage.exists(path + ".json") and storage.exists(path)):
            return None
        try:
            row = storage.read_json(path + ".json")
        except UserError:
            return None
        return row if isinstance(row, dict) and row.get("key") == self.keys[shard] else None

    def pending(self) -> list[int]:
        """Shards that are missing, or were made under another key."""
        return [shard for shard in range(self.shards) if self.sidecar(shard) is None]

    def finish(self, shard: int, records: int, **counts: Any) -> None:
        """Writes the sidecar of a shard file that is in its place."""
        path = self.path(shard)
        row = {
            "key": self.keys[shard], "name": part_name(shard, self.shards, self.suffix),
            "records": records, "digest": storage.digest(path), **counts,
        }  # fmt: skip
        storage.write_json(path + ".json", row)

    def is_complete(self, settings: Any, upstream: Mapping[str, str]) -> bool:
        path = storage.join(self.folder, MANIFEST)
        if not storage.exists(path):
            return False
        manifest = storage.read_json(path)
        return manifest.get("key") == _key(self, settings, upstream) and not self.pending()

    def start(self) -> None:
        """Withdraws the manifest of what is about to be changed, and the shards of another
        division of the documents."""
        storage.delete(storage.join(self.folder, MANIFEST))
        wanted = {part_name(shard, self.shards, self.suffix) for shard in range(self.shards)}
        if storage.is_remote(self.folder) or os.path.isdir(self.folder):
            for info in storage.list_files(self.folder):
                name = info.path.rsplit("/", 1)[-1]
                if name.startswith("part-") and name.removesuffix(".json") not in wanted:
                    storage.delete(info.path)

    def complete(self, settings: Any, upstream: Mapping[str, str], **extra: Any) -> dict[str, Any]:
        """Writes the manifest and returns it. A shard without a sidecar is a UserError."""
        rows = [self.sidecar(shard) for shard in range(self.shards)]
        if None in rows:
            raise UserError(
                f"{self.path(rows.index(None))} was not written; run the same command again"
            )
        shards = [{k: v for k, v in row.items() if k != "key"} for row in rows if row]
        manifest = {
            "kind": self.kind, "key": _key(self, settings, upstream), "settings": settings,
            "upstream": dict(upstream), "shards": shards,
            "records": sum(row["records"] for row in shards),
            "digest": fingerprint([row["digest"] for row in shards]), **extra,
        }  # fmt: skip
        storage.write_json(storage.join(self.folder, MANIFEST), manifest)
        return manifest


def _key(output: Output, settings: Any, upstream: Mapping[str, str]) -> str:
    return fingerprint([output.kind, output.keys, settings, dict(upstream)])


def read_manifest(folder: str | os.PathLike, kind: str) -> dict[str, Any]:
    """The manifest of a complete folder. One without it, or of another kind, is a UserError."""
    path = storage.join(folder, MANIFEST)
    if not storage.exists(path):
        raise UserError(f"{folder} holds no complete {kind} (no {MANIFEST}); run its job first")
    manifest = storage.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise UserError(f"{path} does not describe {kind}; point at a folder that does")
    return manifest


@dataclasses.dataclass(frozen=True)
class Documents:
    """The document shards of a corpus folder; small, so that workers can have a copy."""

    folder: str
    names: tuple[str, ...]
    counts: tuple[int, ...]
    digests: tuple[str, ...]
    num_bytes: tuple[int, ...]

    @property
    def shards(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        return fingerprint(self.digests)

    def path(self, shard: int) -> str:
        return storage.join(self.folder, self.names[shard])

    def read(self, shard: int, batch: int = 64) -> Iterator[Document]:
        """The documents of a shard, in the order of their ids, `batch` in memory at a time."""
        if not self.counts[shard]:
            return
        with storage.local_copy(self.path(shard)) as path:
            for record in iter_array_record(path, batch):
                yield Document.from_bytes(record)


def open_documents(output: str | os.PathLike) -> Documents:
    """The documents below the output folder of an ingest job."""
    folder = storage.join(output, "documents")
    rows: Sequence[dict[str, Any]] = read_manifest(folder, "documents")["shards"]
    return Documents(
        folder,
        tuple(row["name"] for row in rows),
        tuple(row["records"] for row in rows),
        tuple(row["digest"] for row in rows),
        tuple(row["bytes"] for row in rows),
    )
