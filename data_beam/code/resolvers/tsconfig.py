"""The names that tsconfig.json and jsconfig.json give to folders: `compilerOptions.paths` and
`baseUrl`, which bundlers read too. An import means the file nearest above it; `extends` is followed
within the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from data_beam.code.resolvers.repository import Repository, folder_of, join, remembered

_NAMES = ("tsconfig.json", "jsconfig.json")
_MAX_EXTENDS = 8
# What JSON does not know, and strings, in which it means nothing.
_STRING = r'("(?:[^"\\\n]|\\.)*")'
_COMMENTS = re.compile(_STRING + r"|//[^\n]*|/\*.*?\*/", re.DOTALL)
_COMMAS = re.compile(_STRING + r"|,(?=\s*[\]}])")


class Aliases(NamedTuple):
    """`paths`: (pattern, targets from the top of the repository); `base`: the folder that other
    names start from, None without a baseUrl."""

    paths: tuple[tuple[str, tuple[str, ...]], ...] = ()
    base: str | None = None

    def candidates(self, target: str) -> Iterator[str]:
        """What an import of `target` may mean, the compiler's first choice first: the pattern that
        fits exactly, else the one with the longest beginning."""
        fitting = []
        for pattern, targets in self.paths:
            before, star, after = pattern.partition("*")
            if target == pattern and not star:
                fitting.append((1, len(pattern), "", targets))
            elif (
                star
                and len(target) >= len(before) + len(after)
                and target.startswith(before)
                and target.endswith(after)
            ):
                rest = target[len(before) : len(target) - len(after)]
                fitting.append((0, len(before), rest, targets))
        if fitting:
            *_, rest, targets = max(fitting)
            for place in targets:
                if path := join("", place.replace("*", rest, 1)):
                    yield path
        if self.base is not None and (path := join(self.base, target)):
            yield path


class Configurations:
    def __init__(self, repository: Repository):
        self.repository = repository

    def candidates(self, importer: str, target: str) -> Iterator[str]:
        """Paths in the repository that `target` may stand for in the file `importer`."""
        return self.above(folder_of(importer)).candidates(target)

    @remembered
    def above(self, folder: str) -> Aliases:
        """Of the nearest configuration file in `folder` or above it."""
        for name in _NAMES:
            path = f"{folder}/{name}" if folder else name
            if path in self.repository.texts:
                return self._read(path, _MAX_EXTENDS)
        return self.above(folder_of(folder)) if folder else Aliases()

    def _read(self, path: str, hops: int) -> Aliases:
        fields = _parse(self.repository.texts.get(path, ""))
        found = Aliases()
        parents = fields.get("extends")
        for parent in parents if isinstance(parents, list) else [parents]:
            if isinstance(parent, str) and hops and (other := self._parent(path, parent)):
                above = self._read(other, hops - 1)
                found = Aliases(
                    above.paths or found.paths, found.base if above.base is None else above.base
                )
        options = fields.get("compilerOptions")
        options = options if isinstance(options, dict) else {}
        here, base = folder_of(path), found.base
        if isinstance(url := options.get("baseUrl"), str):
            base = join(here, url)
        paths = found.paths
        if isinstance(given := options.get("paths"), dict):
            start = here if base is None else base
            paths = tuple(
                (pattern, tuple(_places(start, targets))) for pattern, targets in given.items()
            )
        return Aliases(paths, base)

    def _parent(self, path: str, name: str) -> str | None:
        """A configuration of this repository; those of installed packages have no aliases of it."""
        if not name.startswith("."):
            return None
        base = join(folder_of(path), name)
        endings = ("", ".json", "/tsconfig.json")
        return next(
            (base + e for e in endings if base is not None and base + e in self.repository.texts),
            None,
        )


def _places(start: str, targets: Any) -> Iterator[str]:
    for target in targets if isinstance(targets, list) else ():
        if isinstance(target, str) and (path := join(start, target)) is not None:
            yield path


def _parse(text: str) -> dict[str, Any]:
    """JSON with comments and trailing commas; {} for what is no object."""
    for pattern in (_COMMENTS, _COMMAS):
        text = pattern.sub(lambda match: match[1] or " ", text)
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
