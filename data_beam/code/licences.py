"""The licence of a file: from its SPDX line or the notice at its top, from a licence's text, from a
package's metadata; and of the files of a repository from all of these together. What no rule knows
is None, never a guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from data_beam.code import spdx
from data_beam.code.header import legal_notice
from data_beam.code.licence_metadata import from_metadata, is_metadata
from data_beam.code.licence_texts import classify

_SPDX_LINE = re.compile(r"SPDX-License-Identifier:[ \t]*([^\n]{1,300})")
_SPDX_CHARS = 5_000
_DUNDER = re.compile(r"^__licen[cs]e__\s*=\s*[\"']([^\"'\n]{2,60})[\"']", re.MULTILINE)
_DUNDER_CHARS = 50_000

_FILE = re.compile(
    r"(?:(?:un)?licen[cs]es?|copying|copyright)"
    r"(?:[-_.](?!.*(?:bundled|third|3rd|check|header))[\w.+-]+)?"
    r"|(?:mit|apache|bsd|gpl|lgpl|mpl|agpl)[-_]?licen[cs]e(?:\.\w+)?|[\w-]+\.licen[cs]e",
    re.IGNORECASE,
)
_NO_LICENCE_ENDINGS = (
    ".py", ".pyi", ".c", ".cc", ".cpp", ".h", ".hpp", ".java", ".js", ".jsx", ".ts", ".tsx", ".go",
    ".rs", ".rb", ".php", ".pl", ".sh", ".json", ".yml", ".yaml", ".toml", ".cs", ".kt", ".scala",
    ".lua", ".svg", ".png", ".xml",
)  # fmt: skip


def is_licence_file(path: str) -> bool:
    """LICENSE, COPYING.LESSER, LICENSE-MIT.txt, LICENSES/Apache-2.0.txt and the like."""
    *folders, name = path.split("/")
    if name.lower().endswith(_NO_LICENCE_ENDINGS):
        return False
    if _FILE.fullmatch(name):
        return True
    return bool(folders) and folders[-1] in ("LICENSES", "licenses") and name.endswith(".txt")


def from_header(text: str) -> str | None:
    """From the SPDX line or the notice at the top of a file."""
    head = text[:_SPDX_CHARS]
    found = [
        known
        for match in _SPDX_LINE.finditer(head)
        if (known := spdx.normalize(re.split(r"\*/|-->|\*\)|\"|'|\\n", match[1])[0].strip()))
    ]
    if found:
        return spdx.combine(found, "AND")
    notice = legal_notice(text)
    if notice and (known := classify(notice)):
        return known
    if match := _DUNDER.search(text, 0, _DUNDER_CHARS):
        return spdx.normalize(match[1])
    return None


def of_file(path: str, text: str) -> str | None:
    """What one file states: a licence's text, a package's metadata, else its own notice."""
    if is_licence_file(path):
        return classify(text) or from_header(text)
    if is_metadata(path):
        return from_metadata(path, text) or from_header(text)
    return from_header(text)


def of_repository(files: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    """The licence of every file of one repository, given as (path, text)."""
    return of_stated((path, of_file(path, text)) for path, text in files)


def of_stated(files: Iterable[tuple[str, str | None]]) -> dict[str, str | None]:
    """The licence of every file of one repository, given as (path, what the file itself states).

    A file's own notice decides; without one, the folder nearest above it that has a licence file or
    package metadata. Several licence files side by side (LICENSE-MIT, LICENSE-APACHE) are a choice;
    where the metadata of the same folder names all of them, it says how they combine.
    """
    own: dict[str, str | None] = {}
    texts: dict[str, dict[str, str]] = {}
    metadata: dict[str, str] = {}
    for path, stated in files:
        folder = path.rpartition("/")[0]
        if is_licence_file(path):
            if folder.rpartition("/")[2] in ("LICENSES", "licenses"):
                folder = folder.rpartition("/")[0]
            if stated:
                texts.setdefault(folder, {})[path] = stated
            own[path] = None
        elif is_metadata(path):
            if stated and folder not in metadata:
                metadata[folder] = stated
            own[path] = None
        else:
            own[path] = stated
    of_folder = {
        folder: _of_folder(texts.get(folder, {}), metadata.get(folder))
        for folder in texts.keys() | metadata.keys()
    }
    return {path: stated or nearest(path, of_folder) for path, stated in own.items()}


def _of_folder(texts: Mapping[str, str], metadata: str | None) -> str | None:
    stated = [texts[path] for path in sorted(texts)]
    if metadata:
        tree = spdx.parse(metadata)
        named = spdx.identifiers(tree) if tree else set()
        trees = [spdx.parse(one) for one in stated]
        in_texts = set().union(*(spdx.identifiers(one) for one in trees if one))
        if {n.split("-only")[0].split("-or-later")[0] for n in in_texts} <= {
            n.split("-only")[0].split("-or-later")[0] for n in named
        }:
            return metadata
    return spdx.combine(stated, "OR") if stated else metadata


def nearest(path: str, of_folder: Mapping[str, str | None]) -> str | None:
    """What the folder nearest above `path` states."""
    folder = path
    while folder:
        folder = folder.rpartition("/")[0]
        if found := of_folder.get(folder):
            return found
    return of_folder.get("")
