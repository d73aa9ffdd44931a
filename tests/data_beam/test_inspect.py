"""The page about a corpus and the history of a document say what the files say, and nothing in a
document can harm who looks at it."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inspect_corpus import RULES, build, doc, write_attribute

from data_beam import tables
from data_beam.inspect import diff, page, scan, show
from data_beam.inspect.corpus import Corpus, Place
from data_beam.inspect.history import history
from data_beam.mix.rules import Rule, merged, to_json
from data_beam.schema import DeadLetter, Document
from data_beam.stage import Output, part_name
from internlm2_jax.errors import UserError
from internlm2_jax.files import read_json, write_json
from internlm2_jax.report import svg

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('text')</script> <b>&amp; \u202e\x1b[31m\n"
VOID = {"meta", "br", "path", "use", "rect"}


def documents() -> list[Document]:
    """The project's own sources as code, their docstrings as text, in paragraphs of many sizes."""
    found = []
    for path in sorted((ROOT / "internlm2_jax").rglob("*.py"))[:60]:
        text = path.read_text("utf-8")
        name = path.relative_to(ROOT).as_posix()
        found.append(doc(text, "code", path=name, lang="python", repo="internlm2_jax"))
        for number, part in enumerate(re.findall(r'"""(.*?)"""', text, re.DOTALL)):
            if len(part) > 60:
                lang = "en" if number % 7 else "fr"
                found.append(doc(part + "\n", "text", path=f"{name}/{number}", lang=lang))
    found.append(doc(EVIL * 20, "text", path="<img src=x onerror=alert(1)>\nfake line", lang="en"))
    found.append(doc("x = 1\n" * 99, "code", path="repeated.py", lang="python"))
    found.append(doc("春眠不覺曉，處處聞啼鳥。\n" * 30, "poems", path="poem", lang="zh"))
    return list({document.id: document for document in found}.values())


def copies(found: list[Document]):
    """Near copies of two texts with known similarities, an exact one, and a copy of a copy."""
    rng = random.Random(0)
    originals = [d for d in found if d.source == "text" and d.lang == "en" and len(d.text) > 400]
    exact, near, extra = {}, {}, []
    for number, original in enumerate(originals[:12]):
        for version in range(6 if number == 0 else 1):
            words = original.text.split(" ")
            words[rng.randrange(len(words))] = f"changed{version}"
            copy = doc(" ".join(words), "text", path=f"{original.path}.copy{version}", lang="en")
            extra.append(copy)
            near[copy.id] = (original.id, 0.7 + 0.02 * len(extra))
    again = doc(extra[0].text, "text", path="again", lang="en")
    exact[again.id] = extra[0].id
    return [*extra, again], exact, near


