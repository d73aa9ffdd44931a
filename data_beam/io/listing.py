"""Which files a job reads: listing a folder, and choosing up to a number of bytes.

The choice looks at a hash of each file's name, never at the order of listing, so it is the same on
every file system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data_beam.schema import hash63
from internlm2_jax.errors import UserError

# File names and extensions of code, with the language they stand for.
CODE_LANGUAGES = {
    ".asm": "assembly", ".awk": "awk", ".bash": "shell", ".c": "c", ".cc": "c++", ".cfg": "ini",
    ".clj": "clojure", ".cmake": "cmake", ".cpp": "c++", ".cs": "c#", ".css": "css", ".cu": "cuda",
    ".cuh": "cuda", ".cxx": "c++", ".dart": "dart", ".el": "lisp", ".ex": "elixir",
    ".f90": "fortran", ".go": "go", ".h": "c", ".hh": "c++", ".hpp": "c++", ".hs": "haskell",
    ".html": "html", ".htm": "html", ".ini": "ini", ".ipynb": "notebook", ".java": "java",
    ".jl": "julia", ".js": "javascript", ".json": "json", ".jsx": "javascript", ".kt": "kotlin",
    ".lisp": "lisp", ".lua": "lua", ".m": "matlab", ".ml": "ocaml", ".mjs": "javascript",
    ".php": "php", ".pl": "perl", ".pm": "perl", ".proto": "protobuf", ".ps1": "powershell",
    ".pxd": "cython", ".py": "python", ".pyi": "python", ".pyx": "cython", ".r": "r", ".rb": "ruby",
    ".rs": "rust", ".s": "assembly", ".scala": "scala", ".sh": "shell", ".sql": "sql",
    ".swift": "swift", ".tcl": "tcl", ".toml": "toml", ".ts": "typescript", ".tsx": "typescript",
    ".v": "verilog", ".vim": "vim", ".xml": "xml", ".yaml": "yaml", ".yml": "yaml", ".zig": "zig",
}  # fmt: skip
_CODE_NAMES = {"makefile": "make", "dockerfile": "docker", "cmakelists.txt": "cmake"}
_RECORD_FILES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".arrayrecord")


class FileRef(NamedTuple):
    """One input file: `path` below the folder `base`, which goes by the name `root`.

    `kind` says how to read it: "plain", "records", "man", "metadata" or "docstrings"; `size` is
    the estimated number of bytes of text in it.
    """

    root: str
    base: str
    path: str
    size: int
    kind: str
    source: str
    lang: str = "und"

    @property
    def location(self) -> Path:
        return Path(self.base, self.path)

    def rank(self, seed: int) -> int:
        return hash63(f"{self.root}/{self.path}", seed, "select")


def walk(base: Path, skip: Callable[[str, str], bool]) -> Iterator[tuple[str, os.stat_result]]:
    """Relative paths of the regular files below `base`; links are not followed, folders for which
    `skip(relative path, name)` holds are not entered."""
    stack = [""]
    while stack:
        folder = stack.pop()
        try:
            entries = list(os.scandir(base / folder))
        except OSError:
            continue
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_dir(follow_symlinks=False):
                    if not skip(relative, entry.name):
                        stack.append(relative)
                elif entry.is_file(follow_symlinks=False):
                    yield relative, entry.stat(follow_symlinks=False)
            except OSError:
                continue


def code_language(path: str) -> str | None:
    name = path.rsplit("/", 1)[-1].lower()
    return _CODE_NAMES.get(name) or CODE_LANGUAGES.get(os.path.splitext(name)[1])


def text_size(path: str, size: int) -> int:
    """Estimated bytes of text in a file: English in gzip is about a third of its length."""
    return size * 3 if path.endswith((".gz", ".zst")) else size


def list_folder(folder: Path, exclude: Iterable[Path] = ()) -> list[FileRef]:
    """Every file below `folder` but hidden ones, byte code and what lies below `exclude`.

    A folder that is missing, or holds no file, is a UserError.
    """
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"corpus folder {folder} {state}; give a folder with text or code files")
    base = folder.resolve()
    excluded = {os.fspath(path.resolve()) for path in exclude}

    def skip(relative: str, name: str) -> bool:
        hidden = name.startswith(".") or name == "__pycache__"
        return hidden or os.path.join(base, relative) in excluded

    files = []
    for path, stat in walk(base, skip):
        if path.rsplit("/", 1)[-1].startswith("."):
            continue
        kind, source, lang = "plain", "text", "und"
        if path.endswith(_RECORD_FILES):
            kind = "records"
        elif language := code_language(path):
            source, lang = "code", language
        files.append(
            FileRef("corpus", str(base), path, text_size(path, stat.st_size), kind, source, lang)
        )
    if not files:
        raise UserError(f"corpus folder {folder} holds no files; give one with text or code files")
    return files


def fair_shares(budget: int, available: Mapping[str, int]) -> dict[str, int]:
    """Divides `budget` evenly; what one part has too little of goes to the others."""
    shares: dict[str, int] = {}
    left, parts = budget, sorted(available, key=lambda name: (available[name], name))
    for position, name in enumerate(parts):
        shares[name] = min(available[name], left // (len(parts) - position))
        left -= shares[name]
    return shares


def take(files: Iterable[FileRef], budget: int, seed: int) -> list[FileRef]:
    """Files in the order of their hash until `budget` bytes are reached; one at least."""
    chosen: list[FileRef] = []
    total = 0
    for file in sorted(files, key=lambda file: (file.rank(seed), file.root, file.path)):
        if chosen and total + file.size > budget:
            continue
        chosen.append(file)
        total += file.size
        if total >= budget:
            break
    return chosen


def select(files: Iterable[FileRef], max_bytes: int | None, seed: int) -> list[FileRef]:
    """At most about `max_bytes` of text (None = all), half code and half text if there is enough of
    both, the text divided evenly between its kinds. Sorted by root and path."""
    files = list(files)
    if max_bytes is None:
        return sorted(files)
    by_source: dict[str, dict[str, list[FileRef]]] = {}
    for file in files:
        by_source.setdefault(file.source, {}).setdefault(file.kind, []).append(file)

    def size_of(group: Iterable[FileRef]) -> int:
        return sum(file.size for file in group)

    budgets = fair_shares(
        max_bytes, {s: sum(map(size_of, kinds.values())) for s, kinds in by_source.items()}
    )
    chosen: list[FileRef] = []
    for source, kinds in by_source.items():
        shares = fair_shares(budgets[source], {k: size_of(group) for k, group in kinds.items()})
        for kind, group in kinds.items():
            chosen += take(group, shares[kind], seed)
    return sorted(chosen)
