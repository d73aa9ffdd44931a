"""Gopher's quality and repetition filters: megabytes a second of one core, ours and datatrove's.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install datatrove spacy nltk
    python benchmarks/filters.py --peer /tmp/peers/bin/python

Both judge the same files of the machine's documentation, one after the other, in CPU seconds of one
process; ours before and after the peer. The ratio is what to quote. The verdicts differ by
definition: datatrove counts punctuation marks as words without letters, and divides the characters
of n-grams by the length of the text, spaces included.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click

from data_beam.kernels.textstats import SIGNALS, Signals, share_ngram_work
from data_beam.mix import rules

_BATCH = 64
_PEER = r"""
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils import text
texts = [json.loads(line) for line in open(sys.argv[1])]
names = {"quality": GopherQualityFilter(), "repetition": GopherRepetitionFilter()}
seconds, kept = {}, {}
for name, judge in names.items():
    judge.filter(Document(text="Loads the tokenizer, once.", id="0"))
    text.split_into_parts.cache_clear()
    start = time.process_time()
    kept[name] = [judge.filter(Document(text=t, id="0")) is True for t in texts]
    seconds[name] = time.process_time() - start
print(json.dumps({"seconds": seconds, "kept": kept}))
"""


def documentation(max_bytes: int, max_file: int) -> list[str]:
    """Files below /usr/share/doc and manual pages, a random choice."""
    below = [*Path("/usr/share/doc").rglob("*"), *Path("/usr/share/man").rglob("*")]
    paths = sorted(path for path in below if path.is_file() and not path.is_symlink())
    random.Random(0).shuffle(paths)
    texts, total = [], 0
    for path in paths:
        if total > max_bytes:
            break
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if b"\0" in data or not 500 < len(data) < max_file:
            continue
        texts.append(data.decode("utf-8", "replace"))
        total += len(data)
    return texts


def judge(texts: Sequence[str], names: Sequence[str]) -> tuple[float, list[dict[str, float]]]:
    """CPU seconds, and the values of the signals of every text."""
    rows = []
    start = time.process_time()
    for begin in range(0, len(texts), _BATCH):
        many = [Signals(text) for text in texts[begin : begin + _BATCH]]
        share_ngram_work(many)
        rows += [{name: getattr(one, name) for name in names} for one in many]
    return time.process_time() - start, rows


@click.command()
@click.option("--peer", default="/tmp/peers/bin/python", help="A Python with datatrove.")
@click.option("--megabytes", default=20.0, help="Text that ours judges.")
@click.option("--peer-megabytes", default=2.0, help="Text that both judge.")
@click.option("--max-file", default=100_000, help="Bytes of the largest file.")
def main(peer: str, megabytes: float, peer_megabytes: float, max_file: int) -> None:
    """Prints MB/s of both, their ratio, and how far they agree."""
    texts = documentation(int(megabytes * 1e6), max_file)
    size = sum(len(text.encode()) for text in texts) / 1e6
    published = rules.load("gopher")["text"]
    names = [rule.signal.removeprefix("signals.") for rule in published]
    judge(texts[:_BATCH], names)  # tables and caches
    print(f"{len(texts)} documents, {size:.1f} MB; load {os.getloadavg()[0]:.1f}")
    seconds, _ = judge(texts, names)
    print(f"ours, Gopher quality + repetition: {size / seconds:.1f} MB/s")
    everything, _ = judge(texts, list(SIGNALS))
    print(f"ours, all {len(SIGNALS)} signals: {size / everything:.1f} MB/s")

    if not Path(peer).exists():
        raise click.ClickException(f"no {peer}: install datatrove into a venv, see --help")
    few, total = [], 0
    for text in texts:
        if total < peer_megabytes * 1e6:
            few.append(text)
            total += len(text.encode())
    before, rows = judge(few, names)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "texts.jsonl")
        path.write_text("".join(json.dumps(text) + "\n" for text in few))
        done = subprocess.run(
            [peer, "-c", _PEER, str(path)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise click.ClickException(f"datatrove failed: {done.stderr.strip().splitlines()[-1]}")
    after, _ = judge(few, names)
    theirs = json.loads(done.stdout.splitlines()[-1])
    mine = (before + after) / 2
    peer_seconds = sum(theirs["seconds"].values())
    each = ", ".join(f"{n} {total / 1e6 / s:.2f}" for n, s in theirs["seconds"].items())
    print(f"datatrove on {len(few)} of them, {total / 1e6:.1f} MB: "
          f"{total / 1e6 / peer_seconds:.2f} MB/s ({each})")  # fmt: skip
    print(f"ours on the same: {total / 1e6 / mine:.1f} MB/s, ratio {peer_seconds / mine:.0f}")
    for name, some in (("quality", published[:8]), ("repetition", published[8:])):
        ours = [not any(_broken(rule, row) for rule in some) for row in rows]
        same = sum(a == b for a, b in zip(ours, theirs["kept"][name], strict=True))
        print(f"{name}: ours keeps {sum(ours)}, datatrove {sum(theirs['kept'][name])}, "
              f"the same verdict on {same / len(few):.1%}")  # fmt: skip


def _broken(rule: rules.Rule, row: dict[str, float]) -> bool:
    value = row[rule.signal.removeprefix("signals.")]
    return value < rule.minimum or value > rule.maximum


if __name__ == "__main__":
    main()
