"""Tokens read per second of CPU: our records beside a memory map, torch, seqio and plain grain.

    python benchmarks/token_loading.py                    # 500,000 documents of about 200 tokens
    python benchmarks/token_loading.py --peers PEERS/bin/python   # see token_loading_peers.py

"read" gives every document once, in random order unless it says otherwise; "packed" gives rows of
4096 with what a training step needs (tokens, targets, segments, positions, mask), all within the
time. Peers are timed in the same run; quote the ratios.
"""

from __future__ import annotations

import json
import subprocess
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
from internlm2_jax.data.prefetch import Prefetch
from internlm2_jax.data.records import INDEX_SUFFIX, index_of, pack_record
from internlm2_jax.data.windows import WindowedSource
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


def batches_of(rows: PackedSource | WindowedSource) -> Iterator[dict[str, np.ndarray]]:
    """An epoch in batches of 8, made in the background as in training."""
    batches = Batches({"text": rows}, batch_size=8, seed=0)
    with Prefetch(batches, len(rows) // 8) as feed:
        for step in range(len(rows) // 8):
            yield feed(step)


def our_rows(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    yield from batches_of(PackedSource(TokenSource(folder, "train", "text"), ROW))


def our_windows(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    yield from batches_of(WindowedSource(TokenReader(folder, "train", "text"), ROW))


def into_memory(folder: Path) -> Iterator[TokenSource]:
    yield TokenSource(folder, "train", "text")


def cpu_seconds(make: Callable[[], Iterator]) -> float:
    start = time.process_time()
    for _ in make():
        pass
    return time.process_time() - start


@click.command()
@click.option("--documents", default=500_000)
@click.option("--slow-documents", default=5_000, help="For grain with one document a record.")
@click.option("--seqio-documents", default=50_000, help="For seqio, which is slow too.")
@click.option("--repeats", default=2)
@click.option("--peers", help="The Python of an environment with torch, datasets and seqio.")
def main(
    documents: int, slow_documents: int, seqio_documents: int, repeats: int, peers: str | None
) -> None:
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
            "ours in memory, packed by best fit": (len(flat), lambda: our_rows(folder)),
            "ours from the disk in windows, packed": (len(flat), lambda: our_windows(folder)),
        }
        best = dict.fromkeys(loaders, float("inf"))
        for _ in range(repeats):
            for label, (_, make) in loaders.items():
                best[label] = min(best[label], cpu_seconds(make))
        others = {}
        if peers:
            np.save(folder / "ends.npy", ends)
            script = Path(__file__).with_name("token_loading_peers.py")
            command = [peers, str(script), str(folder), str(seqio_documents), str(repeats)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            others = json.loads(printed.splitlines()[-1])
        sizes: dict[int, float] = {}
        for _ in range(repeats):
            for capacity in (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20):
                other = folder / str(capacity)
                other.mkdir(exist_ok=True)
                write_ours(other, texts[:50_000], capacity)
                seconds = cpu_seconds(lambda other=other: into_memory(other))
                tokens = int(lengths[:50_000].sum())
                sizes[capacity] = max(sizes.get(capacity, 0), tokens / seconds / 1e6)
    print(
        f"{documents:,} documents, {len(flat):,} tokens; million tokens per CPU-second, "
        "and how much that is of the memory map's"
    )
    for label, (count, _) in loaders.items():
        rate = count / best[label] / 1e6
        kind = "memory map, packed" if "packed" in label else "memory map, read"
        floor = loaders[kind][0] / best[kind] / 1e6
        print(f"{label:<62}{rate:8.1f}   {rate / floor:5.2f}x")
    for label, (count, seconds) in others.items():
        floor = len(flat) / best["memory map, packed"]
        rate = count / seconds
        print(f"{label + ', packed':<62}{rate / 1e6:8.1f}   {rate / floor:5.2f}x")
    print("tokens a record, the first 50,000 documents into memory: " + ", ".join(
        f"{capacity >> 10}k {rate:.0f}" for capacity, rate in sizes.items()
    ))  # fmt: skip


if __name__ == "__main__":
    main()
