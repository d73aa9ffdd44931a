"""Tokenized corpora on disk: `manifest.json` and the ArrayRecord shards it names.

`data_beam/cache.py` writes such a folder. A source of a split is read once, in batches, into one
flat array (two bytes a token when the vocabulary allows); from then on any document is a slice.
Whatever is missing, damaged or made with another tokenizer is found here, not in training.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from internlm2_jax.data.records import record_arrays
from internlm2_jax.errors import UserError
from internlm2_jax.files import read_json

RECORDS_A_READ = 64


class TokenSource:
    """The documents of one source of one split, in memory.

    Attributes: `tokens` [all tokens] uint16 or uint32; `lengths` [documents] int64; `num_bytes`,
    the UTF-8 bytes of the text (for bits per byte); `vocab_size`; `name`, "split/source".
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str,
        source: str,
        *,
        tokenizer_sha256: str | None = None,
    ):
        """Reads every shard. With `tokenizer_sha256`, refuses tokens of another tokenizer."""
        folder = Path(folder)
        manifest = read_manifest(folder, tokenizer_sha256=tokenizer_sha256)
        entry = _entry(_entry(manifest["splits"], split, "split", folder), source, "source", folder)
        self.name = f"{split}/{source}"
        self.vocab_size = int(manifest["vocab_size"])
        self.num_bytes = int(entry["bytes"])
        self.tokens = np.empty(
            int(entry["tokens"]), np.uint16 if self.vocab_size <= 2**16 else np.uint32
        )
        self.lengths = np.empty(int(entry["documents"]), np.int64)
        self._read([folder / name for name in entry["shards"]])
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def doc(self, index: int) -> np.ndarray:
        """Tokens of one document, bos and eos included: a view [length]."""
        end = self._ends[index]
        return self.tokens[end - self.lengths[index] : end]

    def _read(self, shards: list[Path]) -> None:
        documents = tokens = 0
        for shard in shards:
            for record in _records(shard):
                try:
                    record_lengths, record_tokens = record_arrays(record)
                    if len(record_tokens) and record_tokens.max() >= self.vocab_size:
                        raise ValueError(f"it holds a token past the vocabulary {self.vocab_size}")
                    self.lengths[documents : documents + len(record_lengths)] = record_lengths
                    self.tokens[tokens : tokens + len(record_tokens)] = record_tokens
                except ValueError as error:
                    raise _damaged(shard, str(error)) from error
                documents += len(record_lengths)
                tokens += len(record_tokens)
        if (documents, tokens) != (len(self.lengths), len(self.tokens)):
            raise UserError(
                f"{self.name} in {shards[0].parent if shards else 'its folder'} holds {documents} "
                f"documents and {tokens} tokens but its manifest says {len(self.lengths)} and "
                f"{len(self.tokens)}; tokenize the corpus again"
            )


def read_manifest(
    folder: str | os.PathLike, *, tokenizer_sha256: str | None = None
) -> dict[str, Any]:
    """`manifest.json` of a tokenized corpus, checked for its fields and its tokenizer."""
    path = Path(folder) / "manifest.json"
    manifest = read_json(path)
    fields = ("tokenizer_sha256", "vocab_size", "splits")
    missing = [f for f in fields if not isinstance(manifest, dict) or f not in manifest]
    if missing:
        raise UserError(
            f"{path} has no {missing[0]!r}: it is not the manifest of a tokenized corpus"
        )
    found = manifest["tokenizer_sha256"]
    if tokenizer_sha256 not in (None, found):
        raise UserError(
            f"{path.parent} was tokenized with another tokenizer (sha256 {found[:12]}, yours is "
            f"{str(tokenizer_sha256)[:12]}); tokenize the corpus again or take its tokenizer"
        )
    return manifest


def load_split(
    folder: str | os.PathLike, split: str, *, tokenizer_sha256: str | None = None
) -> dict[str, TokenSource]:
    """Every source of a split by name, in the order of the names."""
    manifest = read_manifest(folder, tokenizer_sha256=tokenizer_sha256)
    names = sorted(_entry(manifest["splits"], split, "split", Path(folder)))
    return {n: TokenSource(folder, split, n, tokenizer_sha256=tokenizer_sha256) for n in names}


def _entry(entries: dict[str, Any], name: str, kind: str, folder: Path) -> Any:
    if name not in entries:
        raise UserError(
            f"{folder} has no {kind} {name!r}; it has {', '.join(sorted(entries)) or 'none'}"
        )
    return entries[name]


def _records(shard: Path):
    """The records of a shard, read in batches."""
    if not shard.is_file():
        raise UserError(
            f"{shard} is missing though its manifest names it; tokenize the corpus again"
        )
    try:
        reader = ArrayRecordReader(str(shard))
        count = reader.num_records()
        for start in range(0, count, RECORDS_A_READ):
            yield from reader.read(start, min(count, start + RECORDS_A_READ))
        reader.close()  # raises when the file was no ArrayRecord, which so far looked empty
    except (RuntimeError, ValueError, IndexError) as error:
        raise _damaged(shard, str(error)) from error


def _damaged(shard: Path, why: str) -> UserError:
    why = " ".join(why.split())[:200]
    return UserError(f"{shard} is damaged ({why}); delete the folder and tokenize the corpus again")
