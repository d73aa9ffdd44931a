"""Rows of a benchmark's files, each with the place it came from.

JSONL, JSON, CSV, TSV, parquet and notebooks; UTF-8, with or without a byte order mark. What is
wrong is told with file and line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from internlm2_jax.errors import UserError

csv.field_size_limit(2**27)
_SHARD = re.compile(r"\d+-of-\d+")
_BLANKS, _DECODER = re.compile(r"\s*"), json.JSONDecoder()


class Row(NamedTuple):
    """`where`: file and line, as in "test.jsonl:3". `group`: what the glob's first star was."""

    where: str
    group: str
    value: Any


def read(
    folder: Path, pattern: str, *, columns: Sequence[str] = (), records: str = ""
) -> list[Row]:
    """All rows of the files that match, in the order of their names.

    Args:
      columns: names of the columns of a table without a head.
      records: key under which a JSON file keeps its list.
    """
    rows: list[Row] = []
    for path in found(folder, pattern):
        group = _group(path.relative_to(folder).as_posix(), pattern)
        reader = _READERS[path.suffix.lower()]
        rows += [Row(where, group, value) for where, value in reader(path, columns, records)]
    return rows


def found(folder: Path, pattern: str) -> list[Path]:
    """Files of a kind that can be read, sorted by name."""
    return sorted(p for p in folder.glob(pattern) if p.is_file() and p.suffix.lower() in _READERS)


def _group(name: str, pattern: str) -> str:
    """The part of a file's name that the first star of the pattern stands for, "" for a shard's
    number."""
    parts = [re.escape(part) for part in re.split(r"\*+/?", pattern)]
    match = re.fullmatch("(.*?)".join(parts), name) if len(parts) > 1 else None
    group = match.group(1).strip("/") if match else ""
    return "" if _SHARD.fullmatch(group) else group


def text_of(path: Path) -> str:
    """Errors: UserError that names the line where a file stops being UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line} is not UTF-8 (byte 0x{data[error.start]:02x}); convert the file, as "
            "with iconv -f GB18030 -t UTF-8"
        ) from error


# ------------------------------------------------------------------------------ kinds of files


def _jsonl(path: Path, columns: Sequence[str], records: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, path, number)


def _json(path: Path, columns: Sequence[str], records: str) -> Iterator[tuple[str, Any]]:
    text = text_of(path)
    value, at = _parsed(text, path), _after_blanks(text, 0)
    for key in records.split(".") if records else ():
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"{path} has no {key!r}, under which its records should be")
        value, at = value[key], dict(_parts(text, at))[key]
    if not isinstance(value, (list, dict)):
        raise UserError(f"{path} is {type(value).__name__}; expected a list of records")
    line, counted = 1, 0
    for key, start in _parts(text, at):
        line, counted = line + text.count("\n", counted, start), start
        record = value[key]
        if isinstance(key, str) and isinstance(record, dict):  # T-Eval: records by name
            record = {"id": key, **record}
        yield f"{path}:{line}", record


def _parts(text: str, at: int) -> Iterator[tuple[Any, int]]:
    """Key, or number, and place of each part of the JSON list or object that begins at `at`.

    text: valid JSON.
    """
    keyed, number = text[at] == "{", 0
    at = _after_blanks(text, at + 1)
    while text[at] not in "]}":
        key: Any = number
        if keyed:
            key, at = _DECODER.raw_decode(text, at)
            at = _after_blanks(text, _after_blanks(text, at) + 1)  # the colon
        yield key, at
        _, at = _DECODER.raw_decode(text, at)
        at = _after_blanks(text, at)
        if text[at] == ",":
            at = _after_blanks(text, at + 1)
        number += 1


def _after_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    assert match is not None  # it matches nothing too
    return match.end()


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """line: of the file, on which the text begins."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line} is not valid JSON ({error})") from error


def _table(delimiter: str) -> Callable[..., Iterator[tuple[str, Any]]]:
    def read(path: Path, columns: Sequence[str], records: str) -> Iterator[tuple[str, Any]]:
        reader = csv.reader(io.StringIO(text_of(path), newline=""), delimiter=delimiter)
        names, before = list(columns), 0
        for cells in reader:
            where, before = f"{path}:{before + 1}", reader.line_num
            if not any(cells):
                continue
            if not names:
                names = cells
                continue
            if len(cells) != len(names):
                raise UserError(f"{where} has {len(cells)} columns; expected {len(names)}")
            yield where, dict(zip(names, cells, strict=True))

    return read


def _parquet(path: Path, columns: Sequence[str], records: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from error
    for number, value in enumerate(values, 1):
        yield f"{path}, row {number}", value


def _notebook(path: Path, columns: Sequence[str], records: str) -> Iterator[tuple[str, Any]]:
    yield str(path), {"id": path.stem, **_parsed(text_of(path), path)}


_READERS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".ipynb": _notebook,
}
