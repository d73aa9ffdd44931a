"""Tokens read per second of CPU: our records beside a memory map and one document a record.

    python benchmarks/token_loading.py                    # 50,000 documents of about 200 tokens

"read" gives every document once, in random order unless it says otherwise; "packed" gives rows of
4096 with what a training step needs (tokens, targets, segments, positions, mask), all within the
time. Peers are timed in the same run; quote the ratios.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from data_beam import cache
from internlm2_jax.data.manifest import TokenReader, TokenSource
from internlm2_jax.data.packing import PackedSource
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.records import INDEX_SUFFIX, index_of, pack_record
from internlm2_jax.files import write_json

VOCAB = 92_544
ROW = 4096
SHARD = "train-text-00000-of-00001.arrayrecord"


def write_ours(folder: Path, documents: list[np.ndarray], capacity: int) -> None:
    writer = ArrayRecordWriter(str(folder / SHARD), cache.TOKENS_OPTIONS)
    counts = []
    for group in cache.pack(documents, capacity):
        writer.write(pack_record(group))
        counts.append((len(group), sum(map(len, group))))
    writer.close()
    np.save(folder / (SHARD + INDEX_SUFFIX), index_of(counts))
    entry = {
        "shards": [SHARD], "documents": len(documents), "bytes": 0,
        "tokens": sum(map(len, documents)),
    }  # fmt: skip
    write_json(folder / "manifest.json", {
        "kind": "tokens", "tokenizer_sha256": "", "vocab_size": VOCAB,
        "splits": {"train": {"text": entry}},
    })  # fmt: skip


def memory_map(path: Path, ends: np.ndarray) -> Iterator[np.ndarray]:
    tokens = np.memmap(path, np.uint32, "r")
    for index in np.random.default_rng(0).permutation(len(ends) - 1):
        yield np.array(tokens[ends[index] : ends[index + 1]])


def packed_in_order(documents: Iterator[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Rows filled with whole documents one after the other, cut where a row ends."""
    waiting: list[np.ndarray] = []
    size = 0
    for document in documents:
        waiting.append(document)
        size += len(document)
        while size > ROW:
            tokens = np.concatenate(waiting)
            lengths = [len(part) for part in waiting]
            segments = np.repeat(np.arange(1, len(waiting) + 1), lengths)
            starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
            yield {
                "tokens": tokens[:ROW].astype(np.int32), "targets": tokens[1 : ROW + 1],
                "segment_ids": segments[:ROW], "positions": (np.arange(size) - starts)[:ROW],
                "loss_mask": (segments[:ROW] == segments[1 : ROW + 1]).astype(np.float32),
            }  # fmt: skip
            waiting, size = [tokens[ROW:]], size - ROW


def grain_records(path: Path) -> Iterator[np.ndarray]:
    source = grain.sources.ArrayRecordDataSource([str(path)])
    dataset = grain.MapDataset.source(source).shuffle(seed=0)
    yield from dataset.map(lambda record: np.frombuffer(record, np.uint32)).to_iter_dataset()


def our_documents(folder: Path) -> Iterator[np.ndarray]:
    source = TokenSource(folder, "train", "text")
    for index in np.random.default_rng(0).permutation(len(source)):
        yield np.array(source.doc(index))


def our_rows(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    rows = PackedSource(TokenSource(folder, "train", "text"), ROW)
    batches = Batches({"text": rows}, batch_size=8, seed=0)
    for step in range(len(rows) // 8):
        yield batches(step)


def into_memory(folder: Path) -> Iterator[TokenSource]:
    yield TokenSource(folder, "train", "text")


def cpu_seconds(make: Callable[[], Iterator]) -> float:
    start = time.process_time()
    for _ in make():
        pass
    return time.process_time() - start


@click.command()
@click.option("--documents", default=50_000)
@click.option("--slow-documents", default=5_000, help="For one document a record.")
@click.option("--repeats", default=3)
def main(documents: int, slow_documents: int, repeats: int) -> None:
    """Prints million tokens per CPU-second of each loader and the ratio to the memory map."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.lognormal(5, 0.8, documents).astype(int))
    flat = (rng.zipf(1.2, lengths.sum()) % VOCAB).astype(np.uint32)
    ends = np.append(0, np.cumsum(lengths))
    texts = np.split(flat, ends[1:-1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flat.tofile(folder / "flat.bin")
        writer = ArrayRecordWriter(str(folder / "single.arrayrecord"), "group_size:1,zstd:1")
        for text in texts[:slow_documents]:
            writer.write(text.tobytes())
        writer.close()
        write_ours(folder, texts, cache.TOKENS_PER_RECORD)
        few = int(lengths[:slow_documents].sum())
        reader = TokenReader(folder, "train", "text")

        def from_map() -> Iterator[np.ndarray]:
            return memory_map(folder / "flat.bin", ends)

        def single() -> Iterator[np.ndarray]:
            return grain_records(folder / "single.arrayrecord")

        loaders: dict[str, tuple[int, Callable[[], Iterator]]] = {
            "memory map, read": (len(flat), from_map),
            "memory map, packed": (len(flat), lambda: packed_in_order(from_map())),
            "grain, one document a record, read": (few, single),
            "grain, one document a record, packed": (few, lambda: packed_in_order(single())),
            "ours, read": (len(flat), lambda: our_documents(folder)),
            "ours, read in order by TokenReader": (len(flat), lambda: iter(reader)),
            "ours, packed by best fit, in batches of 8": (len(flat), lambda: our_rows(folder)),
        }
        best = dict.fromkeys(loaders, float("inf"))
        for _ in range(repeats):
            for label, (_, make) in loaders.items():
                best[label] = min(best[label], cpu_seconds(make))
        sizes: dict[int, float] = {}
        for _ in range(repeats):
            for capacity in (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20):
                other = folder / str(capacity)
                other.mkdir(exist_ok=True)
                write_ours(other, texts, capacity)
                seconds = cpu_seconds(lambda other=other: into_memory(other))
                sizes[capacity] = max(sizes.get(capacity, 0), len(flat) / seconds / 1e6)
    print(f"{documents:,} documents, {len(flat):,} tokens; million tokens per CPU-second")
    for label, (count, _) in loaders.items():
        rate = count / best[label] / 1e6
        kind = "memory map, packed" if "packed" in label else "memory map, read"
        floor = loaders[kind][0] / best[kind] / 1e6
        print(f"{label:<44}{rate:8.1f}   {rate / floor:5.2f}x of the memory map")
    print("tokens a record, whole source into memory: " + ", ".join(
        f"{capacity >> 10}k {rate:.0f}" for capacity, rate in sizes.items()
    ))  # fmt: skip


if __name__ == "__main__":
    main()
