"""One Markdown document per repository: a heading, documentation as prose, every code file under
its path in a fenced block, in the order of the imports; documentation stands before the first code
file of its folder (the InternLM2 report, section 3.1.2)."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from data_beam.code import licences, spdx
from data_beam.code.dependencies import resolve
from data_beam.code.languages import fence_tag, is_documentation, language
from data_beam.code.notebook import fenced, longest_run, to_markdown
from data_beam.code.order import order as order_paths
from data_beam.code.resolvers.repository import folder_of, preference
from data_beam.schema import Document, Drop, document_id
from internlm2_jax.errors import UserError

STAGE = "assemble"
_HEADING_BYTES = 1000  # room in a part for the headings around a file
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Options:
    """`max_bytes` of UTF-8 in one document; a larger repository becomes several, cut between files.

    `max_repository_bytes` are held in memory at a time: of a repository beyond it, files are put
    together in groups of that size, in the order of their ids. `allowed` are the licences whose
    files are kept (None = all); `keep_unlicensed` keeps files for which none is stated.
    """

    max_bytes: int = 16 << 20
    max_repository_bytes: int = 128 << 20
    allowed: tuple[str, ...] | None = None
    keep_unlicensed: bool = True

    def __post_init__(self) -> None:
        if self.max_bytes < 10 * _HEADING_BYTES:
            raise UserError(
                f"max_bytes of an assembled document is {self.max_bytes}; give at least"
                f" {10 * _HEADING_BYTES}"
            )


def language_of(document: Document) -> str:
    """The programming language of a file, "" for prose and what is unknown."""
    if is_documentation(document.path):
        return ""
    if document.lang not in ("", "und"):
        return document.lang
    return language(document.path, document.text) or ""


def order(files: Iterable[Document]) -> list[Document]:
    """The files of one repository, each path once: needed ones first, documentation before the
    first code file of its folder or of a folder below. The order of `files` does not matter."""
    by_path = {file.path: file for file in files}
    languages = {path: language_of(file) for path, file in by_path.items()}
    documentation = [path for path in by_path if is_documentation(path)]
    # package.json, go.mod and Cargo.toml tell the resolvers where packages begin.
    edges = resolve(
        (path, languages[path] or "und", by_path[path].text) for path in sorted(by_path)
    )
    code = order_paths(by_path.keys() - set(documentation), edges)
    # A folder with code somewhere below it -> where in `code` its first file stands.
    first: dict[str, int] = {}
    for position, path in enumerate(code):
        folder = folder_of(path)
        while folder not in first:
            first[folder] = position
            if not folder:
                break
            folder = folder_of(folder)
    before: dict[int, list[str]] = {}
    for path in documentation:
        folder = folder_of(path)
        while folder and folder not in first:
            folder = folder_of(folder)
        before.setdefault(first.get(folder, 0), []).append(path)
    result = []
    for position in range(max(len(code), 1)):
        result += sorted(before.get(position, ()), key=_documentation_rank)
        result += code[position : position + 1]
    return [by_path[path] for path in result]


def _documentation_rank(path: str) -> tuple[int, bool, str]:
    """From the top down; in a folder the README first."""
    depth, _ = preference(path)
    return depth, not path.rsplit("/", 1)[-1].lower().startswith("readme"), path


def close_fence(text: str) -> str:
    """`text` with a fence at the end if it leaves one open, which would swallow what follows."""
    opened = ""
    for match in _FENCE.finditer(text):
        fence, info = match[1], match[2]
        if not opened:
            if fence[0] == "~" or "`" not in info:
                opened = fence
        elif fence[0] == opened[0] and len(fence) >= len(opened) and not info.strip():
            opened = ""
    return f"{text.rstrip()}\n{opened}" if opened else text


def section(file: Document) -> str:
    """One file under its path."""
    lang = language_of(file)
    text = file.text.replace("\r\n", "\n")
    if not lang and is_documentation(file.path):
        body = close_fence(text).strip("\n")
    elif lang == "notebook" and (converted := to_markdown(text)):
        body = close_fence(converted).strip("\n")
    else:
        body = fenced(text, fence_tag(lang))
    return f"## {_as_code(file.path)}\n\n{body}\n"


def _as_code(path: str) -> str:
    """A code span, which sets the headings of files apart from those inside documentation."""
    ticks = "`" * (longest_run(path) + 1)
    return f"{ticks}{' '.join(path.split())}{ticks}"


def markdown(title: str, files: Sequence[Document]) -> str:
    """The document of a repository whose files are given in their order."""
    return "\n".join([f"# {' '.join(title.split())}\n", *map(section, files)])


def assemble(
    documents: Iterable[Document], options: Options | None = None
) -> Iterator[Document | Drop]:
    """The documents of the repositories among `documents`, which are sorted by id, so that the
    files of one repository stand together; and a `Drop` for every file that is in none of them.
    What belongs to no repository passes unchanged."""
    options = options or Options()
    for (_, repo), files in itertools.groupby(_ascending(documents), lambda d: (d.source, d.repo)):
        if not repo:
            yield from files
            continue
        parts = itertools.count(1)
        for group in _groups(files, options.max_repository_bytes):
            yield from _repository(group, options, parts)


def _ascending(documents: Iterable[Document]) -> Iterator[Document]:
    previous = ""
    for document in documents:
        if document.id < previous:
            raise UserError(
                f"documents to assemble are not sorted by id ({document.id} after {previous});"
                " write them with the ingest pipeline"
            )
        previous = document.id
        yield document


def _groups(files: Iterable[Document], max_bytes: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for file in files:
        if group and size + len(file.text) > max_bytes:
            yield group
            group, size = [], 0
        group.append(file)
        size += len(file.text)
    if group:
        yield group


def _repository(
    group: list[Document], options: Options, parts: Iterator[int]
) -> Iterator[Document | Drop]:
    files: dict[str, Document] = {}
    for file in sorted(group, key=lambda d: (d.dump, d.timestamp, d.id), reverse=True):
        if file.path in files:  # another dump of the same repository
            yield Drop(file.id, STAGE, "older_copy", 0.0, files[file.path].id)
        else:
            files[file.path] = file
    stated = {path: spdx.normalize(file.license) for path, file in files.items()}
    if None in stated.values():  # not resolved before
        found = licences.of_repository((path, files[path].text) for path in sorted(files))
        stated = {path: found[path] or given for path, given in stated.items()}
    kept: dict[str, Document] = {}
    for path, file in sorted(files.items()):
        licence = stated[path] or ""
        if licences.is_licence_file(path):
            yield Drop(file.id, STAGE, "licence_text")
        elif options.allowed is not None and not licence and not options.keep_unlicensed:
            yield Drop(file.id, STAGE, "no_licence")
        elif options.allowed is not None and licence and not spdx.permits(licence, options.allowed):
            yield Drop(file.id, STAGE, "licence")
        elif file.num_bytes > options.max_bytes - _HEADING_BYTES:
            yield Drop(file.id, STAGE, "too_large", float(file.num_bytes))
        elif not file.text.strip():
            yield Drop(file.id, STAGE, "empty")
        else:
            kept[path] = file._replace(license=licence)
    if not kept:
        return
    for chunk in _cut(order(kept.values()), options.max_bytes):
        number = next(parts)
        title = chunk[0].repo if number == 1 else f"{chunk[0].repo} (part {number})"
        yield _document(title, number, chunk)


def _cut(files: list[Document], max_bytes: int) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for file in files:
        needed = len(section(file).encode("utf-8", "surrogatepass")) + 1
        if chunk and size + needed > max_bytes - _HEADING_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(file)
        size += needed
    yield chunk


def _document(title: str, part: int, files: list[Document]) -> Document:
    text = markdown(title, files)
    newest = max(files, key=lambda d: (d.dump, d.timestamp))
    sizes: Counter[str] = Counter()
    by_licence: Counter[str] = Counter()
    total, epochs = 0, 0.0
    for file in files:
        size = len(file.text)
        sizes[language_of(file) or "markdown"] += size
        by_licence[file.license] += size
        total += size
        epochs += size * float(file.meta.get("epochs", 1))
    code = [item for item in sizes.items() if item[0] != "markdown"] or list(sizes.items())
    lang = min(code, key=lambda item: (-item[1], item[0]))[0]
    licence = min(by_licence.items(), key=lambda item: (-item[1], item[0]))[0]
    return Document(
        id=document_id(files[0].source, f"#{part}", text, files[0].repo, newest.dump),
        text=text,
        source=files[0].source,
        dump=newest.dump,
        timestamp=max(file.timestamp for file in files),
        lang=lang,
        license=licence,
        repo=files[0].repo,
        meta={
            "files": len(files),
            "part": part,
            "licences": "; ".join(sorted(by_licence.keys() - {""})),
            "epochs": round(epochs / max(total, 1), 4),
        },
    )
