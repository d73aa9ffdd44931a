"""Tokenized corpora on disk: `manifest.json` and the ArrayRecord shards it names.

`data_beam/cache.py` writes such a folder. `TokenSource` reads a source of a split once, in batches,
into one flat array (two bytes a token when the vocabulary allows); from then on any document is a
slice. `TokenReader` reads only what is asked for, through the index beside each shard. `open_split`
takes the one or the other by a source's size. Whatever is missing, damaged or made with another
tokenizer is found here, not in training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from internlm2_jax.data.records import INDEX_SUFFIX, record_arrays
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


class TokenReader:
    """The documents of one source of one split, read from the disk when they are asked for.

    `reader[i]` is document i, `len(reader)` their number, so grain takes it as a source; `tokens`
    counts across documents. The record read last is kept, so reading in order decodes each once,
    while a document in a random place costs its whole record (about 0.4 ms for 64k tokens).

    Attributes: `num_tokens`, `vocab_size`, `name`; `before` [records + 1, 2] int64, the documents
    and tokens before each record, the totals last.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str,
        source: str,
        *,
        tokenizer_sha256: str | None = None,
        shards: Sequence[str] | None = None,
    ):
        """Reads the indices only. `shards` are some of the source's, None all."""
        folder = Path(folder)
        manifest = read_manifest(folder, tokenizer_sha256=tokenizer_sha256)
        entry = _entry(_entry(manifest["splits"], split, "split", folder), source, "source", folder)
        self.name = f"{split}/{source}"
        self.vocab_size = int(manifest["vocab_size"])
        names = entry["shards"] if shards is None else shards
        self._shards = [folder / name for name in names]
        indices = [_index(shard) for shard in self._shards]
        # [records + 1, 2] over all shards: documents and tokens before each record.
        totals = np.cumsum([[[0, 0]], *(index[-1:] for index in indices)], axis=0)[:, 0]
        parts = [index[:-1] + total for index, total in zip(indices, totals, strict=False)]
        self.before = np.concatenate([*parts, totals[-1:]])
        self._first = np.cumsum([0, *(len(part) for part in parts)])  # record of each shard
        self._readers: dict[int, Any] = {}
        self._kept: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.before[-1, 1])

    def __len__(self) -> int:
        return int(self.before[-1, 0])

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of a document, bos and eos included [length] uint32."""
        index = range(len(self))[index]
        record = int(np.searchsorted(self.before[:, 0], index, side="right")) - 1
        ends, tokens = self._record(record)
        at = index - int(self.before[record, 0])
        return tokens[ends[at - 1] if at else 0 : ends[at]]

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of all documents end to end."""
        start, end, _ = slice(start, end).indices(self.num_tokens)
        first = int(np.searchsorted(self.before[:, 1], start, side="right")) - 1
        parts = [np.zeros(0, np.uint32)]
        for record in range(first, len(self.before) - 1):
            before = int(self.before[record, 1])
            if before >= end:
                break
            parts.append(self._record(record)[1][max(start - before, 0) : end - before])
        return np.concatenate(parts)

    def records(
        self, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(lengths of the documents, tokens) of records [first, last), in order, many a read."""
        first, last, _ = slice(first, last).indices(len(self.before) - 1)
        while first < last:
            shard = int(np.searchsorted(self._first, first, side="right")) - 1
            end = min(first + RECORDS_A_READ, last, int(self._first[shard + 1]))
            yield from self._read(shard, first, end)
            first = end

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: grain copies sources to other processes."""
        return self.__dict__ | {"_readers": {}, "_kept": None}

    def _record(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """(ends of the documents, tokens) of a record."""
        if self._kept is None or self._kept[0] != record:
            shard = int(np.searchsorted(self._first, record, side="right")) - 1
            ((lengths, tokens),) = self._read(shard, record, record + 1)
            self._kept = record, np.cumsum(lengths, dtype=np.int64), tokens
        return self._kept[1:]

    def _read(self, number: int, first: int, last: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(lengths, tokens) of records [first, last), all of one shard; checks the index."""
        shard, before = self._shards[number], int(self._first[number])
        try:
            if number not in self._readers:
                self._readers[number] = ArrayRecordReader(str(shard))
            data = self._readers[number].read(list(range(first - before, last - before)))
            found = list(map(record_arrays, data))
            counts = [(len(lengths), len(tokens)) for lengths, tokens in found]
            if not np.array_equal(counts, np.diff(self.before[first : last + 1], axis=0)):
                raise ValueError("a record is not as its index says")
        except (RuntimeError, ValueError, IndexError) as error:
            raise _damaged(shard, str(error)) from error
        return found


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


def open_split(
    folder: str | os.PathLike,
    split: str,
    *,
    in_memory: int,
    tokenizer_sha256: str | None = None,
) -> dict[str, TokenSource | TokenReader]:
    """Every source of a split: in memory up to `in_memory` tokens, else read when asked for."""
    entries = _entry(read_manifest(folder)["splits"], split, "split", Path(folder))
    return {
        name: (TokenSource if int(entries[name]["tokens"]) <= in_memory else TokenReader)(
            folder, split, name, tokenizer_sha256=tokenizer_sha256
        )
        for name in sorted(entries)
    }


def _entry(entries: dict[str, Any], name: str, kind: str, folder: Path) -> Any:
    if name not in entries:
        raise UserError(
            f"{folder} has no {kind} {name!r}; it has {', '.join(sorted(entries)) or 'none'}"
        )
    return entries[name]


def _index(shard: Path) -> np.ndarray:
    path = shard.with_name(shard.name + INDEX_SUFFIX)
    for part in (shard, path):
        if not part.is_file():
            raise UserError(
                f"{part} is missing though its manifest names it; tokenize the corpus again"
            )
    try:
        index = np.load(path)
        if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 2 or len(index) < 1:
            raise ValueError("it is no table of documents and tokens")
    except (ValueError, EOFError, OSError) as error:
        raise _damaged(path, str(error)) from error
    return index


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
