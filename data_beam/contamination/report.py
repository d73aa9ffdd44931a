"""What of the evaluation sets stands in an annotated corpus: by set, by source, with samples side
by side. `OUT/attributes/contamination/report.json` is for people and the inspect page;
`examples.jsonl.zst` beside it has every example hit with its documents."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from typing import Any

from data_beam import tables
from data_beam.contamination import index as indices
from data_beam.io import storage, writers
from data_beam.schema import Document
from data_beam.stage import Documents, open_documents, read_manifest
from internlm2_jax.files import json_bytes

_COLUMNS = (
    "id", "matched_ngrams", "covered", "longest_run", "set", "examples", "num_examples",
    "example_share", "answer_hit", "removed", "num_spans",
)  # fmt: skip
_EXCERPT = 800  # characters of a document beside its example


def write(output: str | os.PathLike, *, samples: int = 5) -> dict[str, Any]:
    """Writes and returns the report of the corpus below `output`, annotated with `Contamination`.

    {"kind": "contamination", "index": digest, "n": words in a run, "documents", "documents_hit",
     "sets": [{"name", "examples", "indexed", "too_short", "unusable", "examples_hit",
               "documents_hit", "answer_hits", "sources": {source: documents hit},
               "samples": [{"example", "question", "answer", "id", "source", "url", "path",
                            "matched_ngrams", "covered", "longest_run", "example_share",
                            "answer_hit", "removed", "excerpt", "excerpt_start"}]}]}

    A document counts for every set of which it has an example; samples are the most complete
    examples of documents that hold most of that set, each example once.
    """
    folder = tables.folder_of(output, "contamination")
    manifest = read_manifest(folder, "attribute")
    settings = manifest["settings"]
    loaded = indices.load(settings["index"], settings["digest"])
    documents = open_documents(output)
    of_example: defaultdict[str, list[str]] = defaultdict(list)
    hits: defaultdict[str, list[tuple[dict[str, Any], int, int]]] = defaultdict(list)
    totals: Counter[str] = Counter()
    sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for shard in range(documents.shards):
        table = tables.read_attribute(output, "contamination", shard, _COLUMNS)
        facts = tables.read_attribute(output, "facts", shard, ["source"])["source"]
        for row, number in _hit_rows(table):
            totals["documents_hit"] += 1
            hits[row["set"]].append((row, shard, number))
            for example in row["examples"]:
                of_example[example].append(row["id"])
            for name in sorted({_set_of(example) for example in row["examples"]}):
                sources[name][facts[number].as_py()] += 1
                totals[f"answer {name}"] += row["answer_hit"]
    by_id = {example["id"]: example for example in loaded.examples}
    examples_hit = Counter(map(_set_of, of_example))
    rows = [
        {**some, "examples_hit": examples_hit[some["name"]],
         "documents_hit": sum(sources[some["name"]].values()),
         "answer_hits": totals[f"answer {some['name']}"],
         "sources": dict(sorted(sources[some["name"]].items())),
         "samples": _samples(hits[some["name"]], some["name"], by_id, documents, samples)}
        for some in loaded.sets
    ]  # fmt: skip
    report = {
        "kind": "contamination", "index": settings["digest"], "n": loaded.n,
        "documents": manifest["records"], "documents_hit": totals["documents_hit"], "sets": rows,
    }  # fmt: skip
    order = {example["id"]: number for number, example in enumerate(loaded.examples)}
    with storage.whole(storage.join(folder, "examples.jsonl.zst")) as path:
        writers.write_lines_zst(path, (
            json_bytes({"example": example, "documents": sorted(of_example[example])})
            for example in sorted(of_example, key=order.__getitem__)
        ))  # fmt: skip
    storage.write_json(storage.join(folder, "report.json"), report)
    return report


def _hit_rows(table):
    """(row, its number) of the documents in which something was found."""
    for number, count in enumerate(table["matched_ngrams"].to_pylist()):
        if count:
            yield table.slice(number, 1).to_pylist()[0], number


def _set_of(example: str) -> str:
    return example.partition("#")[0].partition("/")[0]


def _samples(hits, name: str, by_id, documents: Documents, count: int) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row, shard, number in sorted(hits, key=lambda h: (-h[0]["example_share"], h[0]["id"])):
        example = next(id for id in row["examples"] if _set_of(id) == name)
        if example in found:
            continue
        if len(found) == count:
            break
        document = _document(documents, shard, number)
        start, end = row["removed"][:2]
        found[example] = {
            "example": example, "question": by_id[example]["question"],
            "answer": by_id[example]["answer"], "source": document.source, "url": document.url,
            "path": document.path, "excerpt": document.text[start : min(end, start + _EXCERPT)],
            "excerpt_start": start,
            **{key: row[key] for key in _COLUMNS if key not in ("set", "examples")},
        }  # fmt: skip
    return list(found.values())


def _document(documents: Documents, shard: int, number: int) -> Document:
    with storage.local_copy(documents.path(shard)) as path:
        return Document.from_bytes(writers.read_array_record(path, number, number + 1)[0])
