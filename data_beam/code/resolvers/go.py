"""Go: a package is a folder. An import leads to the files of the folder that declare the names used
from it; files of one package need each other in the same way."""

from __future__ import annotations

import re
from collections import defaultdict

from data_beam.code import lexing
from data_beam.code.resolvers.repository import (
    Repository,
    closeness,
    folder_of,
    preference,
    remembered,
)

LANGUAGES = ("go",)
_MODULE = re.compile(r"^module[ \t]+\"?([^\s\"]+)", re.MULTILINE)
_PACKAGE = re.compile(r"^package[ \t]+(\w+)", re.MULTILINE)
# Functions, types, variables and constants of the package; methods belong to their type.
_DECLARED = re.compile(r"\n(?:func|type|var|const)[ \t]+(\w+)")
_GROUP = re.compile(r"\n(?:type|var|const)[ \t]*\(\n")
_IN_GROUP = re.compile(r"^\t(\w+)", re.MULTILINE)
# A plain lower-case word is most often a variable of that name, unless it is called.
_WORD = re.compile(r"[A-Za-z_]\w*")


class _Packages:
    def __init__(self, repository: Repository):
        self.repository = repository
        self.folders: dict[str, list[str]] = defaultdict(list)
        for path in repository.of(LANGUAGES):
            self.folders[folder_of(path)].append(path)
        self.modules: dict[str, str] = {}  # module path -> folder
        for path in sorted(repository.texts):
            if path.rsplit("/", 1)[-1] == "go.mod" and (
                m := _MODULE.search(repository.texts[path])
            ):
                self.modules.setdefault(m[1], folder_of(path))

    @remembered
    def blank(self, path: str) -> str:
        text = self.repository.texts[path]
        return lexing.blank(text, lexing.scan(text, "go"))

    @remembered
    def declared(self, path: str) -> frozenset[str]:
        blank = f"\n{self.blank(path)}"
        names = _DECLARED.findall(blank)
        end = 0
        while (group := _GROUP.search(blank, end)) and (
            end := blank.find("\n)", group.end() - 1)
        ) > 0:
            names += _IN_GROUP.findall(blank, group.end(), end)
        return frozenset(names) - {"init", "main", "_"}

    @remembered
    def words(self, path: str) -> frozenset[str]:
        blank = f" {self.blank(path)} "
        names = set()
        for match in _WORD.finditer(blank):
            word = match[0]
            if blank[match.start() - 1] != "." and (
                not word.islower() or "_" in word or blank[match.end()] == "("
            ):
                names.add(word)
        return frozenset(names)

    @remembered
    def name(self, path: str) -> str:
        match = _PACKAGE.search(self.blank(path))
        return match[1] if match else ""

    def folder(self, importer: str, target: str) -> str | None:
        best = None
        for module, where in self.modules.items():
            if target == module or target.startswith(f"{module}/"):
                rest = target[len(module) + 1 :]
                folder = f"{where}/{rest}" if where and rest else where or rest
                if folder in self.folders and (best is None or len(module) > best[0]):
                    best = (len(module), folder)
        if best or self.modules or "." not in target.split("/")[0]:
            return best[1] if best else None
        # No go.mod: the folder with the longest end of the import path.
        parts = target.split("/")
        for start in range(1, len(parts)):
            end = "/".join(parts[start:])
            found = [f for f in self.folders if f == end or f.endswith(f"/{end}")]
            if found:
                return min(found, key=lambda f: (-closeness(importer, f"{f}/x"), preference(f)))
        return None


def add_edges(repository: Repository) -> None:
    packages = _Packages(repository)
    for path in repository.of(LANGUAGES):
        for item in repository.imports(path):
            folder = packages.folder(path, item.target)
            if folder is None:
                continue
            files = [
                other
                for other in packages.folders[folder]
                if not other.endswith("_test.go") and packages.name(other) != "main"
            ]
            name = item.aliases[0]
            if name not in ("_", ".") and len(files) > 1:
                # The package may be called otherwise than its folder.
                names = (
                    {name} if packages.name(files[0]) == name else {name, packages.name(files[0])}
                )
                used = {
                    word
                    for prefix in names
                    for word in re.findall(rf"\b{re.escape(prefix)}\.(\w+)", packages.blank(path))
                }
                files = [f for f in files if not used.isdisjoint(packages.declared(f))] or files
            for other in files:
                repository.add(path, other, True)
    for files in packages.folders.values():
        _within(packages, files)


def _within(packages: _Packages, files: list[str]) -> None:
    """Names declared in one file of a package and used in another."""
    declarers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in files:
        if not path.endswith("_test.go"):
            for name in packages.declared(path):
                declarers[packages.name(path), name].append(path)
    for path in files:
        package = packages.name(path)
        for name in packages.words(path):
            found = declarers.get((package, name), ())
            if len(found) == 1:  # methods of several types share names
                packages.repository.add(path, found[0], False)
