"""What a reader makes of a data set's rows, and how bad rows are told.

A reader (formats.py) takes a row's fields and gives one or more items. What is wrong with a row is
a BadRow; `load` collects them and tells them with file and line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm2_jax.errors import UserError
from internlm2_jax.evals import rows
from internlm2_jax.evals.rows import Row


class BadRow(Exception):
    """What is wrong with a row, without its place."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A question.

    id: of its own in its suite. where: file and line. group: subject or task.
    fields: texts that templates may name. answers: all right ones; the first stands in examples.
    choices, right: texts, and the indices of the right ones. check: what the measure needs.
    messages: a conversation that stands in place of the prompt.
    """

    id: str
    where: str
    group: str = ""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    check: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Items of a suite, those that examples are taken from by group, and a hash of all."""

    items: list[Item]
    pool: dict[str, list[Item]]
    fingerprint: str


class Fields:
    """A row's fields under the names that the format gives them; those of a list have numbers."""

    def __init__(self, row: Row, names: Mapping[str, Any]) -> None:
        if isinstance(row.value, list):
            row = row._replace(value={str(n): value for n, value in enumerate(row.value)})
        self.row, self._names = row, names
        if not isinstance(row.value, Mapping):
            raise BadRow(f"is {type(row.value).__name__}; expected an object with fields")

    def get(self, name: str, default: Any = None) -> Any:
        key = self._names.get(name, name)
        if isinstance(key, (list, tuple)):
            return [self._one(part, name) for part in key]
        return self._at(key, default)

    def need(self, name: str, kind: type | tuple[type, ...] = object) -> Any:
        key = self._names.get(name, name)
        value = self.get(name)
        if value is None:
            raise BadRow(f"has no {key!r}")
        if not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(k.__name__ for k in kinds)
            raise BadRow(f"has {key!r} of type {type(value).__name__}; expected {expected}")
        return value

    def text(self, name: str) -> str:
        value = self.need(name, str)
        if not value.strip():
            raise BadRow(f"has an empty {self._names.get(name, name)!r}")
        return value

    def optional(self, name: str) -> str:
        """A text, "" where there is none."""
        return "" if self.get(name) is None else str(self.need(name, str))

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        values: list[str] = self.need(name, list)
        if bad := [value for value in values if not isinstance(value, str)]:
            key = self._names.get(name, name)
            raise BadRow(f"has {key!r} with {bad[0]!r:.60} in it; expected texts")
        return values

    def item(self, suffix: str = "", **parts: Any) -> Item:
        """An item with the row's place, group and id; without an id the place counts as one."""
        identity, group = self.get("id"), self.optional("group") or self.row.group
        if not isinstance(identity, (str, int, type(None))):
            raise BadRow(f"has an id {identity!r:.60}; expected text or a whole number")
        if identity is None:
            identity = Path(self.row.where).name
        if self.row.group:
            identity = f"{self.row.group}/{identity}"
        return Item(f"{identity}{suffix}", self.row.where, group, **parts)

    def _one(self, key: str, name: str) -> Any:
        value = self._at(key, None)
        if value is None:
            raise BadRow(f"has no {key!r}")
        return value

    def _at(self, key: str | None, default: Any) -> Any:
        value: Any = self.row.value
        if key is None:
            return default
        for part in str(key).split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, Mapping) and part in value:
                value = value[part]
            else:
                return default
        return value


Reader = Callable[[Fields], Iterator[Item]]


def load(
    folder: Path,
    pattern: str,
    reader: Reader,
    *,
    fields: Mapping[str, Any] | None = None,
    columns: Sequence[str] = (),
    records: str = "",
    only: Mapping[str, Any] | None = None,
) -> list[Item]:
    """Items of all files that match. Errors: UserError that names the first bad row, and how many
    there are."""
    items: list[Item] = []
    bad: list[str] = []
    for row in rows.read(folder, pattern, columns=columns, records=records):
        try:
            f = Fields(row, fields or {})
            if all(_between(f, name, limits) for name, limits in (only or {}).items()):
                items += reader(f)
        except BadRow as error:
            bad.append(f"{row.where} {error}")
    seen: dict[str, str] = {}
    for item in items:
        if item.id in seen:
            bad.append(f"{item.where} has id {item.id!r}, as {seen[item.id]} has")
        seen[item.id] = item.where
    if bad:
        more = f" (and {len(bad) - 1} more bad rows)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; mend the file, or name its fields in a suite of your own")
    return items


def _between(f: Fields, name: str, limits: Any) -> bool:
    value = f.need(name)
    if isinstance(value, int) and isinstance(limits, (list, tuple)) and len(limits) == 2:
        return bool(limits[0] <= value <= limits[1])
    return value == limits
