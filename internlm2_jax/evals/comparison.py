"""Evaluations of several models put side by side: what each scored, and where they differ."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.evals import statistics
from internlm2_jax.evals.runner import ITEMS, TOTALS

ALIKE = ("shots", "method", "measure")


@dataclasses.dataclass(frozen=True)
class Result:
    """One model on one suite. `lines` by item id."""

    model: str
    folder: Path
    totals: dict[str, Any]
    lines: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Compared:
    """All models on one suite.

    pairs: (a, b, statistics.Paired) of models that saw the same items.
    differ: ids of items on which scores differ, the largest difference first.
    warnings: what makes numbers not comparable.
    """

    suite: str
    dimension: str
    results: list[Result]
    pairs: list[tuple[str, str, statistics.Paired]]
    differ: list[str]
    warnings: list[str]


def find(folders: Sequence[Path]) -> list[Compared]:
    """Every suite that any of the folders has been measured on, in the order of dimensions.

    A folder is a run, a stage, or what `--out` named; all that lies in it counts. Errors: UserError
    for a folder without finished evaluations, or two of one model on one suite.
    """
    results: list[Result] = []
    names = _names(folders)
    for folder in folders:
        found = sorted(folder.glob(f"**/{TOTALS}")) if folder.is_dir() else []
        if not found:
            raise UserError(
                f"{folder} has no finished evaluation; run internlm2 evaluate on it first"
            )
        results += [_read(path, folder, names[folder]) for path in found]
    seen: dict[tuple[str, str], Path] = {}
    for result in results:
        key = (result.totals["suite"], result.model)
        if seen.setdefault(key, result.folder) != result.folder:
            raise UserError(
                f"{result.folder} and {seen[key]} are both {key[1]} on {key[0]}; give one of them"
            )
    from internlm2_jax.evals.suites import DIMENSIONS

    names = {r.totals["suite"]: r.totals["dimension"] for r in results}
    return [
        compare([r for r in results if r.totals["suite"] == name])
        for name in sorted(names, key=lambda n: (DIMENSIONS.index(names[n]), n))
    ]


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """The last parts of each path, as many as tell all apart."""
    paths = {folder: folder.resolve().parts for folder in folders}
    for count in range(1, max(map(len, paths.values()), default=0) + 1):
        names = {folder: "/".join(parts[-count:]) for folder, parts in paths.items()}
        if len(set(names.values())) == len(names):
            return names
    raise UserError("the same folder is given twice; give each once")


def _read(path: Path, given: Path, name: str) -> Result:
    """The model's name: the given folder's and the stage's in it."""
    stage = path.parent.parent
    stage = stage.parent if stage.name == "evaluations" else stage
    inner = stage.relative_to(given) if stage.is_relative_to(given) else Path()
    name = "/".join((name, *inner.parts))
    lines = {line["id"]: line for line in files.read_jsonl(path.parent / ITEMS)}
    return Result(name, path.parent, files.read_json(path), lines)


def compare(results: list[Result]) -> Compared:
    """One suite's results side by side."""
    first = results[0].totals
    warnings = []
    for field in ALIKE:
        values = {str(r.totals[field]) for r in results}
        if len(values) > 1:
            warnings.append(f"{field} differ: " + ", ".join(
                f"{r.model} {r.totals[field]}" for r in results))  # fmt: skip
    pairs = []
    for a, b in itertools.combinations(results, 2):
        if a.totals["settings"]["data"] != b.totals["settings"]["data"]:
            warnings.append(f"{a.model} and {b.model} saw other items; they are not tested")
            continue
        scores = [
            (line["score"], b.lines[key]["score"])
            for key, line in a.lines.items()
            if line["score"] is not None and b.lines[key]["score"] is not None
        ]
        if scores:
            left, right = zip(*scores, strict=True)
            pairs.append((a.model, b.model, statistics.paired(left, right)))
    return Compared(
        first["suite"], first["dimension"], results, pairs, _differing(results), warnings
    )


def _differing(results: Sequence[Result]) -> list[str]:
    spread: dict[str, float] = {}
    for key in results[0].lines:
        scores = [r.lines[key]["score"] for r in results if key in r.lines]
        known = [s for s in scores if s is not None]
        if len(known) > 1 and max(known) > min(known):
            spread[key] = max(known) - min(known)
    return sorted(spread, key=lambda key: -spread[key])


def plain(compared: Sequence[Compared]) -> dict[str, Any]:
    """The same as JSON, for machines: suites by name, models by name."""
    models = dict.fromkeys(r.model for c in compared for r in c.results)
    return {
        "models": list(models),
        "suites": {
            c.suite: {
                "dimension": c.dimension,
                "results": {
                    r.model: {k: v for k, v in r.totals.items() if k != "settings"}
                    | {"folder": str(r.folder)}
                    for r in c.results
                },
                "paired": [{"a": a, "b": b, **dataclasses.asdict(test)} for a, b, test in c.pairs],
                "differ": c.differ,
                "warnings": c.warnings,
            }
            for c in compared
        },
    }
