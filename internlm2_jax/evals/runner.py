"""Runs a suite on a model: items in, a line of results an item, totals at the end.

Every finished item is a line of `items.jsonl` at once. A killed evaluation goes on with the items
that have no line and ends in the same totals.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.evals import rows, totals
from internlm2_jax.evals.asking import Asking
from internlm2_jax.evals.formats import FORMATS
from internlm2_jax.evals.items import Item, Loaded
from internlm2_jax.evals.items import load as load_items
from internlm2_jax.evals.subject import Subject
from internlm2_jax.evals.suites import Data, Suite
from internlm2_jax.progress import Progress

ITEMS, TOTALS, SETTINGS = "items.jsonl", "totals.json", "settings.json"


def load(
    suite: Suite, folder: Path | None, tokenizer: Any = None, limit: int | None = None
) -> Loaded:
    """Reads a suite's items. Errors: UserError for files that are not there or are bad.

    limit: so many items, evenly spread over all.
    """
    if suite.format == "ruler":
        from internlm2_jax.evals import ruler

        items, pool = ruler.items(suite.options, tokenizer, folder), []
    else:
        if folder is None:
            raise UserError(f"suite {suite.name} reads files: give its folder with --data")
        data = layout(suite, folder)
        items = _of(suite, folder, data, data.files, data.only)
        pool = _of(suite, folder, data, data.shots, data.shots_only) if suite.shots else []
    if not items:
        raise UserError(f"suite {suite.name} has no item in {folder}")
    if limit is not None and limit < len(items):
        items = [items[i * len(items) // limit] for i in range(limit)]
    by_group: dict[str, list[Item]] = {}
    for item in pool:
        by_group.setdefault(item.group, []).append(item)
    everything = [dataclasses.astuple(dataclasses.replace(i, where="")) for i in (*items, *pool)]
    return Loaded(items, by_group, files.fingerprint(everything))


def layout(suite: Suite, folder: Path) -> Data:
    """The suite's layout that the folder has."""
    for data in suite.data:
        if rows.found(folder, data.files):
            if suite.shots and not data.shots:
                raise UserError(
                    f"suite {suite.name}: {data.files} has no files for examples; use --shots 0"
                )
            if suite.shots and not rows.found(folder, data.shots):
                raise UserError(
                    f"suite {suite.name}: {suite.shots} examples are asked for and there is no "
                    f"{folder / data.shots}; use --shots 0"
                )
            return data
    wanted = " nor ".join(str(folder / data.files) for data in suite.data)
    raise UserError(f"suite {suite.name}: there is no {wanted}; check --data")


def _of(
    suite: Suite, folder: Path, data: Data, pattern: str, only: Mapping[str, Any]
) -> list[Item]:
    return load_items(
        folder, pattern, FORMATS[suite.format],
        fields=data.fields, columns=data.columns, records=data.records, only=only,
    )  # fmt: skip


# ------------------------------------------------------------------------------ one evaluation


def evaluate(
    subject: Subject,
    suite: Suite,
    loaded: Loaded,
    out: Path,
    *,
    seed: int = 0,
    shot_seed: int | None = None,
    name: str = "",
    redo: bool = False,
    silent: bool = False,
) -> dict[str, Any]:
    """Measures `subject` into the folder `out` and gives the totals (totals.py).

    name: of the model, in the totals.
    Errors: UserError when `out` holds an evaluation with other settings, weights or data.
    """
    settings = {
        "suite": dataclasses.asdict(suite), "seed": seed, "shot_seed": shot_seed,
        "data": loaded.fingerprint, "model": fingerprint(subject), "max_length": subject.max_length,
        "items": len(loaded.items),
    }  # fmt: skip
    _claim(out, settings, redo)
    asked = {item.id: item for item in loaded.items}
    done = {r["id"]: r for r in _kept(out / ITEMS) if r["id"] in asked}
    left = [item for item in loaded.items if item.id not in done]
    if left:
        asking = Asking(subject, suite, loaded, seed, shot_seed)
        with (
            Progress(suite.name, len(asked), "item", len(done), silent) as progress,
            files.explain_disk_errors(out / ITEMS),
            open(out / ITEMS, "ab") as lines,
        ):
            for result in asking.results(left):
                lines.write(files.json_bytes(result) + b"\n")
                lines.flush()
                done[result["id"]] = result
                progress.update(1)
    ordered = [done[item.id] for item in loaded.items]
    files.write_jsonl(out / ITEMS, ordered)
    found = totals.totals(suite, ordered, model=name, settings=settings)
    files.write_json(out / TOTALS, found)
    return found


def _claim(out: Path, settings: dict[str, Any], redo: bool) -> None:
    """Makes the folder this evaluation's, or finds that it is."""
    plain = json.loads(files.json_bytes(settings))
    if (out / SETTINGS).exists() and not redo:
        old = files.read_json(out / SETTINGS)
        if old != plain:
            differ = [k for k in plain if old.get(k) != plain[k]]
            if differ == ["suite"]:
                differ = [k for k in plain["suite"] if old["suite"].get(k) != plain["suite"][k]]
            raise UserError(
                f"{out} has results with another {', '.join(differ)}; give another --out, or --redo"
            )
        return
    for name in (ITEMS, TOTALS):
        (out / name).unlink(missing_ok=True)
    files.write_json(out / SETTINGS, plain)


def _kept(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file whose last one may be cut; what is cut is taken away."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        files.atomic_write(path, whole)
    return [files.parse_json(line, f"{path}:{n}") for n, line in enumerate(whole.splitlines(), 1)]


def fingerprint(subject: Subject) -> str:
    """Of the weights, by 4096 numbers of each array; of the shape; of the tokenizer."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(subject.params):
        flat = leaf.reshape(-1)
        some = np.asarray(flat[:: max(1, flat.size // 4096)], np.float32)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + some.tobytes())
    digest.update(f"{subject.model.cfg} {subject.tokenizer.sha256}".encode())
    return digest.hexdigest()
