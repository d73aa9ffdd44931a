"""The page about a corpus says what the files say, and nothing in a document can harm who looks."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from html_reader import Reader
from inspect_corpus import build, sample_documents, write_attribute

from data_beam.inspect import page
from data_beam.inspect.corpus import Corpus
from data_beam.stage import part_name
from internlm2_jax.errors import UserError
from internlm2_jax.files import read_json, write_json


@pytest.fixture(scope="module")
def html(whole: Path, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert page.build(whole, path) == str(path)
    return path.read_text("utf-8")


def section(html: str, id: str) -> str:
    found = re.search(rf'<section id="{id}">.*?</section>', html, re.DOTALL)
    return Reader(found[0]).words


def test_the_page_stands_alone_and_nothing_in_it_is_markup_of_a_document(html):
    reader = Reader(html)
    known = {
        "html", "head", "meta", "title", "style", "body", "div", "header", "h1", "h2", "h3", "p",
        "nav", "ol", "li", "a", "span", "main", "section", "table", "thead", "tbody", "tr", "th",
        "td", "code", "figure", "figcaption", "details", "summary", "pre", "mark", "svg", "g",
        "defs", "path", "text", "tspan", "use", "clippath", "rect",
    }  # fmt: skip
    assert {tag for tag, _ in reader.tags} <= known
    attributes = {name for _, some in reader.tags for name in some}
    assert not {name for name in attributes if name.startswith("on")}
    assert all(link.startswith("#") for _, link in reader.links)
    assert len(reader.ids) == len(set(reader.ids))
    assert {link[1:] for _, link in reader.links} <= set(reader.ids)
    assert "&lt;script&gt;alert(&#39;text&#39;)" in html, "the evil document must be shown at all"
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "\u202e" not in html and "\x1b" not in html
    assert "⟨U+202E⟩" in html


def test_the_same_folder_gives_the_same_bytes_and_no_path_of_this_machine(html, whole):
    assert page.render(Corpus(whole)) == html
    assert str(whole.parent) not in html


def test_the_funnel_says_what_funnel_json_says(html, whole):
    funnel = read_json(whole / "corpus/funnel.json")
    words = section(html, "funnel")
    for stage in funnel["stages"]:
        for reason, count in stage["dropped"].items():
            assert f"{reason.replace('_', ' ')} {stage['stage'].replace('_', ' ')} " in words
            assert f" {count['documents']:,} " in words
    kept = sum(source["kept_documents"] for source in funnel["sources"].values())
    read = sum(source["input_documents"] for source in funnel["sources"].values())
    assert f"{read:,} documents" in words and f"{kept:,} (" in words
    assert "What each stage removes of each source" in section(html, "sources")


def test_languages_say_what_was_kept_of_each(html):
    words = section(html, "languages")
    assert re.search(r"fr \d+ [\d.]+ kB [\d.]+ % 0 % 0 B 0 %", words), "French is not allowed"
    assert "zh 1 " in words


def test_rules_show_curves_and_documents_on_both_sides(html):
    words = section(html, "rules-0")
    for text in ("just outside the limit", "just inside the limit", "outside, at random",
                 "inside, at random", "Lower cut-off 200 drops", "What other cut-offs would drop",
                 "2.5 ≤ signals.mean_word_length ≤ 10",
                 "language.lang is one of en, zh, de"):  # fmt: skip
        assert text in words, text
    assert "Rules: code" in html


def test_copies_stand_beside_their_survivor_with_what_differs_marked(html):
    words = section(html, "duplicates")
    assert "the largest cluster has 7 documents" in words
    assert "The 5 copies least like their survivor" in words
    assert "similarity 0.72" in words
    found = re.search(r'<section id="duplicates">.*?</section>', html, re.DOTALL)[0]
    assert re.search(r"<mark>changed\d</mark>", found)


def test_dead_letters_are_counted_by_reason_with_examples(html):
    words = section(html, "dead-letters")
    assert re.search(r"bad json text 9 [\d.]+ % 81 B", words)
    assert "truncated gzip text 1 " in words
    assert "in/<b>.gz" in words and "<script>" in words
    assert "bad json: 5 examples" in words


def test_what_was_not_run_is_said(html):
    for id in ("contamination", "classifiers"):
        assert "Not run yet." in section(html, id)


def test_the_funnel_of_fewer_shards_stays_that_of_all(whole, undrawn):
    one = Corpus(whole, max_shards=1)
    words = Reader(page.render(one)).words
    assert "Counted over 1 of 3 shards" in words
    read = sum(s["input_documents"] for s in one.json("corpus/funnel.json")["sources"].values())
    assert f"{read:,} documents" in words


def test_a_page_of_shards_without_documents(tmp_path, undrawn):
    some = [document for document in sample_documents() if document.source == "code"][:4]
    output = build(tmp_path / "out", some, shards=9)
    assert 0 in Corpus(output).documents.counts
    assert "Rules: code" in Reader(page.render(Corpus(output))).words


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1400])
def test_no_part_of_the_page_is_wider_than_the_window(html, tmp_path, width):
    """In a real browser, everything opened; wide tables scroll inside their own frame."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome to lay the page out with")
    script = (
        "<script>let e = document.documentElement;"
        "document.body.innerText = 'widths ' + e.clientWidth + ' ' + e.scrollWidth</script></body>"
    )
    probe = tmp_path / "probe.html"
    probe.write_text(html.replace("<details>", "<details open>").replace("</body>", script))
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "dump-dom",
             "disable-background-networking", "disable-component-update", "disable-sync",
             f"user-data-dir={tmp_path / 'profile'}", f"window-size={width},900"]  # fmt: skip
    run = subprocess.run(
        [browser, *(f"--{flag}" for flag in flags), probe.as_uri()],
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    seen, needed = map(int, re.search(r"widths (\d+) (\d+)", run.stdout).groups())
    assert width - 20 <= seen and needed <= seen


# --- what else may be there, or not -----------------------------------------------------------


@pytest.mark.parametrize("missing", ["corpus", "attributes/decision", "dead_letters"])
def test_an_unfinished_output_has_a_page(output, missing):
    shutil.rmtree(output / missing)
    words = Reader(page.render(Corpus(output))).words
    assert "Not run yet." in words or missing == "dead_letters"
    assert "languages; en is the largest" in words


def test_nothing_but_documents_is_told_apart_from_nothing(output, tmp_path):
    shutil.rmtree(output / "attributes")
    with pytest.raises(UserError, match="has no attribute 'facts'"):
        Corpus(output)
    with pytest.raises(UserError, match="no complete documents"):
        Corpus(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["corpus/funnel.json", "corpus/samples.json", "attributes/facts/part-00001-of-00003",
             "attributes/decision/part-00000-of-00003", "dead_letters/part-00000-of-00003"],
)  # fmt: skip
def test_a_damaged_file_is_named_and_the_old_page_stays(output, name):
    (path,) = (p for p in (output / name).parent.iterdir()
               if p.name.startswith(Path(name).name) and not p.name.endswith("t.json")
               and not p.name.endswith("zst.json"))  # fmt: skip
    path.write_bytes(path.read_bytes()[:-20] + b"?")
    (output / "inspect.html").write_text("old")
    with pytest.raises(UserError, match=re.escape(path.name)):
        page.build(output)
    assert (output / "inspect.html").read_text() == "old"


def test_attributes_of_another_number_of_documents_are_refused(output):
    name = part_name(0, 3, ".parquet")
    path = output / "attributes/signals" / name
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(UserError, match=rf"{name} has \d+ rows for \d+ documents"):
        page.render(Corpus(output))


def test_a_rule_on_an_attribute_that_went_is_told(output):
    shutil.rmtree(output / "attributes/language")
    with pytest.raises(UserError, match="no attribute 'language', which its rules read"):
        page.render(Corpus(output))


def test_attributes_newer_than_the_decision_are_told(output):
    corpus = Corpus(output)
    write_attribute(output, corpus.documents, "language", {"lang": pa.string()},
                    lambda d: {"lang": "en"})  # fmt: skip
    corpus = Corpus(output)
    assert corpus.outdated() == ["language"]
    words = Reader(page.render(corpus)).words
    assert "The decision is older than the attributes language" in words


def test_contamination_is_shown_by_set(output):
    sample = {"example": "gsm8k#3", "question": "How many apples has Ann of the ten?",
              "answer": "4", "source": "text", "path": "p", "id": "0" * 32,
              "excerpt": "as they ask: how many apples\nhas Ann of the ten? <i>",
              "example_share": 0.5}  # fmt: skip
    write_json(output / "attributes/contamination/report.json", {
        "kind": "contamination", "n": 13, "documents": 1000, "documents_hit": 7,
        "sets": [{"name": "gsm8k", "examples": 50, "examples_hit": 5, "too_short": 1,
                  "documents_hit": 7, "answer_hits": 2, "sources": {"text": 6, "code": 1},
                  "samples": [sample]},
                 {"name": "mmlu", "examples": 9, "examples_hit": 0, "samples": []}],
    })  # fmt: skip
    html = page.render(Corpus(output))
    words = section(html, "contamination")
    assert "gsm8k is hit most: 10 % of its examples" in words
    assert "gsm8k 50 1 5 10 % 7 2 text 6, code 1" in words
    assert "gsm8k#3: 50 % of the example found" in words
    assert re.search(r"<mark> many apples has Ann of the ten\?\s*</mark>", html)
    assert "<i>" not in html


def test_classifiers_show_their_curves(output, tmp_path):
    curve = {"threshold": [0.9, 0.5, 0.1], "precision": [1.0, 0.8, 0.4], "recall": [0.2, 0.7, 1.0]}
    at = {"precision": 0.8, "recall": 0.7, "flagged_share": 0.3, "f1": 0.75}
    folder = tmp_path / "toxicity"
    write_json(folder / "result.json", {
        "cutoff": {"rule": "largest F1", "threshold": 0.5, "test": at, "validation": at},
        "test": {"texts": 40, "auc": 0.91, "curve": curve},
        "validation": {"texts": 41, "auc": 0.92, "curve": curve},
    })  # fmt: skip
    words = section(page.render(Corpus(output), {"spam": str(folder)}), "classifiers")
    assert "spam on test texts: precision 80 %, recall 70 %" in words
    assert "cut-off 0.5, largest F1" in words
    manifest = read_json(output / "corpus/manifest.json")
    manifest["settings"]["web_text"] = {"classifiers": {"toxicity": str(folder), "gone": "/no"}}
    write_json(output / "corpus/manifest.json", manifest)
    assert "toxicity on test texts" in section(page.render(Corpus(output)), "classifiers")


def test_grades_of_code_stand_beside_those_of_the_report(output):
    found = Corpus(output)
    assert "Grades of code" not in section(page.render(found), "sources")
    grades = {"high": (1, 168), "moderate": (6, 600), "low": (3, 232)}
    shards = [
        {
            "grades": {
                name: {"files": n * times, "bytes": b * times} for name, (n, b) in grades.items()
            }
        }
        for times in (1, 2)
    ]
    cuts = {"go": {"low": 0.1, "high": 0.9, "scorer": "model"}}
    found.attributes = {**found.attributes, "grade": {"shards": shards, "cuts": cuts}}
    words = section(page.render(found), "sources")
    for row in (
        "high 3 504 B 16.8 % 16.8 % 2 times", "moderate 18 1.80 kB 60 % 69.9 % once",
        "low 9 696 B 23.2 % 13.3 % dropped", "by a model in go, by rules elsewhere",
    ):  # fmt: skip
        assert row in words


def test_tokens_are_shown_when_there_are_any(output):
    row = {"documents": 3, "tokens": 1000, "bytes": 3500}
    write_json(
        output / "tokens/manifest.json", {"kind": "tokens", "splits": {"train": {"text": row}}}
    )
    assert "text, train 3 1,000 3.50" in section(page.render(Corpus(output)), "sources")
