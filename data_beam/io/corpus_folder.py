"""The folder a corpus job leaves behind: its manifest, and documents. Needs no Beam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_beam.io.storage import is_remote
from data_beam.io.writers import read_array_record
from data_beam.schema import Document
from internlm2_jax.errors import UserError
from internlm2_jax.files import read_json


def read_manifest(folder: str | Path, kind: str = "corpus") -> dict[str, Any]:
    """manifest.json of a folder written by this package. A folder without one, or of another
    kind, is a UserError."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no {kind} (no manifest.json); run `python -m data_beam`")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise UserError(f"{path} does not describe a {kind}; point at the folder of a {kind}")
    return manifest


def documents(
    folder: str | Path, split: str | None = None, source: str | None = None
) -> Iterator[Document]:
    """Documents of a split and a source (None = all), always in the same order."""
    for row in read_manifest(folder)["shards"]:
        if split in (None, row["split"]) and source in (None, row["source"]):
            for record in read_array_record(Path(folder, row["name"])):
                yield Document.from_bytes(record)


_OURS = {"documents", "dead_letters", "attributes", "corpus", "waves", "benchmarks.index",
         "common_runs.json", "inspect.html"}  # fmt: skip


def check_work_folder(output: str | Path, inputs: Sequence[str]) -> None:
    """Refuses an output folder of a corpus job that is its input, a file, or holds anything that
    no such job wrote."""
    if is_remote(output):
        return
    folder = Path(output)
    if any(Path(name).resolve() == folder.resolve() for name in inputs):
        raise UserError(f"output {output} is the input itself; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {output} is a file; choose a folder")
    if folder.is_dir():
        strange = sorted({entry.name for entry in folder.iterdir()} - _OURS)
        if strange:
            raise UserError(
                f"output {output} is not empty and {strange[0]} is not of a corpus job; choose "
                "another folder"
            )
