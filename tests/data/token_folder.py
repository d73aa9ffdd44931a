"""Writes folders of tokens as data_beam/cache.py does, without Beam."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from internlm2_jax.data.records import INDEX_SUFFIX, index_of, pack_record
from internlm2_jax.files import write_json


def write_tokens(
    folder: Path,
    splits: dict[str, dict[str, list[np.ndarray]]],
    *,
    vocab_size: int,
    sha256: str = "",
    per_record: int = 10,
    shards: int = 1,
) -> Path:
    """`splits` are {split: {source: documents}}, a document being its token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, dict[str, dict]] = {}
    for split, sources in splits.items():
        for source, documents in sources.items():
            names = []
            for number, part in enumerate(np.array_split(np.arange(len(documents)), shards)):
                names.append(f"{split}-{source}-{number}.arrayrecord")
                writer = ArrayRecordWriter(str(folder / names[-1]), "group_size:1")
                counts = []
                for first in range(0, len(part), per_record):
                    group = [documents[i] for i in part[first : first + per_record]]
                    writer.write(pack_record(group))
                    counts.append((len(group), sum(map(len, group))))
                writer.close()
                np.save(folder / (names[-1] + INDEX_SUFFIX), index_of(counts))
            tokens = sum(map(len, documents))
            entry = {"shards": names, "documents": len(documents), "bytes": tokens}
            entries.setdefault(split, {})[source] = entry | {"tokens": tokens}
    write_json(
        folder / "manifest.json",
        {"tokenizer_sha256": sha256, "vocab_size": vocab_size, "splits": entries},
    )
    return folder


def random_documents(seed: int, count: int, longest: int, vocab_size: int) -> list[np.ndarray]:
    """Documents that begin with 1, end with 2 and count upwards in between."""
    rng = np.random.default_rng(seed)
    return [
        np.array([1, *((np.arange(n) + rng.integers(vocab_size)) % (vocab_size - 3) + 3), 2])
        for n in rng.integers(2, longest, count)
    ]
