"""Planted copies of evaluation examples are found in every dress, clean text is left alone, and the
report says what was found where."""

from __future__ import annotations

import csv
import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_beam.attributes.base import Examined
from data_beam.attributes.contamination import Contamination
from data_beam.contamination import benchmarks, common, index, report
from data_beam.contamination.words import words_of
from data_beam.io import storage, writers
from data_beam.kernels.tokens import tokenize
from data_beam.pipelines import annotate, decontaminate
from data_beam.schema import Document
from data_beam.stage import Output
from internlm2_jax.errors import UserError

EGGS = (
    "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes "
    "muffins for her friends every day with four. How much does she make at the farmers' market?"
)
POINT = (
    "Convert the point $(0,3)$ in rectangular coordinates to polar coordinates. Enter your answer "
    "in the form $\\left(r,\\theta\\right),$ with $r > 0$ and $0 \\le \\theta < \\dfrac{2\\pi}{1}.$"
)
CODE = (
    "def has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
    '    """ Check if in given list of numbers, are any two numbers closer to each other than\n'
    '    given threshold."""\n'
)
CHINESE = (
    "小明有十六个苹果，他每天早上吃三个，下午送给朋友四个，剩下的拿到集市上去卖，一共卖了多少元？"
)
SHORT = "Why do veins appear blue?"  # five words: too few to count without the answer
SHORT_ANSWER = "Because blue light does not penetrate deeply"
FILLER = "The committee met again on a grey morning and spoke at length about the new bridge. " * 6


def examined(text: str) -> Examined:
    return Examined(Document("0" * 32, text, "text"))


def make_index(path, *texts: tuple[str, str], **settings) -> str:
    rows = [
        benchmarks.Example(f"mine#{n}", (q,), (a,) if a else ()) for n, (q, a) in enumerate(texts)
    ]
    index.build([benchmarks.EvaluationSet("mine", rows, 0)], path, **settings)
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "small.index"
    examples = [
        (EGGS, "16 - 3 - 4 = <<16-3-4=9>>9\n#### 18"), (POINT, "\\boxed{(3, \\frac{\\pi}{2})}"),
        (CODE, ""), (CHINESE, "18"), (SHORT, SHORT_ANSWER),
    ]  # fmt: skip
    return Contamination.of(make_index(path, *examples))


def look(attribute: Contamination, text: str) -> dict:
    columns = attribute.compute([examined(text)])
    assert set(columns) == set(attribute.schema.names)
    return {name: values[0] for name, values in columns.items()}


# --- what is found -----------------------------------------------------------------------------


def test_underscores_and_commands_of_layout_are_no_words():
    plain = words_of("the frac pi 2 close elements x 1 of word").hashes
    dressed = words_of(
        "_the_ $\\left(\\dfrac{\\pi}{2}\\right)$ close_elements x_{1}\\quad of **WORD**"
    )
    assert dressed.hashes.tolist() == plain.tolist()
    assert len(words_of("left right quad").hashes) == 3


DRESSES = {
    "verbatim": lambda text: text,
    "upper case": str.upper,
    "white space": lambda text: "\n   ".join(text.split()),
    "one line": lambda text: " ".join(text.split()),
    "straight quotes": lambda text: text.replace("’", "'"),
    "markdown": lambda text: "> **Problem.** _" + text.replace(" day", " *day*") + "_",
    "latex": lambda text: (
        text.replace("\\left", "").replace("\\right", "").replace("dfrac", "frac")
    ),
    "latex spacing": lambda text: text.replace("$", " $ ").replace("\\theta", "\\, {\\theta}\\;"),
    "json": lambda text: json.dumps({"question": text}),
    "json unicode": lambda text: json.dumps({"question": text}, ensure_ascii=False),
    "no punctuation": lambda text: text.replace(",", "").replace("，", " "),
}


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("number", range(4))
def test_copies_are_found_in_every_dress(small, number, dress):
    question = (EGGS, POINT, CODE, CHINESE)[number]
    found = look(small, f"{FILLER}\n\n{DRESSES[dress](question)}\n\n{FILLER}")
    assert found["matched_ngrams"] > 0 and found["set"] == "mine"
    if dress != "json" or number < 2:  # Chinese in \\u escapes comes in pieces, code in lines
        assert found["examples"] == [f"mine#{number}"] and found["num_examples"] == 1
    assert found["example_share"] > (0.3 if "json" in dress else 0.7)


