"""Small corpora and models for the tests of scoring."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax

from data_beam.io import writers
from data_beam.schema import Document, document_id, shard_of
from data_beam.stage import Output
from internlm2_jax import files
from internlm2_jax.data.tokenizer import Tokenizer, train_tokenizer
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.train.checkpoint import Checkpoints, save_model_json


def train_vocabulary(folder: Path, texts: Sequence[str], size: int = 512) -> Path:
    path = folder / "tokenizer.model"
    train_tokenizer(texts, path, vocab_size=size)
    return path


def source_texts() -> list[str]:
    """Real texts that every checkout has: this project's own sources."""
    root = Path(__file__).parents[2]
    return [path.read_text() for path in sorted((root / "internlm2_jax/data").glob("*.py"))]


def write_documents(output: Path, texts: Sequence[str], shards: int = 2) -> list[Document]:
    """OUT/documents as ingest writes them; returns the documents in the order of the shards."""
    documents = [Document(document_id("text", f"{i}", t), t, "text") for i, t in enumerate(texts)]
    target = Output(str(output / "documents"), "documents", ".arrayrecord", ("key",) * shards)
    found = []
    for shard in range(shards):
        mine = sorted(d for d in documents if shard_of(d.id, shards) == shard)
        path = Path(target.path(shard))
        writers.write_array_record(path, [d.to_bytes() for d in mine], "group_size:1")
        target.finish(shard, len(mine), bytes=sum(d.num_bytes for d in mine))
        found += mine
    target.complete({}, {})
    return found


def untrained_model(
    folder: Path, vocabulary_file: Path, head: str = "scalar", scale: float = 30.0, **changes: int
) -> Path:
    """A stage folder with a tiny model drawn at random; `scale` spreads the scores of its head,
    `changes` are fields of its size."""
    vocabulary = Tokenizer.load(vocabulary_file)
    cfg = dataclasses.replace(preset("tiny"), vocab_size=vocabulary.vocab_size, **changes)
    params = build(cfg, head=head).init(jax.random.key(0))
    params["head"] = jax.tree.map(lambda x: scale * x, params["head"])
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"params": params})
    checkpoints.close()
    save_model_json(folder, cfg, head)
    shutil.copy(vocabulary_file, folder / "tokenizer.model")
    return folder


def untrained_classifier(folder: Path, vocabulary_file: Path, row_length: int = 64) -> Path:
    untrained_model(folder, vocabulary_file)
    described = {
        "backend": "decoder", "pooling": "mean", "row_length": row_length, "judge": "worst",
        "tokenizer_sha256": Tokenizer.load(vocabulary_file).sha256,
        "calibration": {"temperature": 2.0, "bias": 0.5},
        "cutoff": {"rule": "largest F1", "threshold": 0.625},
    }  # fmt: skip
    files.write_json(folder / "classifier.json", described)
    return folder
