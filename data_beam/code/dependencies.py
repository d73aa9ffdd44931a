"""Which files of a repository need which."""

from __future__ import annotations

from collections.abc import Iterable

from data_beam.code.resolvers import c, go, java, javascript, python, rust
from data_beam.code.resolvers.repository import Repository

_RESOLVERS = (python, c, java, javascript, go, rust)


def resolve(files: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, bool]]:
    """Edges of one repository from its files (path, language, text): `edges[path]` holds every file
    that `path` needs. True: to be loaded; False: later, for types, or by a guess. Imports of what
    lies outside the repository give no edge."""
    repository = Repository(files)
    present = set(repository.languages.values())
    for resolver in _RESOLVERS:
        if not present.isdisjoint(resolver.LANGUAGES):
            resolver.add_edges(repository)
    return repository.edges