def test_what_is_said_of_a_match(small, tmp_path):
    half = " ".join(EGGS.split()[:16])
    assert look(small, half)["example_share"] < 0.3
    found = look(small, f"{FILLER} {EGGS} We see that the answer is $18.00 indeed. {FILLER}")
    words_in_question = len(tokenize(EGGS).hashes)
    assert found["longest_run"] == words_in_question
    assert found["matched_ngrams"] == words_in_question - 12
    assert found["covered"] == pytest.approx(
        words_in_question / (words_in_question + 8 + len(tokenize(FILLER * 2).hashes) + 1)
    )
    assert found["answer_hit"] and found["example_share"] == 1
    assert not look(small, f"{EGGS} It is 118, not 1.8, nor 18,000.")["answer_hit"]
    solution = (
        "She has 16 - 3 - 4 = 9 eggs left and sells each for 2 dollars, so she makes 2 * 9 = 18"
    )
    with_solution = Contamination.of(make_index(tmp_path / "i", (EGGS, f"{solution}\n#### 18")))
    for text in (f"{EGGS} {solution}", solution, f"{EGGS} {FILLER * 20} {solution}"):
        assert look(with_solution, text)["answer_hit"]
    assert not look(with_solution, solution[:-10])["answer_hit"]
    assert look(small, f"{POINT} so $\\left(3,\\tfrac{{\\pi}}2\\right)$.")["answer_hit"]
    two = look(small, f"{EGGS} {CODE}")
    assert sorted(two["examples"]) == ["mine#0", "mine#2"]


def test_short_questions_need_their_answer(small):
    assert look(small, f"{FILLER} {SHORT} {FILLER}")["matched_ngrams"] == 0
    assert look(small, f"{SHORT_ANSWER}. {FILLER}")["matched_ngrams"] == 0
    found = look(small, f"{FILLER} {SHORT.upper()} A: {SHORT_ANSWER}. {FILLER}")
    assert (found["matched_ngrams"], found["answer_hit"]) == (1, True)
    assert found["examples"] == ["mine#4"] and found["ngrams"] == []


def test_a_question_between_8_and_12_words_is_one_run(tmp_path):
    question = "How many moons circle the planet beyond Uranus in 2024?"
    attribute = Contamination.of(make_index(tmp_path / "i", (question, ""), ("What is 2+2?", "4")))
    assert look(attribute, f"{FILLER}{question}")["longest_run"] == 10
    assert look(attribute, "How many moons circle the planet in 2024?")["matched_ngrams"] == 0
    assert look(attribute, "What is 2+2? 4")["matched_ngrams"] == 0


def test_clean_text_is_left_alone(small):
    columns = small.compute(
        [examined(text) for text in ("", "word", FILLER, FILLER * 50, "中文" * 99)]
    )
    assert columns["matched_ngrams"] == [0] * 5
    assert columns["answer_hit"] == [False] * 5 and columns["removed"] == [None] * 5


def test_a_count_is_no_evidence(tmp_path):
    question = "Add the numbers 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 and say the sum"
    attribute = Contamination.of(make_index(tmp_path / "i", (question, "")))
    assert look(attribute, "; ".join(map(str, range(30))))["matched_ngrams"] == 0
    assert look(attribute, question)["matched_ngrams"] > 0


@pytest.mark.parametrize("prefix", ["", "İİİİ "])  # a capital whose small letter is two characters
def test_what_is_cut_takes_the_match_with_it(small, prefix):
    filler = prefix + FILLER * 3
    text = f"{filler}{EGGS}{filler}{POINT}{filler}"
    found = look(small, text)
    spans = np.array(found["removed"]).reshape(-1, 2)
    assert found["num_spans"] == len(spans) == 2
    for (start, end), question in zip(spans, (EGGS, POINT), strict=True):
        at = text.index(question)
        # The full stop at the end is no part of the last word.
        assert start == at - 200 and abs(end - (at + len(question) + 200)) <= 3
    rest = "".join(
        text[a:b] for a, b in zip([0, *spans[:, 1]], [*spans[:, 0], len(text)], strict=True)
    )
    assert look(small, rest)["matched_ngrams"] == 0
    # Rests of less than 200 characters go as well.
    short = f"{filler[:390]}{EGGS}{filler[:590]}{POINT}{filler[:390]}"
    assert look(small, short)["removed"] == [0, len(short)]


