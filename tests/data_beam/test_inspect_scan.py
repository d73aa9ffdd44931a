"""What `inspect` counts is what plain Python counts, in memory that does not grow."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from inspect_corpus import RULES

from data_beam import tables
from data_beam.inspect import scan
from data_beam.inspect.corpus import Corpus
from data_beam.mix.rules import Rule, to_json
from data_beam.stage import Output
from internlm2_jax.errors import UserError


def test_alone_first_and_only_are_those_of_the_rules_one_by_one(whole):
    """Against plain Python over the rows of all attributes."""
    corpus = Corpus(whole)
    result = scan.scan(corpus)
    rows = []
    for shard in range(corpus.documents.shards):
        merged_rows = [{} for _ in range(corpus.documents.counts[shard])]
        for name in ("facts", "signals", "language", "duplicates", "decision"):
            table = tables.read_attribute(whole, name, shard)
            for row, values in zip(merged_rows, table.to_pylist(), strict=True):
                row |= {f"{name}.{column}": value for column, value in values.items()}
        rows += merged_rows
    assert sum(len(some) for some in result.rules.values()) == sum(map(len, RULES.values()))
    for source, rules in RULES.items():
        mine = [row for row in rows if row["facts.source"] == source]
        broken = [[_breaks(rule, row) for rule in rules] for row in mine]
        for number, (rule, count) in enumerate(zip(rules, result.rules[source], strict=True)):
            speaks = [rule.lang is None or row["language.lang"] in rule.lang for row in mine]
            alone = [some[number] for some in broken]
            first = [some[number] and not any(some[:number]) for some in broken]
            only = [some[number] and sum(some) == 1 for some in broken]
            for found, wanted in ((count.of, speaks), (count.alone, alone),
                                  (count.first, first), (count.only, only)):  # fmt: skip
                sizes = [
                    row["facts.num_bytes"] * yes for row, yes in zip(mine, wanted, strict=True)
                ]
                assert found == (sum(wanted), sum(sizes)), (source, rule.reason)
        for row, some in zip(mine, broken, strict=True):
            reason = next((r.reason for r, yes in zip(rules, some, strict=True) if yes), None)
            assert row["decision.reason"] == reason


def _breaks(rule: Rule, row: dict) -> bool:
    if rule.lang is not None and row["language.lang"] not in rule.lang:
        return False
    value = row[rule.signal]
    if rule.of is not None:
        return row[rule.of] is not None
    if value is None or value != value:
        return False
    if rule.allowed is not None:
        return value not in rule.allowed
    return value < rule.minimum or value > rule.maximum


def test_the_curve_at_the_cut_off_is_what_the_rule_drops(whole):
    checked = 0
    for counts in scan.scan(Corpus(whole)).rules.values():
        for count in counts:
            if count.rule.of or count.has_names:
                continue
            lost = 0.0
            for direction, histogram in count.histograms.items():
                assert histogram.count + histogram.missing == count.of[0]
                lost += histogram.curve().at(getattr(count.rule, direction))[0]
            assert lost == pytest.approx(count.alone[0] / count.of[0])
            checked += bool(lost)
    assert checked >= 4


def test_samples_lie_on_their_side_and_the_nearest_are_taken(whole):
    corpus = Corpus(whole)
    (count,) = (c for c in scan.scan(corpus).rules["text"] if c.rule.reason == "too_short")
    values = {}
    for shard in range(corpus.documents.shards):
        columns = corpus.columns(shard, ["facts.id", "facts.source", "signals.num_chars"])
        for id, source, value in zip(*(c.to_pylist() for c in columns.values()), strict=True):
            if source == "text":
                values[id] = value
    below = sorted((v for v in values.values() if v < 200), reverse=True)
    above = sorted(v for v in values.values() if v >= 200)
    assert [s.value for s in count.chosen("dropped near")] == below[: scan.SAMPLES]
    assert [s.value for s in count.chosen("kept near")] == above[: scan.SAMPLES]
    for kind in ("dropped", "kept", "dropped near", "kept near"):
        for sample in count.chosen(kind):
            assert (sample.value < 200) == kind.startswith("dropped")
            assert values[sample.id] == sample.value
            assert corpus.read([sample.place])[sample.place].id == sample.id


def test_fewer_shards_are_a_sample(whole):
    one = Corpus(whole, max_shards=1)
    result = scan.scan(one)
    assert result.documents == one.documents.counts[one.shards[0]]
    with pytest.raises(UserError, match="at least 1"):
        Corpus(whole, max_shards=0)
    clusters = scan.clusters(one)
    everything = scan.clusters(Corpus(whole)).copies
    assert clusters.copies == {id: n for id, n in everything.items() if id in clusters.copies}
    assert all(one.find([id])[id].shard in one.shards for id in clusters.copies)


def test_clusters_hold_every_copy_once(whole):
    clusters = scan.clusters(Corpus(whole))
    assert sum(clusters.copies.values()) == 18
    assert clusters.sizes() == {7: 1, 2: 12}
    values = [member.value for _, member in clusters.doubtful]
    assert values == sorted(values) and values[0] == pytest.approx(0.72)


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    """Two shards and twelve of equal size need the same memory."""
    output, shards, rows = tmp_path, 12, 3000
    _made_up(output, shards, rows)
    peaks = {}
    for count in (2, 12, 2):
        corpus = Corpus(output, max_shards=count)
        tracemalloc.start()
        result = scan.scan(corpus)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert result.documents == count * rows
    assert peaks[12] < 1.3 * peaks[2]


def _made_up(output: Path, shards: int, rows: int) -> None:
    """Attributes of documents that nobody ever saw."""
    rng = np.random.default_rng(0)
    rules = {"text": [Rule("filter", "few", "signals.letters", minimum=0.5)]}
    folders = {
        "documents": {}, "facts": {}, "signals": {},
        "decision": {"rules": to_json(rules), "seed": 0},
    }  # fmt: skip
    targets = {}
    for name in folders:
        is_documents = name == "documents"
        targets[name] = Output(
            str(output / name) if is_documents else tables.folder_of(output, name),
            "documents" if is_documents else "attribute",
            ".arrayrecord" if is_documents else tables.SUFFIX,
            ("k",) * shards,
        )
    for shard in range(shards):
        ids = sorted(rng.bytes(16).hex() for _ in range(rows))
        letters = rng.random(rows)
        columns = {
            "facts": {"id": ids, "source": ["text"] * rows, "lang": ["en"] * rows,
                      "num_bytes": rng.integers(1, 10**6, rows)},
            "signals": {"id": ids, "letters": letters},
            "decision": {"id": ids, "stage": ["filter" if x < 0.5 else None for x in letters],
                         "reason": ["few" if x < 0.5 else None for x in letters]},
        }  # fmt: skip
        for name, target in targets.items():
            if name in columns:
                tables.write_table(target.path(shard), pa.table(columns[name]))
            else:
                Path(target.path(shard)).parent.mkdir(exist_ok=True)
                Path(target.path(shard)).write_bytes(b"")
            target.finish(shard, rows, bytes=0)
    for name, target in targets.items():
        target.complete(folders[name], {})
