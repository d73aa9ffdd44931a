"""Evaluation sets as (question, answer) examples, from the files in which they are published.

A set is given as `NAME=PATH[:field,field]`: PATH is a JSONL, JSON, CSV, TSV or Parquet file
(also .gz, .zst), or a folder of such files. Without fields, the first of `QUESTIONS` that a row has
is its question, and all of `ANSWERS` that it has are answers; of fields given, those in `ANSWERS`
are answers. A CSV without a header whose last column is a letter is a multiple-choice set (MMLU's
layout).
"""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_beam.io import storage
from internlm2_jax.errors import UserError
from internlm2_jax.files import parse_json

QUESTIONS = (
    "question", "problem", "prompt", "text", "input", "instruction", "query", "turns", "goal",
    "context", "passage",
)  # fmt: skip
ANSWERS = (
    "answer", "solution", "canonical_solution", "best answer", "answerkey", "final_answer", "code",
    "target", "output", "response",
)  # fmt: skip
_CHOICES = ("choices", "options")
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_LETTERS = "ABCDEFGHIJ"


class Example(NamedTuple):
    """`id` is "NAME#row", or "NAME/file#row" in a folder, rows counted from 0. `questions` and
    `answers` are texts that count on their own (the turns of a dialogue, the solution and the
    bare answer)."""

    id: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


class EvaluationSet(NamedTuple):
    """`unusable` counts the rows without a question."""

    name: str
    examples: list[Example]
    unusable: int


class SetSpec(NamedTuple):
    name: str
    path: str
    fields: tuple[str, ...]


def parse(text: str) -> SetSpec:
    """Reads `NAME=PATH[:field,field]`."""
    name, equals, path = text.partition("=")
    if not (equals and path and re.fullmatch(r"[\w.-]+", name)):
        raise UserError(
            f"evaluation set {text!r} is not NAME=PATH[:field,field]; write gsm8k=data/test.jsonl"
        )
    head, colon, fields = path.rpartition(":")
    if not colon or "/" in fields or (not storage.is_remote(path) and storage.exists(path)):
        return SetSpec(name, path, ())
    names = tuple(field.strip() for field in fields.split(","))
    if not all(names):
        raise UserError(f"evaluation set {text!r} has an empty field name; write PATH:field,field")
    return SetSpec(name, head, names)


def read(spec: SetSpec) -> EvaluationSet:
    """All examples of a set, in the order of the files' names and rows. A set without a usable
    example, or a damaged file, is a UserError."""
    infos = [info for info in storage.list_files(spec.path) if _suffix(info.path)]
    if not infos:
        raise UserError(
            f"evaluation set {spec.name}: {spec.path} is no {', '.join(_SUFFIXES)} file and no "
            "folder of them; check the path"
        )
    root = spec.path.rstrip("/") + "/"
    examples: list[Example] = []
    unusable = 0
    names: set[str] = set()
    for info in infos:
        place = f"{spec.name}/{info.path[len(root) :]}" if info.path.startswith(root) else spec.name
        for number, row in enumerate(_rows(info.path)):
            lowered = {str(name).lower(): value for name, value in row.items()}
            names |= lowered.keys()
            questions, answers = _texts(lowered, spec.fields)
            if questions:
                examples.append(Example(f"{place}#{number}", questions, answers))
            else:
                unusable += 1
    if missing := [field for field in spec.fields if field.lower() not in names]:
        raise UserError(
            f"evaluation set {spec.name}: no row of {spec.path} has a field {missing[0]!r}; they "
            f"have {', '.join(sorted(names))}"
        )
    if not examples:
        raise UserError(
            f"evaluation set {spec.name}: no row of {spec.path} has a text in "
            f"{', '.join(spec.fields or QUESTIONS)}; name the fields: {spec.name}=PATH:field,field"
        )
    return EvaluationSet(spec.name, examples, unusable)


def _suffix(path: str) -> str:
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")


def _rows(path: str) -> Iterable[dict[str, Any]]:
    try:
        with storage.open_read(path) as handle:
            data = handle.read()
        if path.endswith(".gz"):
            data = gzip.decompress(data)
        elif path.endswith(".zst"):
            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
        suffix = _suffix(path)
        if suffix == ".parquet":
            return pq.read_table(io.BytesIO(data)).to_pylist()
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zstandard.ZstdError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"evaluation file {path} cannot be read ({reason}); copy it again"
        ) from error
    if suffix in (".csv", ".tsv"):
        return _table(
            list(csv.reader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ","))
        )
    if suffix == ".json":
        return _objects(parse_json(text.encode(), path), path)
    lines = text.split("\n")
    rows = [parse_json(x.encode(), f"{path}:{i}") for i, x in enumerate(lines, 1) if x.strip()]
    return _objects(rows, path)


def _objects(value: Any, path: str) -> list[dict[str, Any]]:
    """The rows of a JSON value: a list of objects, or the first such list inside an object."""
    lists = [value] if isinstance(value, list) else []
    lists += [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    for rows in lists:
        if rows and all(isinstance(row, dict) for row in rows):
            return rows
    raise UserError(f"evaluation file {path} holds no list of JSON objects; give one object a row")


def _table(rows: list[list[str]]) -> list[dict[str, Any]]:
    rows = [row for row in rows if row]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    letters = {row[-1].strip() for row in rows}
    if letters <= set(_LETTERS) and not set(header) & set(QUESTIONS):
        return [{"question": r[0], "choices": r[1:-1], "answer": r[-1].strip()} for r in rows]
    return [dict(zip(header, row, strict=False)) for row in rows[1:]]


def _texts(row: dict[str, Any], fields: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(questions, answers) of a row whose names are in small letters."""
    wanted = [field.lower() for field in fields]
    if wanted:
        asked = [field for field in wanted if field not in ANSWERS]
        answered = [field for field in wanted if field in ANSWERS]
    else:
        asked = [field for field in QUESTIONS if _strings(row.get(field))][:1]
        answered = [field for field in ANSWERS if field in row]
    choices: Sequence[str] = ()
    for field in _CHOICES:
        value = row.get(field)
        choices = _strings(value.get("text") if isinstance(value, dict) else value) or choices
    answers = [
        _chosen(answer, choices) for field in answered for answer in _strings(row.get(field))
    ]
    questions = [text for field in asked for text in _strings(row.get(field))]
    return tuple(questions), tuple(dict.fromkeys(answers))


def _chosen(answer: str, choices: Sequence[str]) -> str:
    """The text of a choice for its letter or (from 0) number; any other answer as it is."""
    index = _LETTERS.find(answer) if len(answer) == 1 else -1
    if index < 0 and re.fullmatch(r"\d", answer):
        index = int(answer)
    return choices[index] if 0 <= index < len(choices) else answer


def _strings(value: Any) -> list[str]:
    """The texts in a value: itself, a number's digits, or those of a list."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _strings(item)]
    if isinstance(value, dict):  # a turn of a dialogue
        return _strings(value.get("content"))
    return []
