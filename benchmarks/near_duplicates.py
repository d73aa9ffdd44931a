"""Near duplicates: our Beam job and its peers, on one corpus with planted copies, in one run.

    python benchmarks/near_duplicates.py [--megabytes 25] [--peers-python /tmp/peers/bin/python]

The corpus is this machine's: manual pages and documentation in the languages installed, Python
sources, and the Chinese poems of ../shared/data where they are. A share of the documents is copied
with known edits: only white space, case and punctuation ("format"); 0.5, 1 and 2 % of the words
(characters of scripts without spaces) replaced, deleted or inserted; and 12 %, which is no copy any
more ("hard"). The truth is the exact Jaccard similarity of word 5-grams of all pairs at or above
0.5, found with prefix filtering and a tokenizer of its own.

Reported: MB per CPU second, and of the whole job; how many removed documents have a partner at J >=
0.7 (precision) and 0.5 in their cluster; how many true pairs share a cluster, by J (recall); how
many of the planted copies were found, by kind, and of the Chinese and Japanese among them. Peers:

    python -m venv /tmp/peers && /tmp/peers/bin/pip install datasketch rensa text-dedup datatrove \
        tokenizers spacy orjson "xxhash<4"

Speeds depend on what else the machine does: compare the rows of one run, not runs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from near_duplicates_peers import PEERS, cpu, from_edges

ROOT = Path(__file__).resolve().parents[1]
PEER = Path(__file__).with_name("near_duplicates_peers.py")
WORDS = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff"
    r"\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff"
    r"\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
CJK = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
EDITS = {"format": 0.0, "0.5%": 0.005, "1%": 0.01, "2%": 0.02, "hard": 0.12}


# --- the corpus -------------------------------------------------------------------------------


def files() -> Iterator[tuple[str, Path]]:
    """(group, path) of what may be read, in a fixed order."""
    for path in sorted(Path("/usr/share/man").rglob("*.gz")):
        yield "man-" + path.relative_to("/usr/share/man").parts[0][:2], path
    for path in sorted(Path("/usr/share/doc").rglob("*")):
        if path.suffix in (".gz", ".txt", ".html", "") and path.is_file():
            yield "doc", path
    for folder in (Path(sys.prefix, "lib"), Path("/usr/lib/python3")):
        for path in sorted(folder.rglob("*.py")):
            yield "python", path


def texts_of(path: Path) -> Iterator[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return
    if "\0" not in text and len(text) > 200:
        yield text[:300_000]


def poems() -> Iterator[str]:
    """Documents of some hundred characters, twelve poems each."""
    folder = ROOT.parent / "shared" / "data" / "chinese_poetry"
    for path in sorted(folder.glob("poet.*.json")):
        rows = ["\n".join(row["paragraphs"]) for row in json.loads(path.read_text())]
        for start in range(0, len(rows), 12):
            yield "\n\n".join(rows[start : start + 12])


def natural(num_bytes: int, rng: random.Random) -> list[str]:
    """Real documents of about `num_bytes`: a tenth poems, the rest equally from every group."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for group, path in files():
        groups[group].append(path)
    result, used = [], 0
    for text in itertools.islice(poems(), 100_000):
        if used > num_bytes // 10:
            break
        result.append(text)
        used += len(text.encode())
    queues = []
    for name in sorted(groups):
        rng.shuffle(groups[name])
        queues.append(groups[name])
    while queues and used < num_bytes:
        for queue in list(queues):
            if not queue:
                queues.remove(queue)
                continue
            for text in texts_of(queue.pop()):
                result.append(text)
                used += len(text.encode())
    return result


def edit(text: str, share: float, rng: random.Random, pool: list[str]) -> str:
    """Replaces, deletes or inserts `share` of the words; 0 = changes only what is between them."""
    if not share:
        return text.upper().replace(" ", "  ").replace(",", ";").replace("，", "；") + "\n--\n"
    pieces, last = [], 0
    for match in WORDS.finditer(text):
        pieces.append(text[last : match.start()])
        last = match.end()
        word = match.group()
        if rng.random() < share:
            kind = rng.randrange(3)
            other = rng.choice(pool)
            if CJK.match(word):
                other = chr(0x4E00 + rng.randrange(3000))
                word = ("", other, word + other)[kind]
            else:
                word = ("", other, f"{word} {other}")[kind]
        pieces.append(word)
    return "".join(pieces) + text[last:]


