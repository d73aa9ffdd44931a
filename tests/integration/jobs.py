"""Jobs to run on several runners: their commands, real input for them, and what they leave."""

from __future__ import annotations

import ast
import functools
import gzip
import json
import os
import random
import re
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def shapes(folder: Path, output: Path) -> list[str]:
    return ["-m", "shapes", f"--output={output}"]


def corpus(folder: Path, output: Path) -> list[str]:
    return ["-m", "data_beam", "corpus", f"--input={folder}", f"--output={output}"]


def web_text(folder: Path, output: Path) -> list[str]:
    return ["-m", "data_beam", "web_text", f"--input={folder}", f"--output={output}", "--shards=4"]


def code(folder: Path, output: Path) -> list[str]:
    return ["-m", "data_beam", "code", f"--input={folder}", f"--output={output}", "--shards=4"]


def scaled(folder: Path, output: Path) -> list[str]:
    return ["-m", "scaled", f"--input={folder}", f"--output={output}"]


def start(command: Sequence[str], options: Sequence[str] = (), **popen) -> subprocess.Popen:
    """The job in a process of its own, its output in one pipe."""
    path = os.pathsep.join(map(str, (ROOT, HERE)))
    return subprocess.Popen(
        [sys.executable, *command, *options],
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def finish(process: subprocess.Popen, timeout: float = 280) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-4000:]
    return output


def run(command: Sequence[str], options: Sequence[str] = (), timeout: float = 280) -> str:
    return finish(start(command, options), timeout)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; temporary files would be one too many."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- input ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def real_texts() -> tuple[tuple[str, str], ...]:
    """(name, text): descriptions of installed packages, long docstrings of the standard library."""
    return tuple(sorted({*_descriptions(), *_docstrings()}))


def _descriptions() -> Iterator[tuple[str, str]]:
    for folder in site.getsitepackages():
        for path in Path(folder).glob("*.dist-info/METADATA"):
            _, _, text = path.read_text(errors="replace").partition("\n\n")
            if len(text) > 600:
                yield path.parent.name, text


def _docstrings() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")):  # of its packages too would be a minute of parsing
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 600:
                    name = getattr(node, "name", "module")
                    yield f"{path.relative_to(library)}:{name}:{node.body[0].lineno}", text


def varied(text: str, number: int, share: float = 0.35) -> str:
    """The text with a share of its words replaced by other words of real texts: of the same kind,
    but no near-duplicate of it (word 5-grams agree in (1 - share)^5 of all)."""
    draw = random.Random(f"{number} {len(text)} {text[:80]}")
    words = _words()
    return re.sub(
        r"[A-Za-z]{2,}", lambda w: draw.choice(words) if draw.random() < share else w[0], text
    )


@functools.lru_cache(maxsize=1)
def _words() -> list[str]:
    return re.findall(r"[A-Za-z]{2,}", " ".join(text for _, text in real_texts()[::7]))


def documents(num_bytes: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Records of about `num_bytes` of text in all, no two of them copies."""
    total, number = 0, 0
    while True:
        for name, text in real_texts():
            record = varied(text, number + 1_000_000 * seed)
            yield {"id": f"{name}#{number}", "text": record}
            total += len(record)
            if total >= num_bytes:
                return
        number += 1


def write_pages(folder: Path, num_bytes: int, files: int = 8, seed: int = 0) -> Path:
    """Gzipped JSON lines, HTML and text; with a copy, near-copies and broken records among them."""
    folder.mkdir(parents=True, exist_ok=True)
    handles = [
        gzip.open(folder / f"pages-{n:03d}.jsonl.gz", "wt", compresslevel=1)  # noqa: SIM115
        for n in range(files)
    ]
    for number, record in enumerate(documents(num_bytes, seed)):
        print(json.dumps(record), file=handles[number % files])
        if number % 50 == 7:  # the same again, and almost the same
            words = record["text"].split(" ")
            words[len(words) // 2] = "different"
            for tag, text in (("copy", record["text"]), ("edit", " ".join(words))):
                row = {"id": f"{record['id']} {tag}", "text": text}
                print(json.dumps(row), file=handles[(number + 1) % files])
        if number % 97 == 3:
            print('{"id": "broken", "text": ', file=handles[number % files])
    for handle in handles:
        handle.close()
    for number, (name, text) in enumerate(real_texts()[:40]):
        if number % 2:
            (folder / f"{number}.txt").write_text(text)
        else:
            paragraphs = "".join(f"<p>{part}</p>" for part in text.split("\n\n"))
            page = f"<html><head><title>{name}</title></head><body>{paragraphs}</body></html>"
            (folder / f"{number}.html").write_text(page)
    (folder / "truncated.jsonl.gz").write_bytes((folder / "pages-000.jsonl.gz").read_bytes()[:2000])
    return folder


def write_sources(folder: Path, packages: Sequence[str] = ("asyncio", "email", "json")) -> Path:
    """Packages of the standard library, and one file twice."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in packages:
        for path in sorted((library / package).rglob("*.py")):
            target = folder / path.relative_to(library)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (folder / "copy.py").write_bytes((library / "json" / "decoder.py").read_bytes())
    return folder
