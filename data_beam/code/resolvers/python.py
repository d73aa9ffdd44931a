"""Python: modules by name, whatever folder the packages lie in; names that an `__init__.py` passes
on lead to the file that defines them."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict

from data_beam.code.imports import Import
from data_beam.code.resolvers.repository import Repository, folder_of, preference, remembered

LANGUAGES = ("python", "cython")
_ENDINGS = (".py", ".pyx", ".pyi", ".pxd", ".pyw")
_DEFINITION = re.compile(
    r"^(?:(?:async[ \t]+)?def|class|cdef[ \t]+class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]+)?=(?!=)",
    re.MULTILINE,
)
_MAX_HOPS = 6  # __init__.py files that a name is followed through
_STANDARD = sys.stdlib_module_names
_MIN_STANDARD = 20  # modules of these names side by side


class _Modules:
    def __init__(self, repository: Repository):
        self.repository = repository
        # Every dotted suffix of a file's path -> [(root folder, path)].
        self.by_suffix: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.packages: set[str] = set()  # folders with an __init__
        for path in repository.of(LANGUAGES):
            stem = next((path.removesuffix(e) for e in _ENDINGS if path.endswith(e)), None)
            if stem is None:
                continue
            parts = stem.split("/")
            if parts[-1] == "__init__":
                parts.pop()
                self.packages.add("/".join(parts))
            for start in range(len(parts)):
                name = ".".join(parts[start:])
                self.by_suffix[name].append(("/".join(parts[:start]), path))
        for found in self.by_suffix.values():
            # A module before its stub, a package's __init__ before a module beside it.
            found.sort(
                key=lambda item: (
                    item[0].count("/"),
                    item[0],
                    _ENDINGS.index(_ending(item[1])),
                    item[1],
                )
            )

        standard = Counter(
            root for name, found in self.by_suffix.items() if name in _STANDARD for root, _ in found
        )
        # Copies of the standard library, where its names mean the files here.
        self.standard_roots = {r for r, count in standard.items() if count >= _MIN_STANDARD}
        self.top = self._name_of_top()

    @remembered
    def root(self, folder: str) -> str:
        """The folder that holds the outermost package around `folder`."""
        while folder and folder in self.packages:
            folder = folder_of(folder)
        return folder

    def _name_of_top(self) -> str:
        """The name by which its files import the package that is the whole repository, whose folder
        is not among the paths: the first part of most absolute imports that would fit."""
        if "" not in self.packages:
            return ""
        counts: Counter[str] = Counter()
        for path in self.repository.of(LANGUAGES):
            for item in self.repository.imports(path):
                first, _, rest = item.target.partition(".")
                tails = [rest] if rest else list(item.names)
                if first and first not in _STANDARD:
                    counts[first] += any(self.at(tail.replace(".", "/")) for tail in tails if tail)
        name, count = max(counts.items(), key=lambda item: (item[1], item[0]), default=("", 0))
        return name if count else ""

    def absolute(self, name: str, importer: str) -> str | None:
        """The file of module `name`, as a file at `importer` would find it."""
        if self.top and (name == self.top or name.startswith(f"{self.top}.")):
            return self.at(name[len(self.top) + 1 :].replace(".", "/"))
        found = self.by_suffix.get(name)
        if not found:
            return None
        here = folder_of(importer)
        own_root = self.root(here)
        standard = name.split(".")[0] in _STANDARD
        best = None
        for root, path in found:
            if standard and root not in self.standard_roots:
                continue
            if root in self.packages:
                # Inside a package: only a script beside it, or Python 2, finds it by this name.
                if root != here:
                    continue
                rank = 3
            elif root == own_root:
                rank = 0
            else:
                rank = 1 if not root or importer.startswith(f"{root}/") else 2
            key = (rank, preference(root), _ENDINGS.index(_ending(path)), path)
            if best is None or key < best[0]:
                best = (key, path)
        return best[1] if best else None

    def relative(self, target: str, importer: str) -> tuple[str | None, str]:
        """The module of "..a.b", and the folder it would lie in."""
        name = target.lstrip(".")
        folder = folder_of(importer)
        for _ in range(len(target) - len(name) - 1):
            folder = folder_of(folder)
        base = "/".join(part for part in (folder, *name.split(".")) if part)
        return self.at(base), base

    def at(self, base: str) -> str | None:
        """The file of the module at the path `base` without its ending."""
        for ending in _ENDINGS:
            if (
                path := f"{base}/__init__{ending}" if base else f"__init__{ending}"
            ) in self.repository.texts:
                return path
            if base + ending in self.repository.texts:
                return base + ending
        return None

    def module(self, target: str, importer: str) -> tuple[str | None, str | None]:
        """File and base path (for submodules of folders without __init__) of an import's target."""
        if target.startswith("."):
            return self.relative(target, importer)
        path = self.absolute(target, importer)
        if path is not None:
            stem = path.removesuffix(_ending(path))
            return path, folder_of(path) if stem.endswith("__init__") else stem
        return None, None

    def submodule(self, base: str | None, target: str, name: str, importer: str) -> str | None:
        if base is not None:
            return self.at(f"{base}/{name}" if base else name)
        return self.absolute(f"{target}.{name}", importer)

    @remembered
    def defined(self, path: str) -> frozenset[str]:
        text = self.repository.texts[path]
        return frozenset(match[1] or match[2] for match in _DEFINITION.finditer(text))

    @remembered
    def definer(self, path: str, name: str) -> str | None:
        """The file that `name` of the module at `path` comes from; None when it is not seen."""
        return self._definer(path, name, _MAX_HOPS, set())

    def _definer(self, path: str, name: str, hops: int, seen: set[tuple[str, str]]) -> str | None:
        if name in self.defined(path):
            return path
        # Star imports may fan out and meet again: every module is asked once.
        if hops == 0 or (path, name) in seen:
            return None
        seen.add((path, name))
        for item in self.repository.imports(path):
            if item.kind != "from" or item.lazy:
                continue
            target, base = self.module(item.target, path)
            for original, alias in zip(item.names, item.aliases, strict=True):
                if alias == name:
                    if submodule := self.submodule(base, item.target, original, path):
                        return submodule
                    if target and target != path:
                        return self._definer(target, original, hops - 1, seen) or target
                elif original == "*" and target and target != path:
                    found = self._definer(target, name, hops - 1, seen)
                    if found:
                        return found
        return None


