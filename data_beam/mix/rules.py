"""Rules: a named limit on one column of one attribute. The first rule that is broken, in the order
of the list, is the reason why a document is dropped; the order of the stages is the report's
(section 3.1.1): clean, de-duplicate, make safe, select for quality.

Rules are data. A preset is a YAML file below `presets/`; a user's file has the same form:

    text:                       # documents of this source; `default` stands for every other one
      - {stage: filter, reason: too_short, signal: signals.num_chars, minimum: 200}
      - {stage: language, reason: other_language, signal: language.lang, allowed: [en, zh]}
      - {stage: near_dedup, reason: near_duplicate, signal: duplicates.similarity,
         of: duplicates.near_of}
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from internlm2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """Drops a document for `reason` when the value of `signal` ("attribute.column") lies outside
    [minimum, maximum], or is not among `allowed`, or when the column `of` names another document,
    of which this one is a copy. NaN and null pass. `lang` limits the rule to these languages,
    `where` ("attribute.column=value") to documents with that value."""

    stage: str
    reason: str
    signal: str
    minimum: float = -math.inf
    maximum: float = math.inf
    allowed: tuple[str, ...] | None = None
    of: str | None = None
    lang: tuple[str, ...] | None = None
    where: str | None = None

    def __post_init__(self):
        if self.where is not None and "=" not in self.where:
            raise UserError(
                f"rule {self.reason}: where {self.where!r} is not of the form column=value"
            )
        for column in self.columns:
            if column.count(".") != 1:
                raise UserError(
                    f"rule {self.reason}: {column!r} is not of the form attribute.column"
                )
        if self.minimum > self.maximum:
            raise UserError(
                f"rule {self.reason}: minimum {self.minimum} is above maximum {self.maximum}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        where = self.where and self.where.partition("=")[0]
        return tuple(column for column in (self.signal, self.of, where) if column)


Rules = Mapping[str, Sequence[Rule]]
EXACT = Rule("exact_dedup", "exact_duplicate", "duplicates.similarity", of="duplicates.exact_of")
NEAR = Rule("near_dedup", "near_duplicate", "duplicates.similarity", of="duplicates.near_of")


def presets() -> list[str]:
    folder = importlib.resources.files("data_beam.mix") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load(name: str | Path) -> dict[str, tuple[Rule, ...]]:
    """The rules of a preset or of a YAML file. Anything unknown in it is a UserError."""
    text: str
    if str(name) in presets():
        folder = importlib.resources.files("data_beam.mix") / "presets"
        text = (folder / f"{name}.yaml").read_text("utf-8")
    else:
        try:
            text = Path(name).read_text("utf-8")
        except OSError as error:
            known = ", ".join(presets())
            raise UserError(f"no rules {name}: neither a file nor a preset ({known})") from error
    return parse(text, str(name))


def parse(text: str, where: str) -> dict[str, tuple[Rule, ...]]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where}: rules are a mapping from source to a list of rules")
    return {str(source): tuple(_rules(rows, f"{where}: {source}")) for source, rows in tree.items()}


def _rules(rows: Any, where: str) -> list[Rule]:
    if not isinstance(rows, list):
        raise UserError(f"{where} is not a list of rules")
    known = {field.name for field in dataclasses.fields(Rule)}
    rules = []
    for number, row in enumerate(rows, 1):
        place = f"{where}, rule {number}"
        if not isinstance(row, dict) or not {"stage", "reason", "signal"} <= set(row):
            raise UserError(f"{place} needs stage, reason and signal")
        if unknown := sorted(set(row) - known):
            raise UserError(f"{place}: unknown {unknown[0]!r}; known: {', '.join(sorted(known))}")
        for name in ("minimum", "maximum"):
            if not isinstance(row.get(name, 0), (int, float)):
                raise UserError(f"{place}: {name} {row[name]!r} is not a number")
        lists = {name: tuple(map(str, row[name])) for name in ("allowed", "lang") if row.get(name)}
        rules.append(Rule(**{**row, **lists}))
    return rules


def rules_for(source: str, rules: Rules) -> Sequence[Rule]:
    """The rules of a source, else the default ones, else none."""
    return rules.get(source, rules.get("default", ()))


def merged(orders: Iterable[Sequence[str]]) -> list[str]:
    """One order for names that each come in the order of some of the lists: "filter" before
    "dedup" although the first list has no filter. Where two lists contradict, the first counts."""
    rest = [list(dict.fromkeys(order)) for order in orders]
    found: list[str] = []
    while rest := [order for order in rest if order]:
        heads = [order[0] for order in rest]
        free = [name for name in heads if not any(name in order[1:] for order in rest)]
        found.append((free or heads)[0])
        rest = [[name for name in order if name != found[-1]] for order in rest]
    return found


def attributes_of(rules: Rules) -> list[str]:
    """The attributes that the rules read."""
    return sorted({c.partition(".")[0] for some in rules.values() for r in some for c in r.columns})


def columns_of(rules: Rules) -> dict[str, list[str]]:
    """The columns that the rules read, by attribute."""
    wanted: dict[str, set[str]] = {}
    for some in rules.values():
        for rule in some:
            for column in rule.columns:
                attribute, _, name = column.partition(".")
                wanted.setdefault(attribute, set()).add(name)
    return {attribute: sorted(names) for attribute, names in sorted(wanted.items())}


def to_json(rules: Rules) -> dict[str, list[dict[str, Any]]]:
    """A form for manifests: fields at their defaults are left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(Rule)}
    return {
        source: [
            {name: value for name, value in vars(rule).items() if value != defaults[name]}
            for rule in some
        ]
        for source, some in sorted(rules.items())
    }


def from_json(row: Mapping[str, Any]) -> Rule:
    """A rule from its form in a manifest."""
    lists = {name: tuple(row[name]) for name in ("allowed", "lang") if row.get(name) is not None}
    return Rule(**{**row, **lists})


def broken(rule: Rule, column: Mapping[str, pa.ChunkedArray]) -> np.ndarray:
    """[documents] bool: who breaks the rule. `column` gives the rule's columns by name."""
    outside = _outside(rule, column)
    if rule.where is not None:
        name, _, value = rule.where.partition("=")
        outside &= np.array(column[name].to_pylist(), object) == value
    return outside


def _outside(rule: Rule, column: Mapping[str, pa.ChunkedArray]) -> np.ndarray:
    values = column[rule.signal]
    if rule.of is not None:
        return column[rule.of].is_valid().to_numpy()
    if rule.allowed is not None:
        return values.is_valid().to_numpy() & ~among(values, rule.allowed)
    numbers = numeric(values)
    # The float32 of 0.3 lies above 0.3: a value at the limit is compared in its own precision.
    kind = np.float32 if pa.types.is_float32(values.type) else np.float64
    with np.errstate(invalid="ignore"):
        return (numbers < kind(rule.minimum)) | (numbers > kind(rule.maximum))


def among(values: pa.ChunkedArray, tags: Sequence[str]) -> np.ndarray:
    """[documents] bool: whose value is one of `tags`, or a variety of it ("zh-Hant" of "zh")."""
    known = values.unique().to_pylist()
    wanted = [v for v in known if v is not None and (v in tags or v.partition("-")[0] in tags)]
    return pc.is_in(values, value_set=pa.array(wanted, pa.string())).to_numpy()


def numeric(values: pa.ChunkedArray) -> np.ndarray:
    """[documents] float64; null becomes NaN. Text has no numeric form: all NaN."""
    if pa.types.is_string(values.type) or pa.types.is_binary(values.type):
        return np.full(len(values), np.nan)
    return values.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
