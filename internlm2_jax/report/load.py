"""Reads a run folder for the report: what is absent is empty, what is damaged is a UserError.

A run may be half done, killed or made by an older version, so a missing file, stage or key is never
an error: readers return None or an empty collection, and the page says "not run yet". A file that
is there but is not JSON, or holds text where a number belongs, is an error that names the file and
the key: a report must not quietly show half of a damaged run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internlm2_jax import files
from internlm2_jax.errors import UserError

ABSENT, UNFINISHED, DONE = "not run yet", "unfinished", "done"


@dataclass(frozen=True)
class Record:
    """A JSON object that remembers where it came from. Empty when its file or key is absent.

    `source` is the file relative to the run folder, as the page prints it.
    """

    value: Mapping[str, Any]
    source: str
    where: str = ""

    def __bool__(self) -> bool:
        return bool(self.value)

    def _wrong(self, key: str, wanted: str) -> UserError:
        found = type(self.value[key]).__name__
        return UserError(
            f"{self.source}: {self.where}{key} is a {found} where {wanted} belongs; "
            "the file is damaged: delete its stage folder and run that stage again"
        )

    def number(self, key: str) -> float | None:
        """The number under `key`; None when absent or null (JSON's form of a NaN)."""
        value = self.value.get(key)
        if value is None:
            return None
        if not isinstance(value, (int, float)):
            raise self._wrong(key, "a number")
        return float(value)

    def text(self, key: str) -> str:
        """The text under `key`, numbers included; "" when absent."""
        value = self.value.get(key)
        if value is None:
            return ""
        if isinstance(value, (dict, list)):
            raise self._wrong(key, "text")
        return str(value)

    def record(self, key: str) -> Record:
        """The object under `key`."""
        value = self.value.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Record(value, self.source, f"{self.where}{key}.")

    def items(self) -> Iterator[tuple[str, Record]]:
        """(key, object) pairs of an object of objects, in the file's order."""
        return ((key, self.record(key)) for key in self.value)

    def records(self, key: str) -> list[Record]:
        """The objects in the list under `key`; one object alone counts as a list of one."""
        value = self.value.get(key)
        if value is None:
            return []
        if isinstance(value, dict):
            return [self.record(key)]
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(key, "a list of objects")
        names = (f"{self.where}{key}[{i}]." for i in range(len(value)))
        return [Record(item, self.source, name) for item, name in zip(value, names, strict=True)]

    def numbers(self, key: str) -> dict[str, float]:
        """Name -> number under `key`, nulls left out. A number alone counts as {"all": number}."""
        value = self.value.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"all": float(value)}
        inner = self.record(key)
        pairs = ((name, inner.number(name)) for name in inner.value)
        return {name: number for name, number in pairs if number is not None}

    def texts(self, key: str) -> dict[str, str]:
        """Name -> text under `key`."""
        inner = self.record(key)
        return {name: inner.text(name) for name in inner.value}

    def strings(self, key: str) -> list[str]:
        """The list of texts under `key`."""
        return [str(item) for item in self._list(key)]

    def array(self, key: str) -> np.ndarray:
        """The list of numbers under `key`, of any depth, as float64; nulls become NaN."""
        try:
            return np.array(self._list(key), dtype=np.float64)
        except (TypeError, ValueError):
            raise self._wrong(key, "a list of numbers, rows of one length,") from None

    def _list(self, key: str) -> list[Any]:
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        return value


@dataclass(frozen=True)
class Series:
    """Numbers over steps: `x` and `y` are float64 of one length, in the file's order."""

    x: np.ndarray
    y: np.ndarray

    def __bool__(self) -> bool:
        return len(self.y) > 0

    def smooth(self, window: int) -> Series:
        """Mean over up to `window` neighbouring points, fewer at the two ends."""
        if not self:
            return self
        window = max(min(window, len(self.y)), 1)
        weight = np.convolve(np.ones(len(self.y)), np.ones(window), mode="same")
        return Series(self.x, np.convolve(self.y, np.ones(window), mode="same") / weight)


class Run:
    """The files of one run folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a run folder; give the --run-dir of a run")

    @property
    def name(self) -> str:
        return self.record("pipeline.json").text("name") or self.folder.resolve().name

    def stages(self) -> list[str]:
        """Stage names in the order in which they run; without a list, the folders there are."""
        listed = self.record("pipeline.json").strings("stages")
        return listed or sorted(path.name for path in self.folder.iterdir() if path.is_dir())

    def status(self, stage: str) -> str:
        """ABSENT, UNFINISHED (a folder without done.json) or DONE."""
        if (self.folder / stage / "done.json").is_file():
            return DONE
        return UNFINISHED if (self.folder / stage).is_dir() else ABSENT

    def text(self, path: str) -> str:
        """A text file; "" when absent."""
        try:
            return (self.folder / path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except UnicodeDecodeError as error:
            raise UserError(f"{path} in {self.folder} is not text ({error}); delete it") from error

    def json(self, path: str) -> Any:
        """Any JSON file; None when absent."""
        if not (self.folder / path).is_file():
            return None
        return files.read_json(self.folder / path)

    def record(self, path: str) -> Record:
        """A JSON file that holds an object."""
        value = self.json(path)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.folder / path} holds no JSON object; delete it and run again")
        return Record(value or {}, path)

    def result(self, stage: str) -> Record:
        return self.record(f"{stage}/result.json")

    def rows(self, path: str) -> list[Record]:
        """A JSONL file of objects."""
        if not (self.folder / path).is_file():
            return []
        rows = files.read_jsonl(self.folder / path)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise UserError(f"{self.folder / path}:{number}: no JSON object; delete the line")
        return [Record(row, path, f"row {i}: ") for i, row in enumerate(rows, start=1)]

    def metrics(self, stage: str) -> list[Record]:
        return self.rows(f"{stage}/metrics.jsonl")


def series(rows: list[Record], key: str, **where: Any) -> Series:
    """`key` over "step" in the rows whose other keys equal `where`; rows without either left out.

    A step logged twice (a run killed and continued) keeps its last value.
    """
    points: dict[float, float] = {}
    for row in rows:
        if all(row.value.get(name) == value for name, value in where.items()):
            x, y = row.number("step"), row.number(key)
            if x is not None and y is not None:
                points[x] = y
    ordered = sorted(points.items())
    return Series(np.array([x for x, _ in ordered]), np.array([y for _, y in ordered]))
