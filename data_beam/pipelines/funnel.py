"""What the driver of the corpus job adds when the workers are done: the funnel, the samples, the
list of shards, from the parts that the workers left in `parts/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from data_beam.io import writers
from data_beam.schema import Document
from data_beam.transforms import tally
from internlm2_jax.errors import UserError
from internlm2_jax.files import write_json

STAGES = ("read", "normalize", "filter", "exact_dedup", "near_dedup", "split")
PARTS = "parts"
EXCERPT = 400  # characters of a sample


def _part(folder: Path, name: str) -> list[Any]:
    path = folder / PARTS / name
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def finish(folder: Path, listed, files, corpus) -> dict[str, Any]:
    """Writes funnel.json and samples.json from the parts that the job left."""
    totals = {tuple(key): tuple(value) for key, value in _part(folder, "tallies.jsonl")}
    selected = {(file.root, file.path) for file in files}
    unread = [file.size for file in listed if (file.root, file.path) not in selected]
    chosen = sum(file.size for file in files)
    stages: list[dict[str, Any]] = [{
        "stage": "select", "unit": "file",
        "documents_in": len(files) + len(unread), "documents_out": len(files),
        "bytes_in": chosen + sum(unread), "bytes_out": chosen,
        "dropped": {"over_budget": {"documents": len(unread), "bytes": sum(unread)}} if unread
        else {},
    }]  # fmt: skip
    stages += [{"unit": "document", **tally.stage_row(stage, totals)} for stage in STAGES]
    if not stages[-1]["documents_out"]:
        reasons = {reason: count["documents"] for row in stages[1:]
                   for reason, count in row["dropped"].items()}  # fmt: skip
        worst = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items())) or "no files"
        raise UserError(
            f"no document of {corpus or 'this machine'} is usable (dropped: {worst}); give a "
            "folder with longer text or code files"
        )
    sources = {}
    for source in sorted({key[1] for key in totals}):
        read, kept = (tally.stage_row(stage, totals, source) for stage in ("read", "split"))
        sources[source] = {
            "input_documents": read["documents_in"], "input_bytes": read["bytes_in"],
            "kept_documents": kept["documents_out"], "kept_bytes": kept["bytes_out"],
            "stages": [tally.stage_row(stage, totals, source) for stage in STAGES],
        }  # fmt: skip
        for split in ("train", "validation"):
            row = tally.stage_row(split, totals, source)
            sources[source][split] = {"documents": row["documents_out"], "bytes": row["bytes_out"]}
    encodings: dict[str, int] = {}
    for (stage, _, _, reason), (documents, _) in totals.items():
        if stage == "encoding":
            encodings[reason] = encodings.get(reason, 0) + documents
    funnel = {"stages": stages, "sources": sources, "encodings": encodings,
              "input_bytes": stages[1]["bytes_in"], "input_files": len(files)}  # fmt: skip
    write_json(folder / "funnel.json", funnel)
    _write_samples(folder)
    if not (folder / "drops.jsonl.zst").exists():
        writers.write_lines_zst(folder / "drops.jsonl.zst", [])
    return funnel


def _write_samples(folder: Path) -> None:
    """samples.json: {"kept": [...], "dropped": [...]}; a duplicate comes with its survivor."""
    rows = sorted(_part(folder, "samples.jsonl"), key=lambda row: (row[0], row[1]))
    kept = [row for name, _, row in rows if name.startswith("kept")]
    dropped = [row for name, _, row in rows if name.startswith("dropped")]
    wanted = {row["of_id"] for row in dropped if row["of_id"]}
    survivors: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.arrayrecord")) if wanted else []:
        for record in writers.read_array_record(path):
            document = Document.from_bytes(record)
            if document.id in wanted:
                text = document.text[:EXCERPT]
                survivors[document.id] = {"of_path": document.path, "of_text": text}
    dropped = [row | survivors.get(row["of_id"], {}) for row in dropped]
    write_json(folder / "samples.json", {"kept": kept, "dropped": dropped})


def shard_rows(folder: Path, shards: int) -> list[dict[str, Any]]:
    """Rows of the manifest, after writing empty shards where the hash left none."""
    documents = {row["name"]: row["documents"] for row in _part(folder, "shards.jsonl")}
    groups = {tuple(name.split("-")[:2]) for name in documents}
    rows = []
    for split, source in sorted(groups):
        count = shards if split == "train" else 1
        for shard in range(count):
            name = writers.shard_name(split, source, shard, count)
            if name not in documents:
                writers.write_array_record(folder / name, [], writers.DOCUMENTS_OPTIONS)
            rows.append({"name": name, "split": split, "source": source,
                         "documents": documents.get(name, 0),
                         "digest": writers.file_digest(folder / name)})  # fmt: skip
    return rows
