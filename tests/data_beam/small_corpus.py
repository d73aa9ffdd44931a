"""A corpus folder made of given documents, for tests of what comes after reading."""

from __future__ import annotations

from pathlib import Path

from data_beam.pipelines import ingest
from data_beam.schema import Document, document_id, shard_of
from data_beam.stage import Documents, open_documents


def doc(text: str, source: str = "text", **fields) -> Document:
    id = document_id(source, fields.get("path", ""), text, fields.get("repo", ""))
    return Document(id, text, source, **fields)


def write_documents(output: Path, documents: list[Document], shards: int = 2) -> Documents:
    """OUTPUT/documents and OUTPUT/dead_letters, as ingest leaves them."""
    targets = ingest._outputs(output, shards, "test")
    for shard in range(shards):
        rows = sorted((d.id, d.to_bytes()) for d in documents if shard_of(d.id, shards) == shard)
        ingest._write(shard, rows, *targets)
    for target in targets:
        target.complete({}, {})
    return open_documents(output)
