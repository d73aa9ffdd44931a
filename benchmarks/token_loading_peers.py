"""Other people's loaders on the documents of token_loading.py, in an environment of their own.

    python -m venv PEERS && PEERS/bin/pip install torch datasets seqio tensorflow
    python benchmarks/token_loading.py --peers PEERS/bin/python

Prints {loader: [tokens, CPU seconds]} as JSON, the best of several times. The folder it is given
holds flat.bin (uint32 tokens, end to end) and ends.npy. Each loader gives batches of 8 rows of 4096
from shuffled documents. torch's have no packing of their own: documents are laid end to end and cut
where a row ends, which is what most training code does; seqio's is its own `trim_and_pack_dataset`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROW, ROWS, DOCUMENTS_AT_ONCE = 4096, 8, 256


def rows_in_order(groups: Iterator[list[np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """Batches of tokens, targets, segments, positions and mask out of groups of documents."""
    held: list[np.ndarray] = []
    size = 0
    for group in groups:
        held += group
        size += sum(map(len, group))
        while size > ROW * ROWS:
            tokens = np.concatenate(held)
            lengths = np.array([len(part) for part in held])
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
            segments = np.repeat(np.arange(1, len(held) + 1), lengths)
            here, after = slice(0, ROW * ROWS), slice(1, ROW * ROWS + 1)
            columns = (
                tokens[here].astype(np.int32),
                tokens[after].astype(np.int32),
                segments[here].astype(np.int32),
                (np.arange(size) - starts)[here].astype(np.int32),
                (segments[here] == segments[after]).astype(np.float32),
            )
            yield [column.reshape(ROWS, ROW) for column in columns]
            held, size = [tokens[ROW * ROWS :]], size - ROW * ROWS


def timed(make: Callable[[], Iterator[int]]) -> tuple[int, float]:
    """(tokens given, CPU seconds of all threads)."""
    batches = make()
    start = time.process_time()
    tokens = sum(batches)
    return tokens, time.process_time() - start


def torch_loaders(folder: Path) -> dict[str, Callable[[], Iterator[int]]]:
    import datasets
    import pyarrow as pa
    import torch

    datasets.disable_progress_bars()
    flat, ends = np.fromfile(folder / "flat.bin", np.uint32), np.load(folder / "ends.npy")
    lists = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(flat))
    path = folder / "documents.arrow"
    table = pa.table({"tokens": lists})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)

    class Mapped(torch.utils.data.Dataset):
        """Documents as views of the mapped file: no decoding at all."""

        def __init__(self) -> None:
            whole = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            self.chunks = [
                (chunk.values.to_numpy(), chunk.offsets.to_numpy())
                for chunk in whole.column("tokens").chunks
            ]

        def __len__(self) -> int:
            return len(ends) - 1

        def __getitem__(self, index: int) -> np.ndarray:
            values, offsets = self.chunks[index // 1000]
            return values[offsets[index % 1000] : offsets[index % 1000 + 1]]

    def loader(dataset: object, collate: Callable) -> Iterator[int]:
        batches = torch.utils.data.DataLoader(
            dataset, DOCUMENTS_AT_ONCE, shuffle=True, collate_fn=collate
        )
        for batch in rows_in_order(iter(batches)):
            tokens, *_ = map(torch.from_numpy, batch)
            yield tokens.numel()

    hugging = datasets.Dataset.from_file(str(path)).with_format("numpy")
    return {
        "torch DataLoader, arrow by datasets": lambda: loader(
            hugging, lambda rows: [row["tokens"] for row in rows]
        ),
        "torch DataLoader, arrow mapped": lambda: loader(Mapped(), lambda rows: rows),
    }


def seqio_loader(folder: Path, most: int) -> Callable[[], Iterator[int]]:
    import seqio
    import tensorflow as tf

    flat, ends = np.memmap(folder / "flat.bin", np.uint32, "r"), np.load(folder / "ends.npy")
    path = str(folder / "documents.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for start, end in itertools.pairwise(ends[: most + 1]):
            ids = tf.train.Feature(int64_list=tf.train.Int64List(value=flat[start:end]))
            features = tf.train.Features(feature={"targets": ids})
            writer.write(tf.train.Example(features=features).SerializeToString())

    def batches() -> Iterator[int]:
        spec = {"targets": tf.io.VarLenFeature(tf.int64)}

        def parse(record: tf.Tensor) -> dict[str, tf.Tensor]:
            found = tf.io.parse_single_example(record, spec)["targets"]
            return {"targets": tf.cast(tf.sparse.to_dense(found), tf.int32)}

        data = tf.data.TFRecordDataset(path).map(parse).shuffle(10_000)
        packed = seqio.utils.trim_and_pack_dataset(data, {"targets": ROW})
        for batch in packed.batch(ROWS).as_numpy_iterator():
            yield int((batch["targets_segment_ids"] > 0).sum())

    return batches


def main() -> None:
    folder, most, repeats = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    loaders = torch_loaders(folder)
    loaders[f"seqio trim_and_pack, TFRecord ({most:,} documents)"] = seqio_loader(folder, most)
    times = {name: [timed(make) for _ in range(repeats)] for name, make in loaders.items()}
    print(json.dumps({name: min(found, key=lambda t: t[1]) for name, found in times.items()}))


if __name__ == "__main__":
    main()
