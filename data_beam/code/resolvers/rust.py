"""Rust: crates by their Cargo.toml, modules by path. A parent declares its modules and so stands
after them; `use` of a parent is an edge only where nothing better is known."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict

from data_beam.code.imports import Import
from data_beam.code.resolvers.repository import Repository, folder_of, join, remembered

LANGUAGES = ("rust",)
_ROOTS = ("lib.rs", "main.rs")
_MAX_HOPS = 6  # re-exports that a name is followed through
_MAX_NAMES = 50  # in one path
_ITEM = re.compile(
    r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?(?:(?:unsafe|async|const|extern \"C\")[ \t]+)*"
    r"(?:fn|struct|enum|trait|type|union|const|static|macro_rules!)[ \t]+(\w+)",
    re.MULTILINE,
)

Module = tuple[str, tuple[str, ...]]  # root folder of the crate, names from its top


class _Crates:
    def __init__(self, repository: Repository):
        self.repository = repository
        self.manifests: dict[str, str] = {}  # folder of a Cargo.toml -> crate name
        for path in sorted(repository.texts):
            if path.rsplit("/", 1)[-1] == "Cargo.toml":
                self.manifests[folder_of(path)] = _crate_name(repository.texts[path])
        self.modules: dict[Module, str] = {}
        self.module_of: dict[str, Module] = {}
        for path in repository.of(LANGUAGES):
            root, names = self._place(path)
            self.module_of[path] = (root, names)
            known = self.modules.get((root, names))
            # lib.rs before main.rs, a.rs before a/mod.rs.
            if known is None or path.rsplit("/", 1)[-1] == "lib.rs":
                self.modules[root, names] = path
        self.libraries: dict[str, str] = defaultdict(str)
        for folder, name in self.manifests.items():
            source = f"{folder}/src" if folder else "src"
            if (source, ()) in self.modules and name:
                self.libraries.setdefault(name.replace("-", "_"), source)

    def _place(self, path: str) -> Module:
        """Crate root and module names of a file."""
        folder, _, file = path.rpartition("/")
        manifest = folder
        while manifest not in self.manifests and manifest:
            manifest = folder_of(manifest)
        inner = folder[len(manifest) :].strip("/") if manifest else folder
        parts = inner.split("/") if inner else []
        if "src" in parts:
            depth = parts.index("src") + 1
            root = "/".join(p for p in (manifest, *parts[:depth]) if p)
            parts = parts[depth:]
            if parts[:1] == ["bin"]:
                return f"{root}/bin/{file}", ()
        elif parts[:1] and parts[0] in ("tests", "examples", "benches"):
            # Each file is a crate; folders below hold modules they share.
            root = "/".join(p for p in (manifest, parts[0]) if p)
            parts = parts[1:]
        else:
            root = manifest
        if file in _ROOTS and not parts:
            return root, ()
        names = parts if file == "mod.rs" else [*parts, file.removesuffix(".rs")]
        return root, tuple(names)

    @remembered
    def items(self, path: str) -> frozenset[str]:
        return frozenset(_ITEM.findall(self.repository.texts[path]))

    @remembered
    def passed_on(self, path: str) -> tuple[tuple[str, str], ...]:
        """(name here, path) of every `pub use`."""
        return tuple(
            (item.aliases[0], item.target)
            for item in self.repository.imports(path)
            if item.kind == "pub use"
        )

    @remembered
    def find(self, importer: str, target: str) -> str | None:
        """The file that defines what a path of names leads to, as seen from `importer`."""
        return self._find(importer, target, _MAX_HOPS, set())

    def _find(
        self, importer: str, target: str, hops: int, seen: set[tuple[str, str]]
    ) -> str | None:
        root, here = self.module_of[importer]
        first, *rest = target.split("::")[:_MAX_NAMES]
        if first == "crate":
            names = tuple(rest)
        elif first == "self":
            names = (*here, *rest)
        elif first == "super":
            up = here[:-1]
            while rest and rest[0] == "super":
                up, rest = up[:-1], rest[1:]
            names = (*up, *rest)
        elif (root, (*here, first)) in self.modules:
            names = (*here, first, *rest)
        elif first in self.libraries and self.libraries[first] != root:
            root, names = self.libraries[first], tuple(rest)
        elif (root, (first,)) in self.modules and len(rest):
            names = (first, *rest)  # the 2015 edition counts from the crate
        else:
            return None
        for length in range(len(names), -1, -1):
            path = self.modules.get((root, names[:length]))
            if path is not None:
                return self._item(path, names[length:], hops, seen)
        return None

    def _item(
        self, path: str, names: tuple[str, ...], hops: int, seen: set[tuple[str, str]]
    ) -> str:
        """Follows `pub use` for the first of `names` in the module at `path`."""
        if not names or not hops or names[0] in self.items(path) or (path, names[0]) in seen:
            return path
        seen.add((path, names[0]))  # `pub use x::*` may fan out and meet again
        for alias, target in self.passed_on(path):
            if alias == names[0]:
                found = self._find(path, target, hops - 1, seen)
                return found if found else path
        if names[0] != "*":
            for alias, target in self.passed_on(path):
                if alias == "*":
                    inner = f"{target.removesuffix('::*')}::{names[0]}"
                    found = self._find(path, inner, hops - 1, seen)
                    if found and found != path and names[0] in self.items(found):
                        return found
        return path

    def child(self, path: str, item: Import) -> str | None:
        """The file of `mod x;`."""
        folder = folder_of(path)
        texts = self.repository.texts
        if item.kind in ("path", "include"):
            found = join(folder, item.target)
            return found if found in texts else None
        file = path.rsplit("/", 1)[-1]
        _, names = self.module_of[path]
        if file not in ("mod.rs", *_ROOTS) and names:
            inner = f"{path.removesuffix('.rs')}"
        else:
            inner = folder
        for name in (f"{item.target}.rs", f"{item.target}/mod.rs"):
            for base in (inner, folder):
                if (found := join(base, name)) in texts and found != path:
                    return found
        return None


def _crate_name(manifest: str) -> str:
    try:
        fields = tomllib.loads(manifest)
    except (tomllib.TOMLDecodeError, RecursionError):
        return ""
    for section in ("lib", "package"):
        part = fields.get(section)
        if isinstance(part, dict) and isinstance(part.get("name"), str):
            return part["name"]
    return ""


def add_edges(repository: Repository) -> None:
    crates = _Crates(repository)
    for path in repository.of(LANGUAGES):
        root, here = crates.module_of[path]
        for item in repository.imports(path):
            if item.kind in ("mod", "path", "include"):
                repository.add(path, crates.child(path, item), True)
                continue
            target = crates.find(path, item.target)
            if target is None:
                continue
            other_root, names = crates.module_of[target]
            above = other_root == root and names == here[: len(names)]
            repository.add(path, target, not (above or item.lazy))