def test_documents_of_a_batch_do_not_touch(small):
    texts = [EGGS, FILLER, f"{EGGS} {POINT}", SHORT]
    together = small.compute([examined(text) for text in texts])
    for number, text in enumerate(texts):
        assert {name: values[number] for name, values in together.items()} == look(small, text)


def test_columns_fit_the_schema(small):
    columns = small.compute([examined(text) for text in (EGGS, FILLER, SHORT)])
    table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in small.schema})
    assert table.num_rows == 3 and table["ngrams"].to_pylist()[0]


# --- real sets ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    names = {
        "gsm8k": "gsm8k/test.jsonl", "math500": "math500", "humaneval": "humaneval",
        "truthfulqa": "truthfulqa", "ifeval": "ifeval", "mmlu": "mmlu/dev", "mt_bench": "mt_bench",
    }  # fmt: skip
    sets = [
        benchmarks.read(benchmarks.parse(f"{name}={shared}/data/{path}"))
        for name, path in names.items()
    ]
    path = tmp_path_factory.mktemp("real") / "real.index"
    return sets, index.build(sets, path), Contamination.of(str(path))


def test_published_sets_are_read_and_found(real):
    sets, built, attribute = real
    for some, row in zip(sets, built["sets"], strict=True):
        assert row["indexed"] > 0.9 * row["examples"] > 0 and not row["unusable"]
        rng = random.Random(some.name)
        for example in rng.sample(some.examples, 20):
            lines = example.questions[0].replace("  ", " ").splitlines()
            text = FILLER + "\n> ".join(lines) + " " + " ".join(example.answers) + FILLER
            if sum(len(words_of(t).hashes) for t in (example.questions[0], *example.answers)) > 20:
                assert example.id in (look(attribute, text)["examples"] or []), example
    answers = {s.name: s.examples[0].answers for s in sets}
    assert index.final_answer(answers["gsm8k"][0]) == "18"
    assert index.final_answer(answers["math500"][1]) == "\\left( 3, \\frac{\\pi}{2} \\right)"
    assert answers["mmlu"] == ("1",)  # the text of choice B


def test_real_clean_text_is_left_alone(real, shared):
    attribute = real[2]
    shakespeare = (shared / "data" / "tinyshakespeare" / "input.txt").read_text()
    poems = (shared / "data" / "chinese_poetry" / "guwenguanzhi.json").read_text()
    size = 20_000
    texts = [t[i : i + size] for t in (shakespeare, poems) for i in range(0, len(t), size)]
    flagged = [t for t in texts if look(attribute, t)["matched_ngrams"]]
    assert len(texts) > 60 and not flagged


# --- reading evaluation sets -------------------------------------------------------------------


