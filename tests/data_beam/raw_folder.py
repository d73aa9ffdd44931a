"""A small folder of raw files with everything that the corpus job meets."""

import gzip
import json
import random
from pathlib import Path


def sentences(rng: random.Random, count: int) -> str:
    pool = random.Random(1).choices("bcdfgklmnprstv", k=2000)
    words = ["".join(rng.choices(pool, k=3)) + rng.choice("aeiou") for _ in range(count * 9)]
    return "".join(" ".join(words[i : i + 9]) + ".\n" for i in range(0, len(words), 9))


def functions(rng: random.Random, count: int) -> str:
    names = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(count)]
    return "\n\n".join(f"def {n}(x):\n    return {n}_table[x] + {i}" for i, n in enumerate(names))


def write_folder(folder: Path) -> Path:
    """About 200 kB: text, code, records, exact and near copies, and things that are no text."""
    rng = random.Random(0)
    (folder / "sub").mkdir(parents=True)
    for n in range(30):
        (folder / f"sub/text{n}.md").write_text(sentences(rng, 40))
        (folder / f"code{n}.py").write_text(functions(rng, 25))
    original = (folder / "sub/text3.md").read_text()
    (folder / "copy.txt").write_text(original.replace("\n", "\r\n"))
    # The longest of the three survives: the copy's copy must name it too.
    (folder / "nearly.txt").write_text(original + "And one more line at the end.\n")
    (folder / "latin.txt").write_bytes(sentences(rng, 40).encode() + "Grüße\n".encode("latin-1"))
    (folder / "image.png").write_bytes(b"\x89PNG\0\0" + rng.randbytes(500))
    (folder / "short.md").write_text("Short.\n")
    (folder / "torn.txt.gz").write_bytes(gzip.compress(sentences(rng, 99).encode())[:-9])
    rows = [json.dumps({"text": sentences(rng, 30), "source": "web"}) for _ in range(5)]
    (folder / "records.jsonl").write_text("\n".join([*rows, "{not json"]))
    return folder