def _ending(path: str) -> str:
    return path[path.rindex(".") :]


def _is_init(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith("__init__.")


def _inside(path: str, init: str) -> bool:
    """Whether a file lies in the package of `init`, which runs before it."""
    folder = folder_of(init)
    return not folder or path.startswith(f"{folder}/")


def add_edges(repository: Repository) -> None:
    modules = _Modules(repository)
    for path in repository.of(LANGUAGES):
        for item in repository.imports(path):
            if item.kind == "import":
                _plain_import(modules, path, item)
            else:
                _from_import(modules, path, item)


def _plain_import(modules: _Modules, path: str, item: Import) -> None:
    """`import a.b.c`: the longest part of the name that is a module here."""
    name = item.target
    while name:
        target = modules.absolute(name, path)
        if target is not None:
            if not (_is_init(target) and _inside(path, target)):
                modules.repository.add(path, target, not item.lazy)
            return
        name = name.rpartition(".")[0]


def _from_import(modules: _Modules, path: str, item: Import) -> None:
    repository = modules.repository
    target, base = modules.module(item.target, path)
    for name in item.names:
        if name != "*" and (submodule := modules.submodule(base, item.target, name, path)):
            repository.add(path, submodule, not item.lazy)
        elif target is None:
            continue
        elif not _is_init(target) or target == path:
            repository.add(path, target, not item.lazy)
        elif name == "*":
            repository.add(path, target, not (item.lazy or _inside(path, target)))
        else:
            definer = modules.definer(target, name)
            if definer and definer != target:
                repository.add(path, definer, not item.lazy)
            else:
                # A package's __init__ imports its modules; one of them that needs it makes a cycle.
                repository.add(path, target, not (item.lazy or _inside(path, target)))
