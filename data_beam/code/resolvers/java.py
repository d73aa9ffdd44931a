"""Java: classes by package and name. Classes of the same package and of wildcard imports are needed
where their names stand in the program."""

from __future__ import annotations

import re
from collections import defaultdict

from data_beam.code import lexing
from data_beam.code.resolvers.repository import Repository

LANGUAGES = ("java",)
_PACKAGE = re.compile(r"^[ \t]*package[ \t]+([\w.]+)[ \t]*;", re.MULTILINE)
_CLASS_NAME = re.compile(r"(?<![.\w])[A-Z]\w*")  # not a member of another
_PARENT = re.compile(r"\b(?:extends|implements)\b[^{;]{0,500}")


def add_edges(repository: Repository) -> None:
    blanks: dict[str, str] = {}
    packages: dict[str, str] = {}
    # Package -> class -> files: modules of one repository may repeat a class.
    classes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in repository.of(LANGUAGES):
        text = repository.texts[path]
        blanks[path] = lexing.blank(text, lexing.scan(text, "java"))
        match = _PACKAGE.search(blanks[path])
        packages[path] = match[1] if match else ""
        classes[packages[path]][path.rsplit("/", 1)[-1].removesuffix(".java")].append(path)

    def find(path: str, name: str) -> str | None:
        """The class `name`, or the class that one of its outer parts names."""
        package, _, simple = name.rpartition(".")
        while simple:
            if package in classes and simple in classes[package]:
                return repository.nearest(path, classes[package][simple])
            package, _, simple = package.rpartition(".")
        return None

    for path, blank in blanks.items():
        names = None
        taken = set()
        for item in repository.imports(path):
            if not item.target.endswith(".*"):
                repository.add(path, find(path, item.target), True)
                taken.add(item.target.rpartition(".")[2])
                continue
            package = item.target.removesuffix(".*")
            if package in classes:
                names = set(_CLASS_NAME.findall(blank)) if names is None else names
                for simple in sorted(names & classes[package].keys()):
                    repository.add(path, repository.nearest(path, classes[package][simple]), True)
            else:
                repository.add(path, find(path, package), True)  # static members of a class
        neighbours = classes[packages[path]]
        if len(neighbours) > 1:
            names = set(_CLASS_NAME.findall(blank)) if names is None else names
            parents = {
                name for part in _PARENT.findall(blank) for name in _CLASS_NAME.findall(part)
            }
            for simple in sorted((names & neighbours.keys()) - taken):
                needed = repository.nearest(path, neighbours[simple])
                repository.add(path, needed, simple in parents)
