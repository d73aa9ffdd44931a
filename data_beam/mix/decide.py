"""Who is dropped, and why: rules over attribute columns, one worker a shard, no text read.

The result is itself an attribute, "decision": empty for a kept document, else the `Drop`. So a
cut-off changes in seconds, and *which document was removed for which* can always be answered.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data_beam import progress, runners, tables  # runners first: it imports Beam without its noise
from data_beam.mix import rules as rules_module
from data_beam.mix.rules import Rules, rules_for
from data_beam.schema import Drop, hash63
from data_beam.stage import Output, open_documents, read_manifest
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

beam = runners.beam
NAME = "decision"
SCHEMA = pa.schema(
    [("stage", pa.string()), ("reason", pa.string()), ("value", pa.float64()),
     ("of_id", pa.string())]
)  # fmt: skip
_FACTS = ("source", "lang", "num_bytes", "repo")


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Of one shard, in the order of its documents. `rule` is the number of the first broken rule
    of the document's source, -1 for a kept document."""

    ids: list[str]
    repos: list[str]
    sources: np.ndarray  # [documents] of str
    num_bytes: np.ndarray
    rule: np.ndarray
    value: np.ndarray
    of_id: np.ndarray  # [documents] of str, "" when there is none


def judge(output: str | os.PathLike, shard: int, rules: Rules) -> Verdicts:
    """Applies the rules to one shard."""
    columns: dict[str, pa.ChunkedArray] = {}
    wanted = rules_module.columns_of(rules)
    wanted["facts"] = sorted({*wanted.get("facts", ()), *_FACTS, "id"})
    restricted = any(rule.lang for some in rules.values() for rule in some)
    if restricted and _has(output, "language"):
        wanted["language"] = sorted({*wanted.get("language", ()), "lang"})
    for attribute, names in wanted.items():
        table = tables.read_attribute(output, attribute, shard, names)
        columns |= {f"{attribute}.{name}": table[name] for name in names}
    ids = columns["facts.id"].to_pylist()
    sources = np.array(columns["facts.source"].to_pylist(), object)
    languages = columns.get("language.lang", columns["facts.lang"])
    count = len(ids)
    rule_of = np.full(count, -1, np.int32)
    value = np.full(count, np.nan)
    of_id = np.full(count, "", object)
    for source in sorted(set(sources)):
        mine = sources == source
        for number, rule in enumerate(rules_for(source, rules)):
            hit = mine & (rule_of < 0) & rules_module.broken(rule, columns)
            if rule.lang is not None:
                hit &= rules_module.among(languages, rule.lang)
            if not hit.any():
                continue
            rule_of[hit] = number
            value[hit] = rules_module.numeric(columns[rule.signal])[hit]
            if rule.of is not None:
                of_id[hit] = np.array(columns[rule.of].to_pylist(), object)[hit]
    num_bytes = columns["facts.num_bytes"].to_numpy()
    return Verdicts(
        ids, columns["facts.repo"].to_pylist(), sources, num_bytes, rule_of, value, of_id
    )


def _has(output: str | os.PathLike, attribute: str) -> bool:
    try:
        read_manifest(tables.folder_of(output, attribute), "attribute")
    except UserError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Candidates:
    """shard -> [documents] bool: who passes the rules. De-duplication looks at these alone, so
    that a document that is dropped anyway neither survives for a good copy nor removes one."""

    output: str
    rules: Rules

    def __call__(self, shard: int) -> np.ndarray:
        return judge(self.output, shard, self.rules).rule < 0

    def settings(self) -> dict[str, Any]:
        """What the answer depends on, for resume keys."""
        return {
            "rules": rules_module.to_json(self.rules),
            "inputs": inputs(self.output, self.rules),
        }


def inputs(output: str | os.PathLike, rules: Rules) -> dict[str, str]:
    """The digests of the attributes that the rules read."""
    names = {*rules_module.attributes_of(rules), "facts"}
    if any(rule.lang for some in rules.values() for rule in some) and _has(output, "language"):
        names.add("language")
    return {name: read_manifest(tables.folder_of(output, name), "attribute")["digest"]
            for name in sorted(names)}  # fmt: skip


