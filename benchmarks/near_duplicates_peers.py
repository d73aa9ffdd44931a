"""Peers of near_duplicates.py: each finds the clusters of a corpus (JSON lines) in its own Python.

PEER/bin/python benchmarks/near_duplicates_peers.py NAME CORPUS RESULT
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def from_edges(count: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """The least member of the component of every text."""
    parent = list(range(count))

    def find(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for a, b in edges:
        low, high = sorted((find(a), find(b)))
        parent[high] = low
    return [find(one) for one in range(count)]


def cpu() -> float:
    """CPU seconds of this process and its finished children."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def _read(path: str) -> list[str]:
    with open(path, encoding="utf-8", errors="surrogatepass") as handle:
        return [json.loads(line)["text"] for line in handle]


def _grams(text: str) -> list[bytes]:
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))]


def peer_datasketch(path: str) -> dict:
    from datasketch import MinHash, MinHashLSH

    texts = _read(path)
    start = time.process_time()
    signatures = []
    for text in texts:
        one = MinHash(num_perm=128)
        one.update_batch(_grams(text))
        signatures.append(one)
    sign = time.process_time() - start
    lsh = MinHashLSH(num_perm=128, params=(16, 8))
    edges = []
    for number, one in enumerate(signatures):
        edges += [(number, other) for other in lsh.query(one)]
        lsh.insert(number, one)
    return {"sign": sign, "cluster": from_edges(len(texts), edges)}


def peer_rensa(path: str) -> dict:
    from rensa import RMinHash, RMinHashLSH

    texts = _read(path)
    start = time.process_time()
    signatures = []
    for text in texts:
        one = RMinHash(num_perm=128, seed=42)
        one.update([gram.decode() for gram in _grams(text)])
        signatures.append(one)
    sign = time.process_time() - start
    lsh = RMinHashLSH(threshold=0.7, num_perm=128, num_bands=16)
    edges = []
    for number, one in enumerate(signatures):
        edges += [(number, other) for other in lsh.query(one)]
        lsh.insert(number, one)
    return {"sign": sign, "cluster": from_edges(len(texts), edges)}


def peer_datatrove(path: str) -> dict:
    """Its four steps, in this process; the clusters are read off its own union-find."""
    import struct

    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(
        n_grams=5, num_buckets=16, hashes_per_bucket=8, hash_config=HashConfig(precision=64)
    )
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.mkdir()
        count = len(_read(path))
        os.symlink(path, data / "corpus.jsonl")

        def step(*stages: object, tasks: int = 1) -> None:
            LocalPipelineExecutor(
                list(stages), tasks=tasks, logging_dir=f"{folder}/logs", skip_completed=False
            ).run()

        start = time.process_time()
        step(JsonlReader(str(data)),
             MinhashDedupSignature(f"{folder}/signatures", config, language="eng"))  # fmt: skip
        sign = time.process_time() - start
        step(
            MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config),
            tasks=config.num_buckets,
        )
        step(MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config,
                                 save_cluster_id=True))  # fmt: skip
        edges = []
        # Pairs of (file, document), as `MinhashDedupBuckets` writes them.
        for dups in sorted(Path(folder, "buckets").glob("*.dups")):
            for _, a, _, b in struct.iter_unpack("<4I", dups.read_bytes()):
                edges.append((a, b))
    return {"sign": sign, "cluster": from_edges(count, edges)}


def peer_text_dedup(path: str) -> dict:
    """Its command line; the clusters are its union-find, kept by --debug."""
    import pickle

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "text_dedup.minhash", "--path", "json", "--data_files", path,
             "--split", "train", "--column", "text", "--cache_dir", f"{folder}/cache",
             "--output", f"{folder}/out", "--num_proc", "1", "--ngram", "5", "--num_perm", "128",
             "--b", "16", "--r", "8", "--threshold", "0.7", "--hash_func", "xxh3",
             "--min_length", "1", "--batch_size", "10000", "--debug"],
            check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        with open(f"{folder}/out/uf.pkl", "rb") as handle:
            found = pickle.load(handle)
    count = len(_read(path))
    parent = getattr(found, "parent", found)
    return {"cluster": from_edges(count, dict(parent).items())}


PEERS: dict[str, Callable[[str], dict]] = {
    "datasketch": peer_datasketch, "rensa": peer_rensa, "text-dedup": peer_text_dedup,
    "datatrove": peer_datatrove,
}  # fmt: skip


def run_peer(name: str, path: str, result: str) -> None:
    start, wall = cpu(), time.monotonic()
    found = PEERS[name](path)
    found |= {"cpu": cpu() - start, "wall": time.monotonic() - wall}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    run_peer(*sys.argv[1:])
