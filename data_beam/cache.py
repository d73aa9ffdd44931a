"""Corpus -> tokens: ArrayRecord shards that training reads without touching text again.

Each corpus shard becomes one token shard with the documents in the same order, as
`[bos] tokens [eos]`. A record packs documents up to 64k tokens (`internlm2_jax.data.records`),
because reading a record costs as much for one document as for many.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from data_beam import progress, runners  # runners first: it imports Beam without its noise
from data_beam.io import corpus_folder, writers
from data_beam.schema import Document
from internlm2_jax.data.records import pack_record
from internlm2_jax.errors import UserError
from internlm2_jax.files import atomic_write, whole_folder, write_json

beam = runners.beam
TOKENIZER = "internlm2_jax.data.tokenizer:Tokenizer"
TOKENS_PER_RECORD = 1 << 16
# Documents tokenized as one element; also the most that a record can hold.
DOCUMENTS_PER_BATCH = 128
TOKENS_OPTIONS = "group_size:1,zstd:1"
_PARTS = "parts"


def load_tokenizer(name: str, model: str | Path) -> Any:
    """The object of the class `name` ("module:Class") for a model file: `Class.load(model)`, with
    `vocab_size`, `bos_id`, `eos_id`, `sha256` and `encode(text) -> ids`."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute).load(Path(model))
    except (ImportError, AttributeError) as error:
        raise UserError(f"tokenizer class {name} cannot be loaded: {error}") from error


def run(
    corpus_path: str | Path,
    tokenizer_model: str | Path,
    output: str | Path,
    *,
    tokenizer: str = TOKENIZER,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Tokenizes the corpus in the folder `corpus_path` into the folder `output`.

    Returns the manifest: tokenizer_sha256, vocab_size, and per split and source the shard names and
    the numbers of documents, tokens (bos and eos included) and UTF-8 bytes of text. Equal inputs
    give equal bytes; the folder appears whole or not at all.
    """
    output, corpus_path = Path(output), Path(corpus_path)
    corpus_folder.check_output(output, "tokens", corpus_path)
    manifest = corpus_folder.read_manifest(corpus_path)
    loaded = load_tokenizer(tokenizer, tokenizer_model)
    shards = [row for row in manifest["shards"] if row["documents"]]
    batches = [
        (row["name"], start, min(start + DOCUMENTS_PER_BATCH, row["documents"]))
        for row in shards
        for start in range(0, row["documents"], DOCUMENTS_PER_BATCH)
    ]
    with whole_folder(output) as folder:
        pipeline = runners.pipeline(beam_options)
        _build(pipeline, batches, corpus_path, tokenizer, Path(tokenizer_model), folder)
        with progress.show("tokenize", sum(row["documents"] for row in shards), "document"):
            runners.run(pipeline)
        result = {
            "kind": "tokens",
            "tokenizer_sha256": loaded.sha256,
            "vocab_size": loaded.vocab_size,
            "corpus": manifest["fingerprint"],
            "splits": _splits(folder, shards),
        }
        shutil.rmtree(folder / _PARTS)
        result["digests"] = {
            path.name: writers.file_digest(path) for path in sorted(folder.glob("*.arrayrecord"))
        }
        write_json(folder / "manifest.json", result)
    return result


class _Tokenize(beam.DoFn):
    """(shard, first document, end) -> (shard, (first document, counts, packed records))."""

    def __init__(self, folder: Path, tokenizer: str, model: Path):
        super().__init__()
        self.folder, self.tokenizer, self.model = str(folder), tokenizer, str(model)

    def setup(self):
        self.loaded = load_tokenizer(self.tokenizer, self.model)

    def process(self, element):
        name, start, end = element
        encoded, num_bytes = [], 0
        for record in writers.read_array_record(Path(self.folder, name), start, end):
            text = Document.from_bytes(record).text
            encoded.append([self.loaded.bos_id, *self.loaded.encode(text), self.loaded.eos_id])
            num_bytes += len(text.encode())
            progress.bump(num_bytes=len(text.encode()))
        counts = (len(encoded), sum(map(len, encoded)), num_bytes)
        yield name, (start, counts, pack(encoded))


def pack(documents: Sequence[list[int]], capacity: int = TOKENS_PER_RECORD) -> list[bytes]:
    """Records of consecutive documents with at most `capacity` tokens; a longer document has a
    record of its own."""
    records: list[bytes] = []
    group: list[list[int]] = []
    size = 0
    for document in documents:
        if group and size + len(document) > capacity:
            records.append(pack_record(group))
            group, size = [], 0
        group.append(document)
        size += len(document)
    return [*records, pack_record(group)] if group else records


class _WriteShard(beam.DoFn):
    """One shard from its batches, and a part of the manifest."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = str(folder)

    def process(self, element):
        name, group = element
        batches = sorted(group)
        records = [record for _, _, some in batches for record in some]
        writers.write_array_record(Path(self.folder, name), records, TOKENS_OPTIONS)
        documents, tokens, num_bytes = (
            sum(counts[i] for _, counts, _ in batches) for i in range(3)
        )
        part = {"documents": documents, "tokens": tokens, "bytes": num_bytes}
        atomic_write(Path(self.folder, _PARTS, f"{name}.json"), orjson.dumps(part))


def _build(pipeline, batches, corpus_path: Path, tokenizer: str, model: Path, folder: Path) -> None:
    (
        pipeline
        | "Batches" >> beam.Create(batches)
        | "Spread" >> beam.Reshuffle()
        | "Tokenize"
        >> beam.ParDo(_Tokenize(corpus_path, tokenizer, model)).with_output_types(
            beam.typehints.KV[str, tuple]
        )
        | "GroupShards" >> beam.GroupByKey()
        | "WriteShards" >> beam.ParDo(_WriteShard(folder))
    )


def _splits(folder: Path, shards: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    for row in shards:
        counts = orjson.loads((folder / _PARTS / f"{row['name']}.json").read_bytes())
        empty = {"shards": [], "documents": 0, "tokens": 0, "bytes": 0}
        entry = splits.setdefault(row["split"], {}).setdefault(row["source"], empty)
        entry["shards"].append(row["name"])
        for name, value in counts.items():
            entry[name] += value
    return splits