LETTERS = [
    *(DeadLetter(f"in/a.jsonl#{n}", "bad_json", "text", "line ends early", 9) for n in range(9)),
    DeadLetter("in/<b>.gz", "truncated_gzip", "text", "ends early", 77, "\x1f\x8b<script>"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    found = documents()
    extra, exact, near = copies(found)
    output = tmp_path_factory.mktemp("inspect") / "out"
    return build(output, [*found, *extra], exact=exact, near=near, letters=LETTERS)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is read: no picture is drawn."""
    monkeypatch.setattr(svg, "_svg", lambda draw, width, height, alt: "")


@pytest.fixture
def output(whole: Path, tmp_path: Path, undrawn) -> Path:
    """A folder of the test's own."""
    return shutil.copytree(whole, tmp_path / "out")


@pytest.fixture(scope="module")
def html(whole: Path, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert page.build(whole, path) == str(path)
    return path.read_text("utf-8")


class Reader(HTMLParser):
    """Checks that tags nest; collects ids, links, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def section(html: str, id: str) -> str:
    found = re.search(rf'<section id="{id}">.*?</section>', html, re.DOTALL)
    return Reader(found[0]).words


# --- the page ---------------------------------------------------------------------------------


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
    links = [some[k] for _, some in reader.tags for k in ("href", "src") if k in some]
    assert all(link.startswith("#") for link in links)
    ids = [some["id"] for _, some in reader.tags if "id" in some]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
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


# --- counting ---------------------------------------------------------------------------------


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


def test_fewer_shards_are_a_sample_and_the_funnel_stays_that_of_all(whole, undrawn):
    one = Corpus(whole, max_shards=1)
    result = scan.scan(one)
    assert result.documents == one.documents.counts[one.shards[0]]
    words = Reader(page.render(one)).words
    assert "Counted over 1 of 3 shards" in words
    read = sum(s["input_documents"] for s in one.json("corpus/funnel.json")["sources"].values())
    assert f"{read:,} documents" in words
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


def test_a_page_of_shards_without_documents(tmp_path, undrawn):
    some = [document for document in documents() if document.source == "code"][:4]
    output = build(tmp_path / "out", some, shards=9)
    assert 0 in Corpus(output).documents.counts
    assert "Rules: code" in Reader(page.render(Corpus(output))).words


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


# --- history ----------------------------------------------------------------------------------


def ids_by_reason(output: Path) -> dict[str | None, list[tuple[str, str | None]]]:
    found: dict[str | None, list[tuple[str, str | None]]] = {}
    for shard in range(3):
        for row in tables.read_attribute(output, "decision", shard).to_pylist():
            found.setdefault(row["reason"], []).append((row["id"], row["of_id"]))
    return found


def test_every_document_has_a_history_that_ends_where_it_is(whole):
    """Kept ones are in the file that is named, dropped ones tell reason, value and limit."""
    from data_beam.io import writers

    for reason, some in ids_by_reason(whole).items():
        id, of_id = some[0]
        text = "\n".join(history(whole, id))
        assert text.startswith(f"document {id}\n")
        if reason is None:
            name, row = re.search(r"  corpus      (corpus/\S+), record ([\d,]+)", text).groups()
            (record,) = writers.read_array_record(whole / name, int(row), int(row) + 1)
            assert Document.from_bytes(record).id == id
            assert "kept: breaks none of the" in text
        else:
            assert f" for {reason}: " in text
        if of_id:
            assert re.search(rf"  copy of     {of_id}  \S+", text)
            assert f"    {id}  " in "\n".join(history(whole, of_id)), "the survivor knows its copy"
    short = ids_by_reason(whole)["too_short"][0][0]
    assert re.search(r"signals.num_chars is \d+, below the minimum of 200",
                     "\n".join(history(whole, short)))  # fmt: skip


def test_a_copy_of_a_copy_leads_to_the_survivor(whole):
    lines = history(whole, "again")
    (first, second) = (line for line in lines if line.startswith("  copy of"))
    assert "itself dropped for near_duplicate" in first and "(kept" in second


def test_documents_are_found_by_prefix_path_and_part_of_it(whole):
    corpus = Corpus(whole)
    document = corpus.read([Place(1, 0)])[Place(1, 0)]
    for query in (document.id, document.id[:16], document.id[:20].upper(), document.path):
        assert history(whole, query)[0] == f"document {document.id}"
    lines = history(whole, "internlm2_jax/data/")
    assert sum(line.startswith("document ") for line in lines) == 5
    assert any("more documents match" in line for line in lines)
    assert history(whole, "poem")[0].startswith("document ")


def test_dead_letters_are_found_by_their_place(whole):
    lines = history(whole, "in/<b>.gz")
    assert lines[0] == "dead letter in/<b>.gz"
    assert "  reason      truncated_gzip: ends early" in lines


def test_unknown_names_are_told(whole):
    for query in ("0" * 32, "nowhere/at/all", "abcd" * 4):
        with pytest.raises(UserError, match="knows nothing of"):
            history(whole, query)
    with pytest.raises(UserError, match="empty name"):
        history(whole, "")


def test_no_document_can_forge_a_line_or_move_the_cursor(whole):
    lines = history(whole, "<img src=x")
    assert not [line for line in lines if "\n" in line or "\x1b" in line or "\u202e" in line]
    assert any("onerror=alert(1)>␊fake line" in line for line in lines)


def test_what_was_cut_out_is_told(tmp_path):
    from data_beam.mix import funnel, write

    long = [document for document in documents() if len(document.text) > 400]
    output = build(tmp_path / "out", long[:30])
    corpus = Corpus(output)
    write_attribute(output, corpus.documents, "cuts", {"removed": pa.list_(pa.int32())},
                    lambda d: {"removed": [0, 10]})  # fmt: skip
    funnel.finish(output, RULES, write.Mix(edits=("cuts.removed",)))
    id = ids_by_reason(output)[None][0][0]
    assert re.search(r"edited      10 of [\d,]+ characters cut out", "\n".join(history(output, id)))


# --- comparing --------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["a", "b", "cat", " ", "  ", ",", "的", "一"]), max_size=40)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_marks_are_what_differs_and_the_rest_is_equal(left, right):
    codes = diff._opcodes(left, right)
    assert [w for tag, a, b, _, _ in codes for w in left[a:b]] == left
    assert [w for tag, _, _, a, b in codes for w in right[a:b]] == right
    for tag, a, b, c, d in codes:
        assert (tag == "equal") == (left[a:b] == right[c:d]) or a == b or c == d


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["one", "two", "", "three three"]), max_size=12),
       st.lists(st.sampled_from(["one", "two", "", "three 3"]), max_size=12))  # fmt: skip
def test_every_line_is_shown_once_or_counted(left, right):
    rows = diff.compare("\n".join(left), "\n".join(right), max_rows=99)
    if left == right or "\n".join(left) == "\n".join(right):
        assert len(rows) == 1 and "same" in rows[0].skipped
        return
    for side, lines in (("left", left), ("right", right)):
        shown = 0
        for row in rows:
            if row.same is not None:
                shown += 1
            elif row.skipped:
                shown += int(row.skipped.split()[0])
            else:
                shown += bool(getattr(row, side))
        assert shown == max(len(lines), 1)


def test_comparing_never_takes_long():
    """Lines of two words repeated, which take difflib minutes."""
    import time

    start = time.process_time()
    diff.compare("a b " * 500, "b c " * 500)
    diff.compare("a\n" * 30_000, "b\na\n" * 15_000)
    assert time.process_time() - start < 5
    (row,) = diff.compare("a b " * 100 + "x", "a b " * 50 + "c " + "a b " * 50 + "x")
    assert "".join(p.text for p in row.right if p.changed).strip() == "c"


@given(st.lists(st.permutations(["read", "language", "filter", "near", "safe"]), max_size=4),
       st.integers(0, 5))  # fmt: skip
def test_one_order_of_stages_agrees_with_all(orders, seed):
    base = ["read", "language", "filter", "near", "safe"]
    rng = random.Random(seed)
    parts = [[name for name in base if rng.random() < 0.6] for _ in orders]
    order = merged(parts)
    assert sorted(order) == sorted({name for part in parts for name in part})
    for part in parts:
        assert [name for name in order if name in part] == part
    assert sorted(merged(orders)) == sorted({name for some in orders for name in some})


def test_invisible_signs_are_made_visible():
    assert show.visible("a\x00b\u202ec\ud800\td\n") == "a⟨U+0000⟩b⟨U+202E⟩c⟨U+D800⟩\td\n"
