"""The files of a repository, as the resolvers look at them."""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

from data_beam.code.imports import Import, imports


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def join(folder: str, path: str) -> str | None:
    """`path` relative to `folder`, normalised; None when it leads out of the repository."""
    whole = posixpath.normpath(posixpath.join(folder, path)) if folder else posixpath.normpath(path)
    return None if whole.startswith(("..", "/")) else "" if whole == "." else whole


def closeness(one: str, other: str) -> int:
    """Folders that two paths have in common from the top."""
    count = 0
    for left, right in zip(one.split("/")[:-1], other.split("/")[:-1], strict=False):
        if left != right:
            break
        count += 1
    return count


def preference(path: str) -> tuple[int, str]:
    """Shorter paths first, then the alphabet."""
    return path.count("/"), path


_Method = TypeVar("_Method", bound=Callable[..., Any])


def remembered(method: _Method) -> _Method:
    """Keeps the results of a method in its object, and so no longer than the object;
    functools.cache would keep every repository of a job."""
    name = f"_results_of_{method.__name__}"

    @functools.wraps(method)
    def wrapped(self: Any, *arguments: Any) -> Any:
        results = self.__dict__.setdefault(name, {})
        if arguments not in results:
            results[arguments] = method(self, *arguments)
        return results[arguments]

    return cast(_Method, wrapped)


class Repository:
    """Texts and languages by path, their imports on demand, and the edges found so far.

    `edges[path][other]`: `path` needs `other`. True: to be loaded at all; False: only later, or as
    far as can be guessed.
    """

    def __init__(self, files: Iterable[tuple[str, str, str]]):
        """`files` are (path, language, text)."""
        self.texts: dict[str, str] = {}
        self.languages: dict[str, str] = {}
        for path, lang, text in files:
            self.texts[path] = text
            self.languages[path] = lang
        self.edges: dict[str, dict[str, bool]] = {path: {} for path in self.texts}

    def of(self, languages: Iterable[str]) -> Iterator[str]:
        wanted = frozenset(languages)
        return (path for path in sorted(self.texts) if self.languages[path] in wanted)

    @remembered
    def imports(self, path: str) -> list[Import]:
        return imports(self.texts[path], self.languages[path])

    def add(self, path: str, needed: str | None, hard: bool) -> None:
        if needed is not None and needed != path:
            self.edges[path][needed] = self.edges[path].get(needed, False) or hard

    def nearest(self, path: str, candidates: Iterable[str]) -> str | None:
        """The candidate that shares most folders with `path`; then the shorter path."""
        return min(candidates, key=lambda c: (-closeness(path, c), preference(c)), default=None)