def run(
    output: str | os.PathLike,
    rules: Rules,
    *,
    seed: int = 0,
    split_by: str = "id",
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the attribute "decision" for every document below `output`; returns its manifest.

    The manifest's shards hold, per source, the counts [documents, bytes] that came in, that each
    rule dropped, and the extremes of the hash by which the kept documents are split (`split_key`).
    """
    documents = open_documents(output)
    missing = [name for name in rules_module.attributes_of(rules) if not _has(output, name)]
    if missing:
        raise UserError(
            f"the rules read the attribute {missing[0]!r}, which {output} does not have; "
            "compute it first or leave these rules out"
        )
    settings = {"rules": rules_module.to_json(rules), "seed": seed, "split_by": split_by}
    upstream = {"documents": documents.digest, **inputs(output, rules)}
    target = Output(
        tables.folder_of(output, NAME), "attribute", tables.SUFFIX,
        tuple(fingerprint([settings, upstream, digest]) for digest in documents.digests),
    )  # fmt: skip
    if not target.is_complete(settings, upstream):
        target.start()
        work = _Decide(os.fspath(output), dict(rules), seed, split_by, target)
        runners.run_over(target.pending(), "Decide", work, beam_options, shown="decide")
    return target.complete(settings, upstream)


class _Decide(beam.DoFn):
    def __init__(self, output: str, rules: dict, seed: int, split_by: str, target: Output):
        super().__init__()
        self.output, self.rules, self.target = output, rules, target
        self.seed, self.split_by = seed, split_by

    def process(self, shard):
        verdicts = judge(self.output, shard, self.rules)
        tables.write_table(self.target.path(shard), _table(verdicts, self.rules))
        counts = _counts(verdicts, self.rules, self.seed, self.split_by)
        self.target.finish(shard, len(verdicts.ids), sources=counts)
        progress.bump()


def _table(verdicts: Verdicts, rules: Rules) -> pa.Table:
    broken = [
        rules_for(source, rules)[number] if number >= 0 else None
        for source, number in zip(verdicts.sources, verdicts.rule, strict=True)
    ]
    return pa.table(
        {
            "id": verdicts.ids,
            "stage": [rule and rule.stage for rule in broken],
            "reason": [rule and rule.reason for rule in broken],
            "value": [v if rule else None for v, rule in zip(verdicts.value, broken, strict=True)],
            "of_id": [of or None for of in verdicts.of_id],
        },
        schema=tables.with_id(SCHEMA),
    )


def _counts(verdicts: Verdicts, rules: Rules, seed: int, split_by: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for source in sorted(set(verdicts.sources)):
        mine = verdicts.sources == source
        dropped = []
        for number in range(len(rules_for(source, rules))):
            hit = mine & (verdicts.rule == number)
            dropped.append([int(hit.sum()), int(verdicts.num_bytes[hit].sum())])
        kept = np.flatnonzero(mine & (verdicts.rule < 0))
        keys = (split_key(verdicts.ids[row], verdicts.repos[row], split_by) for row in kept)
        hashes = [split_hash(key, seed) for key in keys]
        result[source] = {
            "in": [int(mine.sum()), int(verdicts.num_bytes[mine].sum())],
            "dropped": dropped,
            "kept": [len(kept), int(verdicts.num_bytes[kept].sum())],
            "extremes": [min(hashes), max(hashes)] if hashes else None,
        }
    return result


def split_key(id: str, repo: str, split_by: str) -> str:
    """What a document is split by: itself, or (`split_by` "repo") its repository, so that no file
    validates what its neighbours trained."""
    return repo if split_by == "repo" and repo else id


def split_hash(key: str, seed: int) -> int:
    return hash63(key, seed, "split")


def drops(output: str | os.PathLike) -> Iterator[Drop]:
    """Every dropped document, shard by shard in the order of the ids."""
    manifest = read_manifest(tables.folder_of(output, NAME), "attribute")
    for shard in range(len(manifest["shards"])):
        for row in tables.read_attribute(output, NAME, shard).to_pylist():
            if row["stage"] is not None:
                value = row["value"]
                value = 0.0 if value is None or np.isnan(value) else value
                yield Drop(row["id"], row["stage"], row["reason"], value, row["of_id"] or "")


def merge_counts(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The counts of all shards of a decision manifest, per source."""
    total: dict[str, dict[str, Any]] = {}
    for row in manifest["shards"]:
        for source, counts in row["sources"].items():
            entry = total.get(source)
            if entry is None:
                total[source] = {name: _copy(value) for name, value in counts.items()}
                continue
            for name in ("in", "kept"):
                entry[name] = [a + b for a, b in zip(entry[name], counts[name], strict=True)]
            entry["dropped"] = [
                [a + b for a, b in zip(left, right, strict=True)]
                for left, right in zip(entry["dropped"], counts["dropped"], strict=True)
            ]
            both = [e for e in (entry["extremes"], counts["extremes"]) if e]
            entry["extremes"] = [min(e[0] for e in both), max(e[1] for e in both)] if both else None
    return total


def _copy(value: Any) -> Any:
    return [_copy(item) for item in value] if isinstance(value, list) else value