def test_every_format_gives_the_same(tmp_path):
    rows = [{"Question": f"Number {i}?", "answer": str(i), "note": "x"} for i in range(3)]
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": rows}))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"f.{suffix}", "w", newline="", encoding="utf-8-sig") as handle:
            writer = csv.DictWriter(handle, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json", "e.parquet", "f.csv", "f.tsv"):
        examples = benchmarks.read(benchmarks.parse(f"s={tmp_path / name}")).examples
        assert examples[2] == benchmarks.Example("s#2", ("Number 2?",), ("2",)), name
    folder = benchmarks.read(benchmarks.parse(f"s={tmp_path}"))
    assert len(folder.examples) == 21 and folder.examples[-1].id == "s/f.tsv#2"
    chosen = benchmarks.read(benchmarks.parse(f"s={tmp_path / 'a.jsonl'}:note,answer"))
    assert chosen.examples[1] == benchmarks.Example("s#1", ("x",), ("1",))


def test_choices_and_turns(tmp_path):
    rows = [
        {"question": "Q", "choices": ["red", "green"], "answer": 1},
        {"question": "Q", "choices": {"text": ["red", "green"]}, "answerKey": "A"},
        {"turns": ["first", {"content": "second"}]},
        {"other": "no question"},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "m.csv").write_text('"Is it, then?",yes,no,maybe,so,C\nAnd?,1,2,3,4,A\n')
    found = benchmarks.read(benchmarks.parse(f"x={tmp_path / 'x.jsonl'}"))
    assert [e.answers for e in found.examples] == [("green",), ("red",), ()]
    assert found.examples[2].questions == ("first", "second") and found.unusable == 1
    mmlu = benchmarks.read(benchmarks.parse(f"m={tmp_path / 'm.csv'}"))
    assert mmlu.examples[0] == benchmarks.Example("m#0", ("Is it, then?",), ("maybe",))


def test_bad_sets_are_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n{oops\n')
    (tmp_path / "none.jsonl").write_text('{"title": "a"}\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1nothing")
    (tmp_path / "bad.json").write_text("[1, 2]")
    (tmp_path / "SOURCE.txt").write_text("x")
    cases = {
        "gsm8k": "is not NAME=PATH", "a b=x": "is not NAME=PATH",
        f"s={tmp_path}/absent": "check the path", f"s={tmp_path}/SOURCE.txt": "check the path",
        f"s={tmp_path}/bad.jsonl": "bad.jsonl:2 is not valid JSON",
        f"s={tmp_path}/none.jsonl": "name the fields",
        f"s={tmp_path}/bad.parquet": "cannot be read",
        f"s={tmp_path}/bad.json": "no list of JSON objects",
        f"s={tmp_path}/none.jsonl:body": "has a field 'body'; they have title",
    }  # fmt: skip
    for text, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            benchmarks.read(benchmarks.parse(text))
        assert "\n" not in str(error.value)
    assert benchmarks.parse("a=gs://b/x.jsonl").fields == ()
    assert benchmarks.parse("a=gs://b/x.jsonl:q,answer").fields == ("q", "answer")


def test_the_index_is_one_file_of_equal_bytes(tmp_path):
    first, second = (make_index(tmp_path / n, (EGGS, "18"), (CODE, "")) for n in ("a", "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Contamination.of(first).digest == Contamination.of(second).digest
    only = make_index(tmp_path / "c", (SHORT, "x " * 40 + EGGS), answers=False)
    assert look(Contamination.of(only), EGGS)["matched_ngrams"] == 0


def test_bad_indices_are_one_line(tmp_path, monkeypatch):
    path = make_index(tmp_path / "a", (EGGS, "18"))
    whole = (tmp_path / "a").read_bytes()
    attribute = Contamination.of(path)
    for content, message in ((whole[:100], "is not a contamination index"), (b"", "is not a cont")):
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(UserError, match=message):
            Contamination.of(str(tmp_path / "b")).setup()
    with pytest.raises(UserError, match="is not the index that the job began with"):
        Contamination(path, "0" * 32).setup()
    monkeypatch.setattr(index, "_words_probe", lambda: "other")
    with pytest.raises(UserError, match="another version of this program; build it again"):
        index.load.__wrapped__(path, attribute.digest)
    with pytest.raises(UserError, match="names of their own"):
        index.build([benchmarks.EvaluationSet("a", [], 0)] * 2, tmp_path / "c")


# --- in a corpus -------------------------------------------------------------------------------


def write_documents(output, shards: list[list[Document]]) -> None:
    target = Output(str(output / "documents"), "documents", ".arrayrecord", ("k",) * len(shards))
    for number, documents in enumerate(shards):
        records = [document.to_bytes() for document in documents]
        with storage.whole(target.path(number)) as path:
            writers.write_array_record(path, records, writers.DOCUMENTS_OPTIONS)
        target.finish(number, len(records), bytes=sum(d.num_bytes for d in documents))
    target.complete({}, {})


@pytest.fixture
def corpus(tmp_path):
    texts = [f"{FILLER} {n}" for n in range(20)]
    texts[3] = f"{FILLER} {EGGS} The answer is 18."
    texts[7] = f"{POINT} {FILLER}"
    texts[11] = f"{FILLER} " + " ".join(EGGS.split()[:20])
    documents = [
        Document(f"{n:032x}", text, "web" if n % 2 else "books", url=f"http://x/{n}")
        for n, text in enumerate(texts)
    ]
    write_documents(tmp_path, [documents[0::2], documents[1::2], []])
    return tmp_path


def test_report(corpus):
    path = make_index(corpus / "i", (EGGS, "#### 18"), (POINT, ""), (CODE, ""), ("What?", ""))
    annotate.run(corpus, [Contamination.of(path)])
    found = report.write(corpus, samples=1)
    assert found == storage.read_json(corpus / "attributes" / "contamination" / "report.json")
    assert (found["documents"], found["documents_hit"], found["n"]) == (20, 3, 13)
    (row,) = found["sets"]
    assert {key: row[key] for key in row if key != "samples"} == {
        "name": "mine", "examples": 4, "indexed": 3, "too_short": 1, "unusable": 0,
        "examples_hit": 2, "documents_hit": 3, "answer_hits": 1, "sources": {"web": 3},
    }  # fmt: skip
    (sample,) = row["samples"]
    assert sample["example_share"] == 1 and sample["question"] == EGGS
    assert (sample["id"], sample["url"]) == (f"{3:032x}", "http://x/3")
    assert EGGS in sample["excerpt"] and sample["excerpt"].index(EGGS) == 200
    lines = writers.read_lines_zst(corpus / "attributes/contamination/examples.jsonl.zst")
    assert [json.loads(line) for line in lines] == [
        {"example": "mine#0", "documents": [f"{3:032x}", f"{11:032x}"]},
        {"example": "mine#1", "documents": [f"{7:032x}"]},
    ]


def test_common_runs_can_be_ignored(corpus):
    path = make_index(corpus / "i", (EGGS, "#### 18"), (POINT, ""))
    annotate.run(corpus, [Contamination.of(path)])
    few = common.write(corpus, corpus / "common.json", more_than=1)
    assert len(few["ngrams"]) == 20 + 1 - 12 and set(few["documents"]) == {2}  # "Janet’s" is two
    again = Contamination.of(path, ignore=str(corpus / "common.json"))
    assert look(again, " ".join(EGGS.split()[:20]))["matched_ngrams"] == 0
    assert look(again, EGGS)["matched_ngrams"] == len(tokenize(EGGS).hashes) - 12 - 9
    annotate.run(corpus, [again])
    with pytest.raises(UserError, match="annotate it without first"):
        common.write(corpus, corpus / "twice.json", more_than=1)
    other = make_index(corpus / "j", (POINT, ""))
    with pytest.raises(UserError, match="counted with another index"):
        Contamination.of(other, ignore=str(corpus / "common.json")).setup()


def test_the_pipeline_ignores_what_is_common(tmp_path, monkeypatch):
    """A sentence of the set that stands in every document says nothing; a whole question does."""
    template = " ".join(EGGS.split()[:16])
    rows = [{"text": f"{FILLER} {template} {n}", "source": "web"} for n in range(6)]
    rows += [{"text": text, "source": "web"} for text in (f"{FILLER} {POINT}", FILLER)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "set.jsonl").write_text(
        "\n".join(json.dumps({"question": q}) for q in (EGGS, POINT))
    )
    arguments = ([str(tmp_path / "in.jsonl")], tmp_path / "out")
    sets = (f"mine={tmp_path / 'set.jsonl'}",)

    def kept(**settings) -> int:
        done = decontaminate.run(*arguments, decontaminate.Decontaminate(sets, **settings))
        return done["sources"]["web"]["kept_documents"]

    assert kept() == 1
    assert kept(ignore_common=3) == 7
    assert kept(ignore_common=6) == 1  # in six documents, not in more than six
    assert kept(ignore_common=3) == 7
    monkeypatch.setattr(common, "write", None)  # is not counted again
    assert kept(ignore_common=3) == 7
    with pytest.raises(UserError, match="ignore_common is -1"):
        decontaminate.Decontaminate(sets, ignore_common=-1)