def corpus(num_bytes: int, seed: int) -> tuple[list[str], dict[int, tuple[int, str]]]:
    """Texts in random order, and of every planted copy (its original, the kind of edit)."""
    rng = random.Random(seed)
    texts = natural(round(num_bytes / 1.3), rng)
    pool = sorted({word for text in texts[::20] for word in WORDS.findall(text)[:200]})
    plants = []
    for number, text in enumerate(texts):
        words = len(WORDS.findall(text))
        if 100 <= words <= 20_000 and rng.random() < 0.35:
            plants.append((number, rng.choice(list(EDITS))))
    originals = len(texts)
    for number, kind in plants:
        texts.append(edit(texts[number], EDITS[kind], rng, pool))
    order = list(range(len(texts)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    planted = {place[originals + n]: (place[number], kind) for n, (number, kind)
               in enumerate(plants)}  # fmt: skip
    return [texts[old] for old in order], planted


# --- the truth --------------------------------------------------------------------------------


def shingle_set(text: str) -> np.ndarray:
    """Sorted distinct 63-bit hashes of the word 5-grams."""
    words = WORDS.findall(text.lower())
    grams = {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()
    hashes = [hashlib.blake2b(gram.encode("utf-8", "surrogatepass"), digest_size=8).digest()
              for gram in grams]  # fmt: skip
    return np.unique(np.frombuffer(b"".join(hashes), "<u8") >> np.uint64(1))


def true_pairs(texts: list[str], least: float = 0.5) -> tuple[dict[tuple[int, int], float], list]:
    """Exact Jaccard similarity of all pairs of *distinct* sets at or above `least`, keyed by set
    numbers; and the set number of every text. Two sets that similar share one of the rarest
    |A| - least |A| + 1 shingles of each (prefix filtering, Bayardo et al. 2007)."""
    sets: list[np.ndarray] = []
    known: dict[bytes, int] = {}
    number = []
    for text in texts:
        values = shingle_set(text)
        key = hashlib.blake2b(values.tobytes(), digest_size=16).digest()
        if key not in known:
            known[key] = len(sets)
            sets.append(values)
        number.append(known[key])
    everything = np.concatenate(sets)
    values, frequency = np.unique(everything, return_counts=True)
    prefixes, owners = [], []
    for owner, one in enumerate(sets):
        often = frequency[np.searchsorted(values, one)]
        keep = len(one) - int(np.ceil(least * len(one))) + 1
        prefixes.append(one[np.lexsort((one, often))[:keep]])
        owners.append(np.full(len(prefixes[-1]), owner, np.int64))
    shingles, owner = np.concatenate(prefixes), np.concatenate(owners)
    order = np.argsort(shingles, kind="stable")
    shingles, owner = shingles[order], owner[order]
    starts = np.flatnonzero(np.append(True, shingles[1:] != shingles[:-1]))
    codes: list[np.ndarray] = []
    found = np.zeros(0, np.int64)
    waiting = 0
    for start, end in zip(starts, np.append(starts[1:], len(shingles)), strict=True):
        if end - start > 1:
            group = np.sort(owner[start:end])
            left, right = np.triu_indices(len(group), 1)
            codes.append(group[left] * len(sets) + group[right])
            waiting += len(left)
            if waiting > 5_000_000:
                found, codes, waiting = np.unique(np.concatenate([found, *codes])), [], 0
    found = np.unique(np.concatenate([found, *codes]))
    pairs = {}
    for code in found.tolist():
        a, b = divmod(code, len(sets))
        small, large = sorted((len(sets[a]), len(sets[b])))
        if small < least * large:
            continue
        common = len(np.intersect1d(sets[a], sets[b], assume_unique=True))
        value = common / (small + large - common)
        if value >= least:
            pairs[a, b] = value
    return pairs, number


# --- judging ----------------------------------------------------------------------------------


def judge(
    cluster: list[int], texts: list[str], planted: dict[int, tuple[int, str]],
    pairs: dict[tuple[int, int], float], number: list[int],
) -> dict[str, float]:  # fmt: skip
    """`cluster` names the surviving text of every text."""
    holders: dict[int, list[int]] = defaultdict(list)
    for text, set_number in enumerate(number):
        holders[set_number].append(text)
    best = np.zeros(len(texts))
    recall: dict[float, list[int]] = {0.7: [0, 0], 0.8: [0, 0], 0.9: [0, 0]}

    def see(a: int, b: int, value: float) -> None:
        together = cluster[a] == cluster[b]
        if together:
            best[a], best[b] = max(best[a], value), max(best[b], value)
        for low, counts in recall.items():
            if low <= value < (1.01 if low == 0.9 else low + 0.1):
                counts[0] += together
                counts[1] += 1

    for same in holders.values():
        for a, b in itertools.pairwise(same):
            see(a, b, 1.0)
    for (left, right), value in pairs.items():
        for a in holders[left][:20]:
            for b in holders[right][:20]:
                see(a, b, value)
    removed = [text for text, survivor in enumerate(cluster) if survivor != text]
    result = {
        "kept": len(texts) - len(removed),
        "precision@.7": float(np.mean(best[removed] >= 0.7)) if removed else 1.0,
        "precision@.5": float(np.mean(best[removed] >= 0.5)) if removed else 1.0,
    }
    for low, (hits, total) in recall.items():
        result[f"recall {low:.1f}"] = hits / max(total, 1)
    both = [sum(recall[low][i] for low in (0.8, 0.9)) for i in (0, 1)]
    result["recall>=.8"] = both[0] / max(both[1], 1)
    for name, only in (("", False), ("CJK ", True)):
        for kind in EDITS:
            of_kind = [
                cluster[copy] == cluster[original]
                for copy, (original, k) in planted.items()
                if k == kind and (not only or is_cjk(texts[original]))
            ]
            result[f"{name}{kind}"] = float(np.mean(of_kind)) if of_kind else float("nan")
    least = [
        cluster[copy] == cluster[original]
        for copy, (original, k) in planted.items()
        if k in ("0.5%", "1%") and is_cjk(texts[original])
    ]
    result["CJK <=1%"] = float(np.mean(least)) if least else float("nan")
    return result


def is_cjk(text: str) -> bool:
    return len(CJK.findall(text[:4000])) > 0.3 * len(text[:4000])


# --- ours -------------------------------------------------------------------------------------


def ours(texts: list[str], shards: int, options: list[str], verify: str, split: str) -> dict:
    """Documents on disk -> fingerprints -> duplicates, both by Beam. Timed from the reading of the
    documents to the last verdict written. `split` is bands x rows, "16x8"."""
    sys.path.insert(0, str(ROOT))
    from data_beam.attributes.base import Examined
    from data_beam.attributes.fingerprints import Fingerprints
    from data_beam.dedup import near
    from data_beam.io.writers import DOCUMENTS_OPTIONS, write_array_record
    from data_beam.pipelines import annotate
    from data_beam.schema import Document, document_id, shard_of
    from data_beam.stage import Output, open_documents
    from data_beam.tables import read_attribute

    ids = [document_id("text", str(n), text) for n, text in enumerate(texts)]
    place = {id_: n for n, id_ in enumerate(ids)}
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        target = Output(f"{folder}/documents", "documents", ".arrayrecord", ("",) * shards)
        Path(target.folder).mkdir()
        rows: list[list[Document]] = [[] for _ in range(shards)]
        for id_, text in zip(ids, texts, strict=True):
            rows[shard_of(id_, shards)].append(Document(id_, text, "text"))
        for shard, some in enumerate(rows):
            some.sort()
            write_array_record(
                Path(target.path(shard)), [d.to_bytes() for d in some], DOCUMENTS_OPTIONS
            )
            target.finish(shard, len(some), bytes=sum(d.num_bytes for d in some))
        target.complete({}, {})

        attribute = Fingerprints()
        documents = [document for some in rows for document in some]
        attribute.sign([Examined(document) for document in documents[:64]])  # tables and caches
        start = time.process_time()
        for begin in range(0, len(documents), 64):  # no batch outlives its turn, as in the job
            attribute.sign([Examined(document) for document in documents[begin : begin + 64]])
        result["sign"] = time.process_time() - start
        del documents, rows
        start, wall = cpu(), time.monotonic()
        annotate.run(folder, [attribute], beam_options=options)
        result["fingerprints"] = cpu() - start
        bands, rows_of_band = map(int, split.split("x"))
        settings = near.NearDuplicates(verify=verify, bands=bands, rows=rows_of_band)
        manifest = near.run(folder, open_documents(folder), settings, beam_options=options)
        result["cpu"], result["wall"] = cpu() - start, time.monotonic() - wall
        cluster = list(range(len(texts)))
        for shard in range(shards):
            for row in read_attribute(folder, "duplicates", shard).to_pylist():
                survivor = row["exact_of"] or row["near_of"]
                if survivor:
                    cluster[place[row["id"]]] = place[survivor]
    counts = {k: v for k, v in manifest.items() if isinstance(v, int)}
    return {**result, "cluster": cluster, "counts": counts}


# --- the table --------------------------------------------------------------------------------


def report(name: str, megabytes: float, found: dict, quality: dict[str, float]) -> None:
    units = {"sign": "sign {:.1f} MB/CPU-s", "cpu": "job {:.1f} MB/CPU-s", "wall": "{:.1f} MB/s"}
    speeds = [text.format(megabytes / found[part]) for part, text in units.items() if part in found]
    print("\n" + ", ".join([name, *speeds]))
    print("  " + ", ".join(
        f"{key} {value:.0f}" if key == "kept" else f"{key} {value:.3f}"
        for key, value in quality.items()
    ), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--verify", default="signature", help="signature, exact, none")
    parser.add_argument("--bands", default="16x8,20x6", help="splits of the signature")
    parser.add_argument("--peers-python", default="/tmp/peers/bin/python")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--save", help="also write the figures to this JSON file")
    arguments, options = parser.parse_known_args()
    texts, planted = corpus(round(arguments.megabytes * 1e6), arguments.seed)
    megabytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6
    cjk = sum(is_cjk(texts[original]) for original, _ in planted.values())
    print(f"{len(texts)} documents, {megabytes:.1f} MB, {len(planted)} planted copies, {cjk} of "
          f"them CJK; load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    start = time.monotonic()
    pairs, number = true_pairs(texts)
    print(f"truth: {len(pairs)} pairs of distinct texts at J >= .5, {time.monotonic() - start:.0f} "
          "s", flush=True)  # fmt: skip
    figures = {"megabytes": megabytes, "documents": len(texts), "rows": {}}

    def row(name: str, found: dict) -> None:
        quality = judge(found["cluster"], texts, planted, pairs, number)
        report(name, megabytes, found, quality)
        kept = {key: found[key] for key in ("sign", "cpu", "wall", "counts") if key in found}
        figures["rows"][name] = {**kept, **quality}

    at = [(a, b) for a, b in pairs if pairs[a, b] >= 0.7]
    first = {set_number: text for text, set_number in reversed(list(enumerate(number)))}
    oracle = from_edges(len(texts), [(first[a], first[b]) for a, b in at]
                        + [(text, first[n]) for text, n in enumerate(number)])  # fmt: skip
    row("oracle (components of exact J >= .7)", {"cluster": oracle})
    ways = itertools.product(arguments.verify.split(","), arguments.bands.split(","))
    for verify, split in filter(all, ways):
        found = ours(texts, arguments.shards, options, verify, split)
        row(f"data_beam, verify={verify}, bands {split}", found)
        print(f"  fingerprints {megabytes / found['fingerprints']:.1f} MB/CPU-s, {found['counts']}")
    with tempfile.TemporaryDirectory() as folder:
        path, result = f"{folder}/corpus.jsonl", f"{folder}/result.json"
        with open(path, "w", encoding="utf-8") as handle:
            for n, text in enumerate(texts):
                handle.write(json.dumps({"id": str(n), "text": text}) + "\n")
        for peer in filter(None, arguments.peers.split(",")):
            if not Path(arguments.peers_python).exists():
                print(f"\n{peer}: no {arguments.peers_python}, see the head of this file")
                continue
            command = [arguments.peers_python, str(PEER), peer, path, result]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"\n{peer} failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            row(peer, json.loads(Path(result).read_text()))
    if arguments.save:
        Path(arguments.save).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
