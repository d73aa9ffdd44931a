"""Corpus -> tokens: ArrayRecord shards that training reads without touching text again.

Each corpus shard becomes one token shard with the documents in the same order, as
`[bos] tokens [eos]`. A record packs documents up to 64k tokens (`internlm2_jax.data.records`),
because reading a record costs as much for one document as for many; an index beside the shard says
where each record begins. A worker makes a whole shard, so no text and no token is shuffled.

    OUT/job.json                       says that the folder is this job's
    OUT/SHARD.arrayrecord              and SHARD.arrayrecord.index.npy
    OUT/SHARD.arrayrecord.json         written after both: what it was made from, counts, digest
    OUT/dead_letters/SHARD.jsonl.zst   documents that gave no tokens, where there are any
    OUT/manifest.json                  written last

A shard whose .json names today's corpus shard, tokenizer and format is not made again, so a job
that was killed goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_beam import progress, runners  # runners first: it imports Beam without its noise
from data_beam.io import storage, writers
from data_beam.schema import DeadLetter, Document
from data_beam.stage import read_manifest
from internlm2_jax.data.records import INDEX_SUFFIX, index_of, pack_record
from internlm2_jax.errors import UserError
from internlm2_jax.files import TEMPORARY_SUFFIX, fingerprint

beam = runners.beam
TOKENIZER = "internlm2_jax.data.tokenizer:Tokenizer"
TOKENS_PER_RECORD = 1 << 16  # the fastest of 16k to 1M in benchmarks/token_loading.py
TOKENS_OPTIONS = "group_size:1,zstd:1"
_VERSION = 1  # of the files' content
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 1 << 20  # tokenized together
_HEAD = 200  # characters of a dead letter
_SUFFIXES = ("", INDEX_SUFFIX, ".json")  # of the files of a shard


def load_tokenizer(name: str, model: str | os.PathLike) -> Any:
    """The object of the class `name` ("module:Class") for a model file: `Class.load(model)`, with
    `vocab_size`, `bos_id`, `eos_id`, `sha256` and `encode_batch(texts, threads=n) -> lists of ids`.
    """
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"tokenizer class {name} cannot be loaded: {error}") from error
    if not storage.exists(model):
        raise UserError(f"cannot read the tokenizer {model}: no such file")
    with storage.local_copy(model) as path:
        return factory.load(Path(path))


def run(
    corpus_path: str | os.PathLike,
    tokenizer_model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    tokenizer: str = TOKENIZER,
    tokens_per_record: int = TOKENS_PER_RECORD,
    threads: int | None = None,
    max_dead_share: float = 0.01,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Tokenizes the corpus in the folder `corpus_path` into the folder `output`.

    Returns the manifest: tokenizer_sha256, vocab_size, and per split and source the shard names and
    the numbers of documents, tokens (bos and eos included), UTF-8 bytes of text and dead letters,
    and the source's share of the split's tokens as "rates". Equal inputs give equal bytes.

    `threads` tokenize in each worker; by default all cores in this process, one on a cluster, whose
    runner fills the cores with workers. A share of documents without tokens above `max_dead_share`
    is a UserError.
    """
    corpus, folder = os.fspath(corpus_path), os.fspath(output)
    _check_output(folder, corpus)
    if tokens_per_record < 1:
        raise UserError(f"tokens_per_record is {tokens_per_record}; it must be at least 1")
    manifest = read_manifest(corpus, "corpus")
    loaded = load_tokenizer(tokenizer, tokenizer_model)
    shards = _Shards.of(corpus, folder, manifest, [loaded.sha256, tokenizer, tokens_per_record])
    shards.start({"kind": "tokens", "tokenizer_sha256": loaded.sha256})
    if pending := shards.pending():
        local = runners.is_local(beam_options)
        worker = _Tokenize(
            shards, tokenizer, os.fspath(tokenizer_model), tokens_per_record,
            threads or ((os.cpu_count() or 1) if local else 1),
        )  # fmt: skip
        count = sum(shards.rows[number]["documents"] for number in pending)
        runners.run_over(
            pending, "Tokenize", worker, beam_options, shown="tokenize", documents=count
        )
    made = shards.finished()
    _check_letters(folder, made, max_dead_share)
    result = {
        "kind": "tokens",
        "tokenizer_sha256": loaded.sha256,
        "vocab_size": loaded.vocab_size,
        "upstream": {"corpus": fingerprint(manifest)},
        **_totals(shards.rows, made),
        "digests": {row["name"]: row["digest"] for row in made},
    }
    storage.write_json(storage.join(folder, "manifest.json"), result)
    return result


