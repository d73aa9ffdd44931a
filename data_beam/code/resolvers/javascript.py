"""JavaScript and TypeScript: relative paths with guessed endings and index files, the aliases of
tsconfig.json, and packages of the same repository by the name in their package.json."""

from __future__ import annotations

import re
from collections.abc import Iterator

import orjson

from data_beam.code.imports import Import
from data_beam.code.resolvers.repository import Repository, folder_of, join, remembered
from data_beam.code.resolvers.tsconfig import Configurations

LANGUAGES = ("javascript", "typescript", "vue", "svelte")
_ENDINGS = (
    ".ts", ".tsx", ".mts", ".cts", ".js", ".jsx", ".mjs", ".cjs", ".vue", ".svelte", ".d.ts",
    ".d.mts", ".d.cts", ".json",
)  # fmt: skip
# TypeScript imports the file that the compiler will write.
_SOURCES = {
    ".js": (".ts", ".tsx", ".d.ts", ".jsx"),
    ".jsx": (".tsx",),
    ".mjs": (".mts", ".d.mts"),
    ".cjs": (".cts", ".d.cts"),
}
_MAX_HOPS = 6
_EXPORTED = re.compile(
    r"export[ \t]+(?:declare[ \t]+|abstract[ \t]+|async[ \t]+|default[ \t]+)*"
    r"(?:class|function\*?|const|let|var|interface|type|enum|namespace)[ \t]+([\w$]+)"
)


def _from_root(target: str) -> tuple[str, ...]:
    """Paths that an alias without a tsconfig.json most likely stands for, below a package."""
    if target.startswith(("@/", "~/")):
        return f"src/{target[2:]}", target[2:]
    if target.startswith("/"):
        return (target[1:],)
    return (target,) if target.startswith(("src/", "lib/", "app/", "test/")) else ()


class _Files:
    def __init__(self, repository: Repository):
        self.repository = repository
        self.configurations = Configurations(repository)
        self.packages: dict[str, tuple[str, dict]] = {}
        for path in sorted(repository.texts):
            if path.rsplit("/", 1)[-1] == "package.json":
                try:
                    fields = orjson.loads(repository.texts[path])
                except orjson.JSONDecodeError:
                    continue
                if isinstance(fields, dict) and isinstance(fields.get("name"), str):
                    self.packages.setdefault(fields["name"], (folder_of(path), fields))

    @remembered
    def at(self, base: str) -> str | None:
        """The file that an import of the path `base` finds."""
        texts = self.repository.texts
        if base in texts:
            return base
        for ending, sources in _SOURCES.items():
            if base.endswith(ending):
                for source in sources:
                    if (path := base.removesuffix(ending) + source) in texts:
                        return path
        for ending in _ENDINGS:
            if base + ending in texts:
                return base + ending
        if (entry := self._entry(base)) is not None:
            return entry
        for ending in _ENDINGS:
            if (path := f"{base}/index{ending}" if base else f"index{ending}") in texts:
                return path
        return None

    def _entry(self, folder: str) -> str | None:
        """What the package.json of `folder` names as its entry, if it is a file here."""
        for where, fields in self.packages.values():
            if where == folder:
                for key in ("source", "module", "main", "types"):
                    entry = fields.get(key)
                    if isinstance(entry, str) and (path := join(folder, entry)) is not None:
                        for candidate in (path, *(path + ending for ending in _ENDINGS)):
                            if candidate in self.repository.texts:
                                return candidate
                for start in ("src/index", "index", "src/main", "lib/index"):
                    for ending in _ENDINGS:
                        path = join(folder, start + ending)
                        if path in self.repository.texts:
                            return path
        return None

    def find(self, importer: str, target: str) -> str | None:
        target = target.split("?", 1)[0].split("!")[-1]
        if target.startswith("."):
            base = join(folder_of(importer), target)
            return None if base is None else self.at(base)
        for path in self.configurations.candidates(importer, target):
            if found := self.at(path):
                return found
        for root in self._roots(importer):
            for inside in _from_root(target):
                if found := self.at(join(root, inside) or ""):
                    return found
        parts = target.split("/")
        name = "/".join(parts[: 2 if target.startswith("@") else 1])
        if name not in self.packages:
            return None
        folder, rest = self.packages[name][0], target[len(name) + 1 :]
        if not rest:
            return self._entry(folder) or self.at(folder)
        return self.at(join(folder, rest) or "") or self.at(join(folder, f"src/{rest}") or "")

    def _roots(self, importer: str) -> Iterator[str]:
        """Folders above the file that hold a package.json, the nearest first, then the top."""
        folder = folder_of(importer)
        while folder:
            if f"{folder}/package.json" in self.repository.texts:
                yield folder
            folder = folder_of(folder)
        yield ""

    @remembered
    def _exports(self, path: str) -> frozenset[str]:
        return frozenset(_EXPORTED.findall(self.repository.texts[path]))

    @remembered
    def definer(self, path: str, name: str) -> str | None:
        """The file that the index file at `path` passes `name` on from."""
        return self._definer(path, name, _MAX_HOPS, set())

    def _definer(self, path: str, name: str, hops: int, seen: set[tuple[str, str]]) -> str | None:
        if name in self._exports(path):
            return path
        # `export *` may fan out and meet again: every file is asked once.
        if hops == 0 or (path, name) in seen:
            return None
        seen.add((path, name))
        for item in self.repository.imports(path):
            if item.kind != "export":
                continue
            target = self.find(path, item.target)
            if target is None or target == path:
                continue
            for original, alias in zip(item.names, item.aliases, strict=True):
                if alias == name and original != "*":
                    return self._definer(target, original, hops - 1, seen) or target
            if "*" in item.names and (found := self._definer(target, name, hops - 1, seen)):
                return found
        return None


def _is_index(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith("index.")


def add_edges(repository: Repository) -> None:
    files = _Files(repository)
    for path in repository.of(LANGUAGES):
        for item in repository.imports(path):
            target = files.find(path, item.target)
            if target is None:
                continue
            if _is_index(target) and item.kind == "import" and _below(path, target):
                _through_index(files, path, target, item)
            else:
                repository.add(path, target, not item.lazy)


def _below(path: str, index: str) -> bool:
    folder = folder_of(index)
    return not folder or path.startswith(f"{folder}/")


def _through_index(files: _Files, path: str, index: str, item: Import) -> None:
    """A file that imports from the index above it, which most likely exports that file too: to the
    files that define the names, not to the index."""
    for name in item.names or ("*",):
        definer = files.definer(index, name) if name != "*" else None
        files.repository.add(path, definer or index, definer is not None and not item.lazy)
