"""Files -> normalised documents in shards by id, and dead letters for what gave none.

This is the only step that moves documents between workers: shard = id mod N, sorted by id, each
written by one worker. A runner with a real shuffle does it in one job. FnApiRunner keeps a shuffle
in memory, so locally the files are taken in waves of a bounded number of bytes, and the shards of
all waves are merged at the end, one document in memory at a time.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_beam import progress, runners  # runners first: it imports Beam without its noise
from data_beam.io import readers, storage, writers
from data_beam.io.listing import FileRef
from data_beam.kernels.normalize import VERSION, normalize
from data_beam.schema import DeadLetter, Document, hash63, shard_of
from data_beam.stage import Documents, Output, open_documents
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

beam = runners.beam
SHARD_BYTES = 128 << 20  # of input text per shard, when the number of shards is not given
WAVE_BYTES = 256 << 20
Record = tuple[str, bytes]  # (id, document) or ("", dead letter)


def run(
    files: Sequence[FileRef],
    output: str | os.PathLike,
    *,
    read: readers.ReadOptions | None = None,
    shards: int | None = None,
    wave_bytes: int | None = None,
    max_dead_share: float = 0.25,
    beam_options: Sequence[str] = (),
) -> Documents:
    """Reads `files` into OUTPUT/documents and OUTPUT/dead_letters.

    `shards` defaults to one per 128 MB of input; `wave_bytes` to 256 MB on the local runner and no
    limit elsewhere. More dead letters than `max_dead_share` of all records is a UserError (files
    that are no text at all, such as pictures, do not count), and nothing goes on from there; what
    was written stays, to be looked at.
    """
    read = read or readers.ReadOptions()
    total = sum(file.size for file in files)
    shards = shards or max(1, -(-total // SHARD_BYTES))
    if wave_bytes is None and runners.is_local(beam_options):
        wave_bytes = WAVE_BYTES
    waves = _waves(files, wave_bytes)
    settings = {
        "input": fingerprint([tuple(file) for file in sorted(files)]),
        "files": len(files), "bytes": total, "read": vars(read), "readers": readers.VERSION,
        "normalize": VERSION, "shards": shards,
    }  # fmt: skip
    documents, letters = _outputs(output, shards, fingerprint(settings))
    if not (documents.is_complete(settings, {}) and letters.is_complete(settings, {})):
        with progress.show("ingest", len(files), "file"):
            if len(waves) == 1:
                _read_wave(files, documents, letters, read, beam_options)
            else:
                parts = _wave_outputs(output, waves, shards, settings)
                for wave, part in zip(waves, parts, strict=True):
                    _read_wave(wave, *part, read, beam_options)
        if len(waves) > 1:
            _merge(parts, documents, letters, beam_options)
        manifest = letters.complete(settings, {})
        _check(manifest, documents, max_dead_share, output)
        documents.complete(settings, {})
        storage.delete_tree(storage.join(output, "waves"))
    else:
        manifest = letters.complete(settings, {})
        _check(manifest, documents, max_dead_share, output)
    return open_documents(output)


def _outputs(folder: str | os.PathLike, shards: int, key: str) -> tuple[Output, Output]:
    keys = (key,) * shards
    return (
        Output(storage.join(folder, "documents"), "documents", ".arrayrecord", keys),
        Output(storage.join(folder, "dead_letters"), "dead_letters", ".jsonl.zst", keys),
    )


def _wave_outputs(output, waves, shards: int, settings) -> list[tuple[Output, Output]]:
    parts = []
    for index, wave in enumerate(waves):
        name = f"wave-{index:04d}-of-{len(waves):04d}"
        key = fingerprint([settings, [tuple(file) for file in wave]])
        parts.append(_outputs(storage.join(output, "waves", name), shards, key))
    return parts


def _waves(files: Sequence[FileRef], limit: int | None) -> list[list[FileRef]]:
    """Groups of files of at most `limit` bytes each (one file at least)."""
    waves: list[list[FileRef]] = [[]]
    size = 0
    for file in sorted(files):
        if limit is not None and waves[-1] and size + file.size > limit:
            waves.append([])
            size = 0
        waves[-1].append(file)
        size += file.size
    return waves


def _check(manifest: dict, documents: Output, max_share: float, output) -> None:
    """Too many dead letters, or no document at all, is a UserError that names the reasons."""
    reasons: dict[str, int] = {}
    for row in manifest["shards"]:
        for reason, count in row["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    dead = sum(n for reason, n in reasons.items() if reason not in readers.NO_TEXT_REASONS)
    alive = sum(
        (documents.sidecar(s) or {"records": 0})["records"] for s in range(documents.shards)
    )
    worst = ", ".join(
        f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1])[:5]
    )
    if not alive:
        raise UserError(
            f"no document in the input could be read ({worst or 'it holds no records'}); see "
            f"{storage.join(output, 'dead_letters')} and check --input"
        )
    if dead > max_share * (dead + alive):
        raise UserError(
            f"{dead:,} of {dead + alive:,} records could not be read ({worst}), more than "
            f"--max-dead-share {max_share:g}; see {storage.join(output, 'dead_letters')}, mend the "
            "input or raise the share"
        )


# --- one wave ---------------------------------------------------------------------------------


def _read_wave(files, documents: Output, letters: Output, read, beam_options) -> None:
    """Writes the shards of `files` that are not there yet."""
    for target in (documents, letters):
        target.start()
    pending = sorted({*documents.pending(), *letters.pending()})
    if not pending:
        progress.bump(len(files))
        return
    pipeline = runners.pipeline(beam_options)
    (
        pipeline
        | "Files" >> beam.Create([tuple(file) for file in files])
        | "SpreadFiles" >> beam.Reshuffle()
        | "Read" >> beam.ParDo(_Read(read, documents.shards)).with_output_types(
            beam.typehints.KV[int, tuple])
        | "OfPending" >> beam.Filter(_OneOf(pending))
        | "GroupShards" >> beam.GroupByKey()
        | "WriteShards" >> beam.ParDo(_WriteShard(documents, letters))
    )  # fmt: skip
    runners.run(pipeline)
    for shard in sorted({*documents.pending(), *letters.pending()}):  # those that got no record
        _write(shard, [], documents, letters)


class _OneOf:
    def __init__(self, shards: Iterable[int]):
        self.shards = frozenset(shards)

    def __call__(self, element: tuple[int, Record]) -> bool:
        return element[0] in self.shards


class _Read(beam.DoFn):
    """FileRef -> (shard, (id, document) or ("", dead letter))."""

    def __init__(self, options: readers.ReadOptions, shards: int):
        super().__init__()
        self.options, self.shards = options, shards

    def process(self, element):
        file = FileRef(*element)
        seen = 0
        for item in readers.read(file, self.options):
            if isinstance(item, Document):
                text = normalize(item.text)
                seen += len(text)
                if text:
                    document = item._replace(text=text)
                    yield shard_of(item.id, self.shards), (item.id, document.to_bytes())
                    continue
                where = item.path or item.url or item.id
                item = DeadLetter(where, "empty", item.source, "nothing but white space")
            yield hash63(item.where) % self.shards, ("", item.to_bytes())
        progress.bump(num_bytes=seen)


class _WriteShard(beam.DoFn):
    def __init__(self, documents: Output, letters: Output):
        super().__init__()
        self.documents, self.letters = documents, letters

    def process(self, element):
        shard, records = element
        _write(shard, sorted(tuple(record) for record in records), self.documents, self.letters)


def _write(shard: int, records: Iterable[Record], documents: Output, letters: Output) -> None:
    """Writes the document shard and the dead-letter shard from sorted records (dead letters first,
    since their id is ""), and both sidecars. Of two documents with one id the first is kept."""
    dead: list[bytes] = []
    counts = _Counts()

    def living() -> Iterator[bytes]:
        last = ""
        for id, record in records:
            if not id:
                dead.append(record)
            elif id == last:
                twin = Document.from_bytes(record)
                where = twin.path or twin.url or twin.id
                dead.append(
                    DeadLetter(where, "duplicate_id", twin.source, f"id {id} is taken",
                               twin.num_bytes, twin.text[:200]).to_bytes()
                )  # fmt: skip
            else:
                last = id
                counts.add(record)
                yield record

    with storage.whole(documents.path(shard)) as path:
        writers.write_array_record(path, living(), writers.DOCUMENTS_OPTIONS)
    reasons: dict[str, int] = {}
    sources: dict[str, list[int]] = {}
    for row in dead:
        letter = DeadLetter.from_bytes(row)
        reasons[letter.reason] = reasons.get(letter.reason, 0) + 1
        entry = sources.setdefault(f"{letter.source}\t{letter.reason}", [0, 0])
        entry[0] += 1
        entry[1] += letter.num_bytes
    with storage.whole(letters.path(shard)) as path:
        writers.write_lines_zst(path, sorted(dead))
    letters.finish(shard, len(dead), bytes=sum(map(len, dead)), reasons=reasons, sources=sources)
    documents.finish(
        shard, counts.documents, bytes=counts.num_bytes, sources=counts.sources,
        encodings=counts.encodings,
    )  # fmt: skip


class _Counts:
    """Of documents, UTF-8 bytes, both per source, and encodings."""

    def __init__(self) -> None:
        self.documents = self.num_bytes = 0
        self.sources: dict[str, list[int]] = {}
        self.encodings: dict[str, int] = {}

    def add(self, record: bytes) -> None:
        document = Document.from_bytes(record)
        size = document.num_bytes
        self.documents += 1
        self.num_bytes += size
        entry = self.sources.setdefault(document.source, [0, 0])
        entry[0] += 1
        entry[1] += size
        encoding = document.meta.get("encoding", "utf-8")
        self.encodings[encoding] = self.encodings.get(encoding, 0) + 1


# --- several waves ----------------------------------------------------------------------------


def _merge(parts: list[tuple[Output, Output]], documents: Output, letters: Output, beam_options):
    for target in (documents, letters):
        target.start()
    pending = sorted({*documents.pending(), *letters.pending()})
    work = _MergeShard(parts, documents, letters)
    runners.run_over(pending, "MergeWaves", work, beam_options, shown="merge waves")


class _MergeShard(beam.DoFn):
    def __init__(self, parts: list[tuple[Output, Output]], documents: Output, letters: Output):
        super().__init__()
        self.parts, self.documents, self.letters = parts, documents, letters

    def process(self, shard):
        streams: list[Iterator[Record]] = []
        for documents, letters in self.parts:
            streams += [_dead(letters.path(shard)), _living(documents.path(shard))]
        _write(shard, heapq.merge(*streams), self.documents, self.letters)
        progress.bump()


def _living(path: str) -> Iterator[Record]:
    with storage.local_copy(path) as local:
        for record in writers.iter_array_record(local):
            yield Document.from_bytes(record).id, record


def _dead(path: str) -> Iterator[Record]:
    with storage.local_copy(path) as local:
        for line in writers.read_lines_zst(Path(local)):
            yield "", line


def dead_letters(output: str | os.PathLike) -> Iterator[DeadLetter]:
    """Every dead letter below the output folder of an ingest job, shard by shard."""
    folder = storage.join(output, "dead_letters")
    for info in storage.list_files(folder):
        if info.path.endswith(".jsonl.zst"):
            for _, line in _dead(info.path):
                yield DeadLetter.from_bytes(line)
