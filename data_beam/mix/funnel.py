"""The funnel: how many documents and bytes each stage let through, per source, and why not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from data_beam import tables
from data_beam.io import storage
from data_beam.mix import decide, write
from data_beam.mix.rules import Rules, merged, rules_for, to_json
from data_beam.stage import open_documents, read_manifest
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

# A source that loses more than this share of its documents to one run is a broken run, not a dirty
# source, until somebody says otherwise.
MAX_REMOVED_SHARE = 0.95


def _row(stage: str, count_in: Sequence[int], dropped: Mapping[str, Sequence[int]]) -> dict:
    lost = [sum(count[i] for count in dropped.values()) for i in (0, 1)]
    return {
        "stage": stage, "unit": "document",
        "documents_in": count_in[0], "documents_out": count_in[0] - lost[0],
        "bytes_in": count_in[1], "bytes_out": count_in[1] - lost[1],
        "dropped": {reason: {"documents": count[0], "bytes": count[1]}
                    for reason, count in sorted(dropped.items()) if count[0]},
    }  # fmt: skip


def _stages(source: str, read: dict, counts: dict[str, Any] | None, rules: Rules) -> list[dict]:
    """The rows of one source: reading, then a row per stage of its rules."""
    dead = {key.partition("\t")[2]: count for key, count in read["dead"].items()
            if key.partition("\t")[0] == source}  # fmt: skip
    alive = read["sources"].get(source, [0, 0])
    came = [alive[i] + sum(count[i] for count in dead.values()) for i in (0, 1)]
    rows = [_row("read", came, dead)]
    current = list(alive)
    by_stage: dict[str, dict[str, list[int]]] = {}
    for rule, count in zip(
        rules_for(source, rules), (counts or {}).get("dropped", ()), strict=False
    ):
        reasons = by_stage.setdefault(rule.stage, {})
        entry = reasons.setdefault(rule.reason, [0, 0])
        reasons[rule.reason] = [entry[0] + count[0], entry[1] + count[1]]
    for stage, reasons in by_stage.items():
        rows.append(_row(stage, current, reasons))
        current = [rows[-1]["documents_out"], rows[-1]["bytes_out"]]
    return rows


def _sum(rows: Sequence[dict]) -> dict:
    """One row over all sources."""
    total: dict[str, Any] = {"stage": rows[0]["stage"], "unit": "document", "dropped": {}}
    for name in ("documents_in", "documents_out", "bytes_in", "bytes_out"):
        total[name] = sum(row[name] for row in rows)
    for row in rows:
        for reason, count in row["dropped"].items():
            entry = total["dropped"].setdefault(reason, {"documents": 0, "bytes": 0})
            entry["documents"] += count["documents"]
            entry["bytes"] += count["bytes"]
    return total


def count(output: str | os.PathLike, rules: Rules) -> dict[str, Any]:
    """The funnel up to the decision, before anything is written."""
    read = _totals(output)
    decisions = read_manifest(tables.folder_of(output, decide.NAME), "attribute")
    counts = decide.merge_counts(decisions)
    names = sorted({*counts, *(key.partition("\t")[0] for key in read["dead"])})
    sources = {name: {"stages": _stages(name, read, counts.get(name), rules)} for name in names}
    order = merged([row["stage"] for row in source["stages"]] for source in sources.values())
    stages = []
    for stage in order:
        # A source without this stage passes through it whole.
        rows = []
        for source in sources.values():
            mine = [row for row in source["stages"] if row["stage"] == stage]
            rows.append(mine[0] if mine else _passing(stage, source["stages"], order))
        stages.append(_sum(rows))
    for source in sources.values():
        first, last = source["stages"][0], source["stages"][-1]
        source |= {
            "input_documents": first["documents_in"], "input_bytes": first["bytes_in"],
            "kept_documents": last["documents_out"], "kept_bytes": last["bytes_out"],
        }  # fmt: skip
    return {
        "stages": stages, "sources": sources, "encodings": read["encodings"],
        "input_bytes": stages[0]["bytes_in"] if stages else 0,
    }  # fmt: skip


def _passing(stage: str, rows: list[dict], order: list[str]) -> dict:
    before = [row for row in rows if order.index(row["stage"]) < order.index(stage)]
    current = [before[-1]["documents_out"], before[-1]["bytes_out"]] if before else [0, 0]
    return _row(stage, current, {})


def _add_assembly(funnel: dict[str, Any], counts: Mapping[str, dict[str, Any]]) -> None:
    """A last row: the files that went into a repository's document, and those that did not. Its
    documents_out counts files; `assembled` the documents made of them."""
    rows = []
    for name, source in funnel["sources"].items():
        last = source["stages"][-1]
        current = [last["documents_out"], last["bytes_out"]]
        count = counts.get(name, {"dropped": {}, "out": current})
        row = _row("assemble", current, count["dropped"])
        row["assembled"] = {"documents": count["out"][0], "bytes": count["out"][1]}
        source["stages"].append(row)
        source |= {"kept_documents": count["out"][0], "kept_bytes": count["out"][1]}
        rows.append(row)
    made = {unit: sum(row["assembled"][unit] for row in rows) for unit in ("documents", "bytes")}
    funnel["stages"].append({**_sum(rows), "assembled": made})


def check(funnel: dict[str, Any], max_removed_share: float, output: str | os.PathLike) -> None:
    """Refuses a corpus without documents, or a source that lost more than the share allowed."""
    kept = sum(source["kept_documents"] for source in funnel["sources"].values())
    if not kept:
        reasons = {reason: count["documents"] for row in funnel["stages"]
                   for reason, count in row["dropped"].items()}  # fmt: skip
        worst = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items())) or "no input"
        raise UserError(
            f"no document is left (dropped: {worst}); give longer text or code files, or loosen "
            "the rules"
        )
    for name, source in funnel["sources"].items():
        before, after = source["stages"][0]["documents_out"], source["kept_documents"]
        if before and before - after > max_removed_share * before:
            reasons = {(row["stage"], reason): count["documents"] for row in source["stages"][1:]
                       for reason, count in row["dropped"].items()}  # fmt: skip
            (stage, reason), number = max(reasons.items(), key=lambda item: item[1])
            raise UserError(
                f"source {name} lost {before - after:,} of {before:,} documents, most ({number:,}) "
                f"to {stage}: {reason}; look at them (python -m data_beam inspect {output}), then "
                f"loosen that rule or raise --max-removed-share above {max_removed_share:g}"
            )


def finish(
    output: str | os.PathLike,
    rules: Rules,
    mix: write.Mix,
    *,
    max_removed_share: float = MAX_REMOVED_SHARE,
    select: dict[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Decides, checks the guards, writes OUTPUT/corpus and its funnel.json and manifest.json.

    `select` is a row for the head of the funnel (files left out by a budget); `extra` goes into
    the manifest's settings. Returns the funnel.
    """
    decide.run(output, rules, seed=mix.seed, split_by=mix.split_by, beam_options=beam_options)
    funnel = count(output, rules)
    check(funnel, max_removed_share, output)
    rows = write.run(output, mix, beam_options=beam_options)
    documents = open_documents(output)
    if mix.assemble is not None:
        _add_assembly(funnel, write.assembly_counts(output, documents.shards))
    if select is not None:
        funnel["stages"].insert(0, select)
    for name, source in funnel["sources"].items():
        for split in ("train", "validation"):
            mine = [r for r in rows if r["split"] == split
                    and (r["source"] == name or r["source"].startswith(name + "_"))]  # fmt: skip
            source[split] = {key: sum(row[key] for row in mine) for key in ("documents", "bytes")}
    folder = storage.join(output, "corpus")
    settings = {"rules": to_json(rules), "mix": mix.settings(), **(extra or {})}
    storage.write_json(storage.join(folder, "funnel.json"), funnel)
    digests = [row["digest"] for row in rows]
    storage.write_json(
        storage.join(folder, "manifest.json"),
        {"kind": "corpus", "settings": settings, "documents": documents.digest,
         "fingerprint": fingerprint([settings, digests]), "shards": rows},
    )  # fmt: skip
    return funnel


def _totals(output: str | os.PathLike) -> dict[str, Any]:
    """Sums over the shards: documents and bytes per source, dead letters per source and reason
    ("source\\treason"), encodings."""
    sums: dict[str, dict[str, Any]] = {"sources": {}, "dead": {}, "encodings": {}}
    for name, kind in (("sources", "documents"), ("dead", "dead_letters")):
        for row in read_manifest(storage.join(output, kind), kind)["shards"]:
            for key, (count, size) in row["sources"].items():
                entry = sums[name].setdefault(key, [0, 0])
                entry[0] += count
                entry[1] += size
            for key, count in row.get("encodings", {}).items():
                sums["encodings"][key] = sums["encodings"].get(key, 0) + count
    return sums
