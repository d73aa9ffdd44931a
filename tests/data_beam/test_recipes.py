"""The recipes from files to a corpus, each on real text or on a small folder made for it."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path

import pytest
from raw_folder import sentences

from data_beam.io import corpus_folder
from data_beam.mix import decide
from data_beam.pipelines import code, ingest, web_text
from internlm2_jax import files
from internlm2_jax.errors import UserError


def shards(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "corpus").glob("*.arrayrecord"))
    }


# --- web_text ---------------------------------------------------------------------------------

ENGLISH = (
    "The committee met on Tuesday and talked about the new library for most of the evening. "
    "Nobody could say how much it would cost, but everyone agreed that the old one was too small. "
)
GERMAN = (
    "Der Ausschuss hat am Dienstag getagt und lange über die neue Bibliothek gesprochen. "
    "Niemand wusste, was sie kosten würde, aber alle fanden die alte zu klein. "
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """JSON lines as a crawl gives them, in two files and two dumps."""
    folder = tmp_path_factory.mktemp("crawl")
    rng = random.Random(3)
    article = "".join(sentences(rng, 40))
    footer = "Subscribe to our newsletter and never miss a story again.\n"
    rows = [
        {"id": f"e{i}", "text": ENGLISH + sentences(rng, 20) + footer, "dump": "CC-MAIN-2022-05"}
        for i in range(12)
    ]
    question = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips "
        "in May. How many clips did Natalia sell altogether?"
    )
    rows += [
        {"id": "old", "text": article, "dump": "CC-MAIN-2021-04", "url": "http://a.org/1"},
        {"id": "new", "text": article + "One more line.\n", "dump": "CC-MAIN-2023-50"},
        {"id": "bad", "text": ENGLISH + sentences(rng, 20), "url": "https://x.spam.example/p"},
        {"id": "rude", "text": ENGLISH + ("What a frobnicator! " * 5) + sentences(rng, 20)},
        {"id": "de", "text": GERMAN * 4},
        {"id": "short", "text": "Short."},
        {"id": "leak", "text": f"{ENGLISH}{question} {sentences(rng, 20)}"},
        {"id": "e0", "text": "the id is taken " + sentences(rng, 20)},
    ]  # fmt: skip
    for row in rows:
        row["source"] = "web"
    lines = [json.dumps(row) for row in rows]
    (folder / "a.jsonl").write_text("\n".join(lines[:9]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines[9:], "{"]).encode()))
    (folder / "lists").mkdir()
    (folder / "lists/domains.txt").write_text("spam.example\n")
    (folder / "lists/words.txt").write_text("frobnicator\n")
    (folder / "lists/gsm.jsonl").write_text(json.dumps({"question": question, "answer": "72"}))
    return folder


@pytest.fixture(scope="module")
def settings(pages) -> web_text.WebText:
    from data_beam.dedup.lines import RepeatedLines

    return web_text.WebText(
        languages=("en", "und"), domain_lists=(str(pages / "lists/domains.txt"),),
        word_lists=(str(pages / "lists/words.txt"),), lines=RepeatedLines(),
        benchmarks=(f"gsm={pages / 'lists/gsm.jsonl'}",),
    )  # fmt: skip


def test_web_text_drops_each_for_its_reason(pages, settings, tmp_path):
    funnel = web_text.run([str(pages / "*.jsonl*")], tmp_path / "out", settings, shards=2)
    names = {d.id: d.meta["original_id"] for s in (0, 1)
             for d in ingest.open_documents(tmp_path / "out").read(s)}  # fmt: skip
    found = {names[d.id]: (d.stage, d.reason, names.get(d.of_id, ""))
             for d in decide.drops(tmp_path / "out")}  # fmt: skip
    assert found.pop("short")[:2] == ("filter", "too_short")
    assert found == {
        "old": ("near_dedup", "near_duplicate", "new"),  # the newest dump stays
        "bad": ("safe", "blocked_domain", ""),
        "rude": ("safe", "blocked_words", ""),
        "de": ("language", "other_language", ""),
        "leak": ("contamination", "benchmark", ""),
    }
    reasons = sorted(letter.reason for letter in ingest.dead_letters(tmp_path / "out"))
    assert reasons == ["bad_json"]
    kept = list(corpus_folder.documents(tmp_path / "out/corpus"))
    assert len(kept) == 14 == funnel["sources"]["web"]["kept_documents"]
    assert sum("newsletter" in document.text for document in kept) == 1  # cut out of the others


def test_web_text_is_the_same_however_the_input_lies(pages, settings, tmp_path):
    rows = (pages / "a.jsonl").read_text().splitlines()
    rows += gzip.decompress((pages / "b.jsonl.gz").read_bytes()).decode().splitlines()
    random.Random(1).shuffle(rows)
    for name, some in (("x", rows[:3]), ("y", rows[3:11]), ("z", rows[11:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
    web_text.run([str(tmp_path / "*.jsonl")], tmp_path / "one", settings, shards=2, wave_bytes=9000)
    web_text.run([str(pages / "*.jsonl*")], tmp_path / "two", settings, shards=2)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_a_wrong_setting_is_told_before_anything_is_read(pages, tmp_path):
    with pytest.raises(UserError, match="no rules nonsense: neither a file nor a preset"):
        web_text.run([str(pages)], tmp_path / "out", web_text.WebText(rules="nonsense"))
    with pytest.raises(UserError, match=r"words\.missing"):
        lists = (str(pages / "words.missing"),)
        web_text.run([str(pages)], tmp_path / "out", web_text.WebText(word_lists=lists))
    assert not (tmp_path / "out").exists()


def test_a_rule_that_names_a_score_takes_the_place_of_the_cut_off(tmp_path):
    described = {"cutoff": {"rule": "largest F1", "threshold": 0.5}, "judge": "mean"}
    files.write_json(tmp_path / "model/classifier.json", {"backend": "fasttext", **described})
    (tmp_path / "own.yaml").write_text(
        "text: [{stage: safe, reason: toxic, signal: toxicity.score, maximum: 0.8}]"
    )

    def limits(name: str, **settings) -> list[float]:
        wanted = web_text.WebText(classifiers={name: str(tmp_path / "model")}, **settings)
        recipe = web_text.recipe(wanted, tmp_path / "out")
        assert [job.name for job in recipe.scores] == [name]
        return [r.maximum for r in recipe.rules["text"] if r.signal == f"{name}.score"]

    (own,) = limits("toxicity")
    assert 0.499 < own < 0.5
    assert limits("toxicity", rules=str(tmp_path / "own.yaml")) == [0.8]
    assert limits("fluency", rules=str(tmp_path / "own.yaml")) == [own]


# --- code -------------------------------------------------------------------------------------


def _module(name: str, imports: str, lines: int = 30) -> str:
    body = "\n\n\n".join(
        f'def {name}_{i}(value, other=None):\n    """Combine {name} number {i} with the other."""\n'
        f"    result_{i} = value * {i} + len(str(other))\n    return result_{i}"
        for i in range(lines)
    )
    return f'"""The {name} part."""\n\n{imports}\n\n\n{body}\n'


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repos")
    for repo in ("alpha", "beta", "gamma"):
        package = folder / repo / repo
        package.mkdir(parents=True)
        (folder / repo / "README.md").write_text(
            f"# {repo}\n\nThis package counts words.\n" + sentences(random.Random(repo), 12)
        )
        (folder / repo / "LICENSE").write_text(
            "Permission is hereby granted, free of charge, to any person obtaining a copy of this "
            'software and associated documentation files (the "Software"), to deal in the Software '
            "without restriction. The above copyright notice and this permission notice shall be "
            "included in all copies or substantial portions of the Software. "
            'THE SOFTWARE IS PROVIDED "AS IS".'
        )
        (package / "app.py").write_text(_module(f"app_{repo}", f"from {repo} import core"))
        (package / "core.py").write_text(_module(f"core_{repo}", f"from {repo}.base import base_0"))
        (package / "base.py").write_text(_module(f"base_{repo}", "import os"))
        (package / "wire_pb2.py").write_text(
            "# Generated by the protocol buffer compiler.  DO NOT EDIT!\n" + _module("wire", "")
        )
    # Another width of indentation is the same file.
    text = (folder / "alpha/alpha/base.py").read_text()
    (folder / "beta/beta/copied.py").write_text(text.replace("    ", "\t"))
    return folder


def test_code_makes_one_document_of_a_repository_in_the_order_of_imports(repositories, tmp_path):
    from data_beam.pipelines.graded_code import Grades

    settings = code.Code(grades=Grades(shares=(0.0, 1.0, 0.0)))
    funnel = code.run([str(repositories)], tmp_path / "out", settings, shards=2)
    documents = {d.repo.rpartition("/")[2]: d
                 for d in corpus_folder.documents(tmp_path / "out/corpus")}  # fmt: skip
    assert set(documents) == {"alpha", "beta", "gamma"}
    text = documents["gamma"].text
    places = [text.index(f"## `{name}`") for name in
              ("gamma/base.py", "gamma/core.py", "gamma/app.py")]  # fmt: skip
    assert places == sorted(places)
    assert text.index("counts words") < places[0]
    assert documents["gamma"].license == "MIT"
    assert all("wire" not in document.text for document in documents.values())
    twins = [d for d in decide.drops(tmp_path / "out") if d.stage == "exact_dedup"]
    assert len(twins) == 1
    assert "copied.py" not in documents["beta"].text or "base.py" not in documents["alpha"].text
    last = funnel["stages"][-1]
    assert last["stage"] == "assemble" and last["assembled"]["documents"] == 3
    manifest = corpus_folder.read_manifest(tmp_path / "out/corpus")
    assert {row["source"] for row in manifest["shards"]} == {"code_moderate"}


def test_code_again_makes_nothing_again(repositories, tmp_path):
    first = code.run([str(repositories)], tmp_path / "out", shards=2)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("part-*") if p.is_file()}
    assert code.run([str(repositories)], tmp_path / "out", shards=2) == first
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("part-*") if p.is_file()}
    assert after == before
