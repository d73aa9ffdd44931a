"""A corpus of synthetic retrieval (data/haystacks.py), as the corpus job would leave it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from internlm2_jax import files
from internlm2_jax.data.haystacks import filler_text, recall_texts

FILLER = "filler"
_SENTENCES = 40


def haystacks(
    folder: Path,
    *,
    lengths: Mapping[str, int],
    tokens: Mapping[str, int],
    held_out: int = 64,
    fillers: int = 200,
    seed: int = 0,
) -> None:
    """Writes `folder`/corpus: a source for each entry of `lengths`, and hay.

    Args:
        lengths: source -> tokens of a text; a little less than the row that is to hold it.
        tokens: source -> tokens of all its texts to train on.
        held_out: texts of each source in the validation split.
        fillers: documents without facts in the validation split: the hay of needle tests.
    """
    from data_beam.io import writers
    from data_beam.schema import Document

    rows = []

    def write(split: str, source: str, texts: Iterable[str]) -> None:
        name = writers.shard_name(split, source, 0, 1)
        records = [
            Document(f"{i:032x}", text, source, path=f"{split}/{source}/{i}").to_bytes()
            for i, text in enumerate(texts)
        ]
        writers.write_array_record(folder / "corpus" / name, records, writers.DOCUMENTS_OPTIONS)
        rows.append({"name": name, "split": split, "source": source, "documents": len(records)})

    for source, length in lengths.items():
        write("train", source, recall_texts(tokens[source] // length, length, seed))
        write("validation", source, recall_texts(held_out, length, -1 - seed))
    hay = (filler_text(_SENTENCES, f"{seed} {i}") for i in range(fillers))
    write("validation", FILLER, hay)
    settings = [dict(lengths), dict(tokens), held_out, fillers, seed]
    files.write_json(
        folder / "corpus" / "manifest.json",
        {"kind": "corpus", "fingerprint": files.fingerprint(settings), "shards": rows},
    )
    files.write_json(
        folder / "result.json", {"documents": {r["source"]: r["documents"] for r in rows}}
    )
