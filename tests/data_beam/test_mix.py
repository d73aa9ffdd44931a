"""Rules, decisions, writing and the funnel, over hand-made attributes."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_corpus import doc, write_documents

from data_beam.io import corpus_folder
from data_beam.mix import decide, funnel, rules, write
from data_beam.mix.rules import Rule
from data_beam.pipelines import annotate
from data_beam.stage import Output, open_documents
from internlm2_jax.errors import UserError
from internlm2_jax.files import read_json


@dataclasses.dataclass(frozen=True)
class Length:
    """Characters, a note and the first half of the text as a span."""

    scale: float = 1.0
    name: ClassVar[str] = "length"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [("chars", pa.float32()), ("grade", pa.string()), ("removed", pa.list_(pa.int32()))]
    )

    def setup(self) -> None:
        pass

    def compute(self, batch: Sequence) -> dict[str, Sequence]:
        texts = [examined.document.text for examined in batch]
        return {
            "chars": [None if "?" in text else len(text) * self.scale for text in texts],
            "grade": ["high" if len(text) > 60 else "low" for text in texts],
            "removed": [[0, 5] if text.startswith("CUT: ") else [] for text in texts],
        }


SHORT = Rule("filter", "too_short", "length.chars", minimum=20)
LONG = Rule("filter", "too_long", "length.chars", maximum=100)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    documents = [doc(f"number {i} " + "x" * (7 * i)) for i in range(20)]
    documents += [doc("short?", "code"), doc("CUT: this stays, it is long enough", "code")]
    write_documents(tmp_path, documents, shards=3)
    annotate.run(tmp_path, [Length()])
    return tmp_path


def everything(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def test_every_document_is_kept_or_dropped_with_the_first_broken_rule(corpus):
    result = funnel.finish(corpus, {"text": (SHORT, LONG)}, write.Mix())
    drops = {drop.id: drop for drop in decide.drops(corpus)}
    kept = {d.id for d in corpus_folder.documents(corpus / "corpus")}
    documents = {d.id: d for s in range(3) for d in open_documents(corpus).read(s)}
    assert kept | set(drops) == set(documents) and not kept & set(drops)
    for id, drop in drops.items():
        length = len(documents[id].text)
        assert drop.reason == ("too_short" if length < 20 else "too_long")
        assert drop.value == length
    for id in kept:
        assert documents[id].source == "code" or 20 <= len(documents[id].text) <= 100
    row = next(row for row in result["stages"] if row["stage"] == "filter")
    assert row["documents_in"] == 22 and row["documents_out"] == len(kept)
    assert sum(c["documents"] for c in row["dropped"].values()) == len(drops)
    size = sum(len(documents[id].text.encode()) for id in kept)
    assert row["bytes_out"] == size
    assert read_json(corpus / "corpus" / "funnel.json") == result


def test_null_passes_and_edits_and_grades_apply(corpus):
    only = Rule("filter", "too_short", "length.chars", minimum=1000)
    mix = write.Mix(edits=("length.removed",), suffix="length.grade")
    funnel.finish(corpus, {"code": (only,)}, mix, max_removed_share=1)
    code = [d for d in corpus_folder.documents(corpus / "corpus") if d.source == "code"]
    assert [d.text for d in code] == ["short?"]  # null says nothing; the other one is too short
    funnel.finish(corpus, {}, mix)
    texts = {d.text for d in corpus_folder.documents(corpus / "corpus")}
    assert "this stays, it is long enough" in texts
    sources = {row["source"] for row in corpus_folder.read_manifest(corpus / "corpus")["shards"]}
    assert sources == {"text_high", "text_low", "code_low"}


def test_a_new_cut_off_reads_no_attribute_again_and_forgets_the_old_shards(corpus, monkeypatch):
    funnel.finish(corpus, {"text": (SHORT,)}, write.Mix())
    before = everything(corpus / "attributes" / "length")
    monkeypatch.setattr(Length, "compute", None)
    annotate.run(corpus, [Length()])
    again = funnel.finish(corpus, {"text": (dataclasses.replace(SHORT, minimum=80),)}, write.Mix())
    assert everything(corpus / "attributes" / "length") == before
    assert again["sources"]["text"]["kept_documents"] < 20
    named = {row["name"] for row in corpus_folder.read_manifest(corpus / "corpus")["shards"]}
    assert named == {path.name for path in (corpus / "corpus").glob("*.arrayrecord")}


def test_another_setting_computes_the_attribute_again(corpus):
    before = everything(corpus / "attributes" / "length")
    annotate.run(corpus, [Length(scale=2.0)])
    assert everything(corpus / "attributes" / "length") != before


def test_a_killed_job_goes_on_with_the_same_bytes(corpus, monkeypatch):
    funnel.finish(corpus, {"text": (SHORT,)}, write.Mix())
    whole = everything(corpus)
    for folder in ("attributes/length", "attributes/decision", "corpus", "corpus/parts"):
        for path in sorted((corpus / folder).iterdir())[1::2]:
            if path.is_file():
                path.unlink()
    annotate.run(corpus, [Length()])
    funnel.finish(corpus, {"text": (SHORT,)}, write.Mix())
    assert everything(corpus) == whole


def test_a_shard_is_skipped_only_under_its_own_key(tmp_path):
    first = Output(str(tmp_path), "attribute", ".txt", ("a", "b"))
    for shard in (0, 1):
        Path(first.path(shard)).write_text("x")
        first.finish(shard, 1)
    assert first.pending() == []
    assert Output(str(tmp_path), "attribute", ".txt", ("a", "c")).pending() == [1]
    Path(first.path(0)).unlink()
    assert first.pending() == [0]


def test_validation_is_never_empty_and_repositories_stay_whole(tmp_path):
    files = [
        doc(f"file {i} of repository {i % 4}, long enough", "code", repo=f"r{i % 4}", path=str(i))
        for i in range(40)
    ]
    write_documents(tmp_path, files)
    annotate.run(tmp_path, [])
    funnel.finish(tmp_path, {}, write.Mix(split_by="repo", validation_fraction=0.01))
    manifest = corpus_folder.read_manifest(tmp_path / "corpus")
    found: dict[str, set[str]] = {}
    for row in manifest["shards"]:
        for document in corpus_folder.documents(tmp_path / "corpus", row["split"]):
            found.setdefault(document.repo, set()).add(row["split"])
    assert set().union(*found.values()) == {"train", "validation"}
    assert all(len(splits) == 1 for splits in found.values())


def test_guards(corpus):
    empty = Rule("filter", "not_empty", "facts.num_bytes", maximum=0)
    with pytest.raises(UserError, match=r"no document is left \(dropped: not_empty 22\)"):
        funnel.finish(corpus, {"default": (empty,)}, write.Mix(), max_removed_share=1)
    with pytest.raises(UserError, match=r"source text lost 19 of 20 .*filter: too_short.*0\.9"):
        funnel.finish(
            corpus, {"text": (dataclasses.replace(SHORT, minimum=140),)}, write.Mix(),
            max_removed_share=0.9,
        )  # fmt: skip
    with pytest.raises(UserError, match=r"'nowhere', which .* does not have"):
        decide.run(corpus, {"text": (Rule("filter", "x", "nowhere.y", minimum=1),)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "mapping"),
        ("text: 3", "text is not a list"),
        ("text: [{stage: filter, reason: x}]", "rule 1 needs stage, reason and signal"),
        ("text: [{stage: a, reason: b, signal: c.d, maximun: 3}]", "unknown 'maximun'"),
        ("text: [{stage: a, reason: b, signal: c.d, maximum: lots}]", "'lots' is not a number"),
        ("text: [{stage: a, reason: b, signal: cd}]", "not of the form attribute.column"),
        ("text: [{stage: a, reason: b, signal: c.d, minimum: 2, maximum: 1}]", "above maximum"),
        ("text: [", "not valid YAML"),
    ],
)
def test_bad_rules_are_told(text, message):
    with pytest.raises(UserError, match=message):
        rules.parse(text, "my.yaml")


def test_rules_for_a_language_only(tmp_path):
    write_documents(tmp_path, [doc("a" * 30, lang="en"), doc("b" * 30, lang="de")])
    annotate.run(tmp_path, [Length()])
    rule = Rule("filter", "english", "length.chars", maximum=10, lang=("en",))
    funnel.finish(tmp_path, {"text": (rule,)}, write.Mix())
    assert [d.lang for d in corpus_folder.documents(tmp_path / "corpus")] == ["de"]


def test_cut_and_overlapping_spans():
    assert write.cut("0123456789", [2, 4, 6, 9]) == "01459"
    assert write._joined([(0, 3), (2, 5), (7, 8)]) == [0, 5, 7, 8]


@given(st.lists(st.permutations(["read", "language", "filter", "near", "safe"]), max_size=4),
       st.integers(0, 5))  # fmt: skip
def test_one_order_of_stages_agrees_with_all(orders, seed):
    base = ["read", "language", "filter", "near", "safe"]
    rng = random.Random(seed)
    parts = [[name for name in base if rng.random() < 0.6] for _ in orders]
    order = rules.merged(parts)
    assert sorted(order) == sorted({name for part in parts for name in part})
    for part in parts:
        assert [name for name in order if name in part] == part
    assert sorted(rules.merged(orders)) == sorted({name for some in orders for name in some})
