"""What a file has from its repository -> the attribute "repository": the licence that holds for it,
and what kind of file it is there. The files of a repository stand together in a shard, so this
needs columns only, and no shuffle."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from data_beam import progress, runners, tables  # runners first: it imports Beam without its noise
from data_beam.code import licences, spdx
from data_beam.code.languages import is_documentation
from data_beam.stage import Output, open_documents, read_manifest
from internlm2_jax.files import fingerprint

beam = runners.beam
NAME = "repository"
VERSION = 2
SCHEMA = pa.schema(
    [("spdx", pa.string()), ("licensed", pa.bool_()), ("permissive", pa.bool_()),
     ("kind", pa.string())]
)  # fmt: skip
CODE, DOCUMENTATION, LICENCE, MANIFEST = "code", "documentation", "licence", "manifest"
# What the resolvers of imports read to know the repository's own names; rules leave them alone.
_MANIFESTS = {"package.json", "tsconfig.json", "jsconfig.json", "go.mod", "Cargo.toml",
              "pyproject.toml", "setup.cfg", "setup.py", "pom.xml"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Repository:
    """`spdx` is the licence that the file states, or the folder nearest above it; `permissive`
    whether `allowed` licences are enough for it, null without one; `kind` is "code",
    "documentation", "licence" or "manifest" (package.json, go.mod ...)."""

    allowed: tuple[str, ...] = spdx.PERMISSIVE

    def run(self, output: str | os.PathLike, beam_options: Sequence[str] = ()) -> dict[str, Any]:
        """Writes the attribute for the documents below `output`; returns its manifest."""
        documents = open_documents(output)
        settings = {"attribute": NAME, "version": VERSION, **dataclasses.asdict(self)}
        manifests = {name: read_manifest(tables.folder_of(output, name), "attribute")
                     for name in ("facts", "licence")}  # fmt: skip
        upstream = {name: manifest["digest"] for name, manifest in manifests.items()}
        target = Output(
            tables.folder_of(output, NAME), "attribute", tables.SUFFIX,
            tuple(
                fingerprint([settings, [m["shards"][shard]["digest"] for m in manifests.values()]])
                for shard in range(documents.shards)
            ),
        )  # fmt: skip
        if not target.is_complete(settings, upstream):
            target.start()
            work = _Write(os.fspath(output), self.allowed, target)
            runners.run_over(
                target.pending(), "Repositories", work, beam_options, shown="repositories"
            )
        return target.complete(settings, upstream)


class _Write(beam.DoFn):
    def __init__(self, output: str, allowed: tuple[str, ...], target: Output):
        super().__init__()
        self.output, self.allowed, self.target = output, allowed, target

    def process(self, shard):
        facts = tables.read_attribute(self.output, "facts", shard, ["id", "source", "repo", "path"])
        stated = tables.read_attribute(self.output, "licence", shard, ["spdx"])["spdx"].to_pylist()
        groups: dict[tuple[str, str], list[int]] = {}
        rows = facts.to_pylist()
        for number, row in enumerate(rows):
            groups.setdefault((row["source"], row["repo"]), []).append(number)
        found = list(stated)
        for (_, repo), numbers in groups.items():
            if repo:
                some = sorted((rows[n]["path"], stated[n]) for n in numbers)
                holds = licences.of_stated(some)
                for n in numbers:
                    found[n] = holds[rows[n]["path"]]
        table = pa.table(
            {
                "id": [row["id"] for row in rows],
                "spdx": found,
                "licensed": [one is not None for one in found],
                "permissive": [one and spdx.permits(one, self.allowed) for one in found],
                "kind": [kind_of(row["path"]) for row in rows],
            },
            schema=tables.with_id(SCHEMA),
        )
        tables.write_table(self.target.path(shard), table)
        self.target.finish(shard, len(rows))
        progress.bump()


def kind_of(path: str) -> str:
    if licences.is_licence_file(path):
        return LICENCE
    if path.rpartition("/")[2] in _MANIFESTS:
        return MANIFEST
    return DOCUMENTATION if is_documentation(path) else CODE
