"""Text and code that any machine with this project installed already holds.

Code: the standard library and the packages of the running environment. Text: READMEs, manuals,
package descriptions, man pages, and the docstrings of Python files that are *not* among the code,
so that no sentence of a docstring is also in a code document of the other split. Test folders,
licences and change logs are left out: they are many, and alike.
"""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

from data_beam.code import languages
from data_beam.io.file_ref import FileRef, text_size
from data_beam.io.listing import fair_shares, take, walk

MAN = Path("/usr/share/man")
DOC = Path("/usr/share/doc")
_MAX_FILE_BYTES = 1_000_000
_SKIPPED_FOLDERS = {
    "__pycache__", "test", "tests", "testing", "site-packages", "dist-packages", "licenses",
    "idle_test", "lib2to3", "node_modules",
}  # fmt: skip
_PROSE = re.compile(
    r"(?:^|/)(?:readme[^/]*|faq|howto|introduction|manual|tutorial|[^/]*\.(?:md|rst|txt))(?:\.gz)?$",
    re.IGNORECASE,
)
# Lists and legal texts that look like prose by their extension.
_NOT_PROSE = re.compile(
    r"(?:^|/)(?:copyright|copying|licen[cs]e|notice|authors|contributors|thanks|credits|change|news"
    r"|history|requirements|top_level|entry_points|record|sources|vendor|namespace_packages"
    r"|dependency_links|direct_url|installed-files|readme\.debian|sbom|third.?party)[^/]*$",
    re.IGNORECASE,
)
# The Google Cloud client installs 15,000 generated pages that differ in a few words.
_MAN_PAGE = re.compile(r"^man\d/(?!gcloud_)[^/]+\.\d\w*(?:\.gz)?$")
_LANGUAGES = {"python", "cython", "c", "c++", "cuda", "javascript", "typescript", "shell"}
_TRIPLE = re.compile(r'"""(.*?)"""', re.DOTALL)
# Docstrings are worth extracting from a file that holds at least so many characters of them.
_MIN_DOCSTRING_CHARS = 1500


def _skip(relative: str, name: str) -> bool:
    return name.startswith(".") or name in _SKIPPED_FOLDERS


def roots() -> dict[str, Path]:
    """Named folders with Python sources; two names for one folder count once."""
    paths = sysconfig.get_paths()
    found: dict[Path, str] = {}
    for name, key in (("stdlib", "stdlib"), ("packages", "purelib"), ("packages-lib", "platlib")):
        folder = Path(paths[key]).resolve()
        if folder.is_dir():
            found.setdefault(folder, name)
    return {name: folder for folder, name in found.items()}


def list_machine() -> list[FileRef]:
    """Every candidate file, each once. Python files are listed as code; `select_machine` turns some
    into docstring files."""
    files = []
    for root, base in roots().items():
        for path, stat in walk(base, _skip):
            if not 0 < stat.st_size <= _MAX_FILE_BYTES:
                continue
            name = path.rsplit("/", 1)[-1]
            if name == "METADATA" and ".dist-info/" in path:
                files.append(_ref(root, base, path, stat, "metadata", lang="en"))
            elif language := languages.language(path):
                if language in _LANGUAGES:
                    # Imports name the package, so its folder stays in the path.
                    repo = f"{root}/{path.partition('/')[0]}" if "/" in path else root
                    file = _ref(root, base, path, stat, "plain", "code", language)
                    files.append(file._replace(repo=repo))
            elif _PROSE.search(path) and not _NOT_PROSE.search(path):
                files.append(_ref(root, base, path, stat, "plain"))
    for path, stat in walk(DOC, _skip):
        if stat.st_size <= _MAX_FILE_BYTES and _PROSE.search(path) and not _NOT_PROSE.search(path):
            files.append(_ref("doc", DOC, path, stat, "plain"))
    for path, stat in walk(MAN, lambda relative, name: not re.fullmatch(r"man\d", name)):
        # Pages of a few bytes are references to another page.
        if stat.st_size >= 400 and _MAN_PAGE.match(path):
            files.append(_ref("man", MAN, path, stat, "man", lang="en"))
    return files


def _ref(root: str, base: Path, path: str, stat: os.stat_result, kind: str, source: str = "text",
         lang: str = "und") -> FileRef:  # fmt: skip
    size = text_size(path, stat.st_size)
    return FileRef(root, str(base), path, size, kind, source, lang, str(stat.st_mtime_ns))


def _docstring_chars(file: FileRef) -> int:
    try:
        text = Path(file.location).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return 0
    return sum(len(match) for match in _TRIPLE.findall(text) if len(match) >= 60)


def select_machine(files: list[FileRef], max_bytes: int, seed: int) -> list[FileRef]:
    """Half code, half text; the text divided evenly between manuals and READMEs, package
    descriptions, man pages and docstrings. Sorted by root and path."""
    code = [file for file in files if file.source == "code"]
    text = [file for file in files if file.source == "text"]
    available = {"code": sum(file.size for file in code), "text": sum(file.size for file in text)}
    # Python files that are not needed as code could give docstrings, about a sixth of their size.
    spare = max(0, available["code"] - max_bytes // 2) // 6
    budgets = fair_shares(max_bytes, {**available, "text": available["text"] + spare})
    chosen = take(code, budgets["code"], seed)
    taken = {(file.root, file.path) for file in chosen}

    # Files richest in docstrings would bias the choice; take them as the hash orders them.
    docstrings, total = [], 0
    rest = [f for f in code if f.lang == "python" and (f.root, f.path) not in taken]
    for file in sorted(rest, key=lambda file: (file.rank(seed), file.root, file.path)):
        if total >= budgets["text"]:
            break
        if (chars := _docstring_chars(file)) >= _MIN_DOCSTRING_CHARS:
            total += chars
            docstrings.append(
                file._replace(kind="docstrings", source="text", size=chars, lang="en", repo="")
            )

    kinds: dict[str, list[FileRef]] = {"docstrings": docstrings}
    for file in text:
        kinds.setdefault(file.kind, []).append(file)
    sizes = {kind: sum(file.size for file in group) for kind, group in kinds.items()}
    for kind, share in fair_shares(budgets["text"], sizes).items():
        chosen += take(kinds[kind], share, seed) if kinds[kind] else []
    return sorted(chosen)


def describe(files: list[FileRef]) -> str:
    """Where the text comes from, for the log: "code packages 14.0 MB, text man 3.1 MB"."""
    totals: dict[str, int] = {}
    for file in files:
        name = f"{file.source} {'docstrings' if file.kind == 'docstrings' else file.root}"
        totals[name] = totals.get(name, 0) + file.size
    return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(totals.items()))
