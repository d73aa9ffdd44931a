"""The folder a corpus job leaves behind: its manifest, documents and drops. Needs no Beam."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_beam.io.writers import read_array_record, read_lines_zst
from data_beam.schema import Document, Drop
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


def drops(folder: str | Path) -> Iterator[Drop]:
    """Every removed document, in the order of the ids."""
    for line in read_lines_zst(Path(folder, "drops.jsonl.zst")):
        yield Drop.from_bytes(line)


def check_output(output: Path, kind: str, inputs: str | Path | None) -> None:
    """Refuses an output folder whose replacement would lose anything but an earlier `kind`."""
    if inputs is not None and output.resolve() == Path(inputs).resolve():
        raise UserError(f"output {output} is the input folder itself; choose another folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()):
        try:
            read_manifest(output, kind)
        except UserError as error:
            raise UserError(
                f"output {output} is not empty and holds no {kind}; choose another folder"
            ) from error