@dataclasses.dataclass(frozen=True)
class _Shards:
    """The token shards: one for each row of the corpus manifest that has documents."""

    corpus: str
    folder: str
    rows: tuple[dict[str, Any], ...]
    keys: tuple[str, ...]

    @classmethod
    def of(cls, corpus: str, folder: str, manifest, settings: list[Any]) -> _Shards:
        rows = tuple(row for row in manifest["shards"] if row["documents"])
        settings = [_VERSION, TOKENS_OPTIONS, *settings]
        keys = tuple(
            fingerprint([*settings, row["name"], row.get("digest") or _digest(corpus, row)])
            for row in rows
        )
        return cls(corpus, folder, rows, keys)

    def path(self, number: int) -> str:
        return storage.join(self.folder, self.rows[number]["name"])

    def letters(self, number: int) -> str:
        name = self.rows[number]["name"].removesuffix(".arrayrecord")
        return storage.join(self.folder, "dead_letters", f"{name}.jsonl.zst")

    def start(self, job: dict[str, Any]) -> None:
        """Withdraws the manifest of a folder that is about to change, and the shards that this
        corpus does not have."""
        storage.write_json(storage.join(self.folder, "job.json"), job)
        wanted = {self.letters(number).rsplit("/", 1)[-1] for number in range(len(self.rows))}
        wanted |= {row["name"] + suffix for row in self.rows for suffix in _SUFFIXES}
        names = {i.path: i.path.rsplit("/", 1)[-1] for i in storage.list_files(self.folder)}
        others = [p for p, name in names.items() if _is_ours(name) and name not in wanted]
        if others or self.pending():
            storage.delete(storage.join(self.folder, "manifest.json"))
        for path in others:
            storage.delete(path)

    def sidecar(self, number: int) -> dict[str, Any] | None:
        """What is known of a finished shard; None when it must be made (again)."""
        path = self.path(number)
        if not all(storage.exists(path + suffix) for suffix in _SUFFIXES):
            return None
        row = storage.read_json(path + ".json")
        return row if isinstance(row, dict) and row.get("key") == self.keys[number] else None

    def pending(self) -> list[int]:
        return [number for number in range(len(self.rows)) if self.sidecar(number) is None]

    def finished(self) -> list[dict[str, Any]]:
        made = [self.sidecar(number) for number in range(len(self.rows))]
        if None in made:
            missing = self.path(made.index(None))
            raise UserError(f"{missing} was not written; run the same command again")
        return [row for row in made if row]


def _is_ours(name: str) -> bool:
    return name.endswith((".jsonl.zst", TEMPORARY_SUFFIX)) or any(
        name.endswith(".arrayrecord" + suffix) for suffix in _SUFFIXES
    )


def _digest(corpus: str, row: dict[str, Any]) -> str:
    path = storage.join(corpus, row["name"])
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; run the job that writes this folder again")
    return storage.digest(path)


class _Tokenize(beam.DoFn):
    """The number of a shard -> its files."""

    def __init__(self, shards: _Shards, tokenizer: str, model: str, capacity: int, threads: int):
        super().__init__()
        self.shards, self.tokenizer, self.model = shards, tokenizer, model
        self.capacity, self.threads = capacity, threads

    def setup(self):
        self.loaded = load_tokenizer(self.tokenizer, self.model)

    def process(self, number):
        shards, row, target = self.shards, self.shards.rows[number], self.shards.path(number)
        letters: list[bytes] = []
        counts = {"documents": 0, "tokens": 0, "bytes": 0}
        records: list[tuple[int, int]] = []
        storage.delete(target + ".json")
        source = storage.join(shards.corpus, row["name"])
        with storage.local_copy(source) as path, storage.whole(target) as temporary:
            with writers.array_record_writer(temporary, TOKENS_OPTIONS) as writer:
                tokenized = self._documents(path, row, counts, letters)
                for group in pack(tokenized, self.capacity):
                    writer.write(pack_record(group))
                    records.append((len(group), sum(map(len, group))))
            digest = writers.file_digest(temporary)
        index = index_of(records)
        with storage.whole(target + INDEX_SUFFIX) as temporary, open(temporary, "wb") as handle:
            np.save(handle, index)
        self._write_letters(number, letters)
        counts |= {"documents": int(index[-1, 0]), "tokens": int(index[-1, 1])}
        storage.write_json(target + ".json", {
            "key": shards.keys[number], "name": row["name"], **counts, "records": len(records),
            "dead_letters": len(letters), "digest": digest,
        })  # fmt: skip

    def _documents(self, path: Path, row, counts, letters: list[bytes]) -> Iterator[np.ndarray]:
        """The tokens of each document of a corpus shard, in order."""
        batch: list[tuple[int, str]] = []
        size = 0
        for number, record in enumerate(_records(path, row)):
            try:
                batch.append((number, Document.from_bytes(record).text))
            except UserError as error:
                head = record[: 4 * _HEAD].decode(errors="replace")
                letters.append(_letter(row, number, "not_a_document", error, len(record), head))
                continue
            size += len(batch[-1][1])
            if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
                yield from self._encode(batch, row, counts, letters)
                batch, size = [], 0
        yield from self._encode(batch, row, counts, letters)

    def _encode(
        self, batch: Sequence[tuple[int, str]], row, counts, letters: list[bytes]
    ) -> Iterator[np.ndarray]:
        texts = [text for _, text in batch]
        try:
            encoded = self.loaded.encode_batch(texts, threads=self.threads)
        except Exception:  # one of the texts: find which
            encoded = [self._encode_one(number, text, row, letters) for number, text in batch]
        num_bytes = 0
        bos, eos = self.loaded.bos_id, self.loaded.eos_id
        for (number, text), ids in zip(batch, encoded, strict=True):
            if not ids:
                if ids is not None:
                    letters.append(_letter(row, number, "no_tokens", "the text is empty", 0, text))
                continue
            num_bytes += len(text) if text.isascii() else len(text.encode())
            document = np.empty(len(ids) + 2, np.uint32)
            document[0], document[1:-1], document[-1] = bos, ids, eos
            yield document
        counts["bytes"] += num_bytes
        progress.bump(len(batch), num_bytes)

    def _encode_one(self, number: int, text: str, row, letters: list[bytes]) -> list[int] | None:
        try:
            return self.loaded.encode_batch([text], threads=1)[0]
        except Exception as error:
            size = len(text.encode("utf-8", "surrogatepass"))
            letters.append(_letter(row, number, "not_tokenized", error, size, text))
            return None

    def _write_letters(self, number: int, letters: list[bytes]) -> None:
        path = self.shards.letters(number)
        if not letters:
            storage.delete(path)
            return
        with storage.whole(path) as temporary:
            writers.write_lines_zst(temporary, letters)


def _records(path: Path, row: dict[str, Any]) -> Iterator[bytes]:
    """The records of a corpus shard. One that is missing, damaged or shorter than its manifest
    says is a UserError: that is a fault of the disk, not of a document."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the job that writes this folder again")
    count = 0
    for record in writers.iter_array_record(path):
        count += 1
        yield record
    if count != row["documents"]:
        raise UserError(
            f"{path} holds {count} documents but its manifest says {row['documents']}; delete its "
            "folder and run the job again"
        )


def _letter(row, number: int, reason: str, detail: object, size: int, text: str) -> bytes:
    line = " ".join(str(detail).encode(errors="replace").decode().split())[:_HEAD]
    head = text[:_HEAD].encode(errors="replace").decode()
    where = f"{row['name']}#{number}"
    return DeadLetter(where, reason, row["source"], line, size, head).to_bytes()


def pack(documents: Iterable[np.ndarray], capacity: int) -> Iterator[list[np.ndarray]]:
    """Groups of consecutive documents with at most `capacity` tokens; a longer document is a group
    of its own."""
    group: list[np.ndarray] = []
    size = 0
    for document in documents:
        if group and size + len(document) > capacity:
            yield group
            group, size = [], 0
        group.append(document)
        size += len(document)
    if group:
        yield group


def _totals(rows: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's "splits" and "rates"."""
    splits: dict[str, dict[str, dict[str, Any]]] = {}
    for row, shard in zip(rows, made, strict=True):
        entry = splits.setdefault(row["split"], {}).setdefault(row["source"], {"shards": []})
        entry["shards"].append(row["name"])
        for name in ("documents", "tokens", "bytes", "records", "dead_letters"):
            entry[name] = entry.get(name, 0) + shard[name]
    rates = {}
    for split, sources in splits.items():
        total = sum(entry["tokens"] for entry in sources.values())
        rates[split] = {name: entry["tokens"] / max(total, 1) for name, entry in sources.items()}
    return {"splits": splits, "rates": rates}


def _check_letters(folder: str, made: Sequence[dict[str, Any]], max_share: float) -> None:
    dead = sum(row["dead_letters"] for row in made)
    total = dead + sum(row["documents"] for row in made)
    if dead > max_share * total:
        raise UserError(
            f"{dead} of {total} documents could not be tokenized, more than --max-dead-share "
            f"{max_share:g}; see {storage.join(folder, 'dead_letters')}"
        )


def _check_output(folder: str, corpus: str) -> None:
    """Refuses an output folder that holds anything but this job's."""
    if storage.is_remote(folder):
        return
    path = Path(folder)
    if path.resolve() == Path(corpus).resolve():
        raise UserError(f"output {path} is the input folder itself; choose another folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"output {path} is a file; choose a folder")
    # A first run that was killed at once may have left nothing but a temporary file.
    if path.is_dir() and any(entry.suffix != TEMPORARY_SUFFIX for entry in path.iterdir()):
        kinds = [
            storage.read_json(path / name).get("kind")
            for name in ("job.json", "manifest.json")
            if (path / name).is_file()
        ]
        if not kinds or set(kinds) != {"tokens"}:
            raise UserError(
                f"output {path} is not empty and holds no tokens; choose another folder"
            )
