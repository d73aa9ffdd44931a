"""Every suite on broken data: what is wrong is one line with file and line, never a traceback."""

from __future__ import annotations

import copy
import csv
import io
import json

import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.evals import formats, items, prompts, suites
from internlm2_jax.evals.formats import FORMATS
from internlm2_jax.evals.rows import Row

KNOWN = {name: suite for name, suite in suites.built_in().items() if suite.format != "ruler"}
JUNK = (None, True, 7, -1, 2.5, "", "?", [], ["x"], [None], [["x"]], {}, {"x": 1}, [{}], [7, "x"])

CHOICES = {"question": "q", "A": "one", "B": "two", "C": "three", "D": "four", "answer": "B"}
CHINESE = {"": "0", "Question": "q", "A": "one", "B": "two", "C": "3", "D": "4", "Answer": "B"}
LSAT = {"passage": "p", "question": "q", "options": ["(A)x", "(B)y"], "label": "B"}
EXAM = {"index": 0, "question": "q", "answer": ["A"], "score": 6}
ARTICLE = {
    "id": "h1",
    "article": "t",
    "questions": ["q"],
    "options": [["x", "y"]],
    "answers": ["B"],
}
MT = {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["r"]}
LONG = {
    "_id": "1",
    "input": "q",
    "context": "c",
    "answers": ["a"],
    "all_classes": ["a"],
    "length": 3,
}
CALL = {
    "origin_prompt": [{"role": "user", "content": "go"}],
    "ground_truth": {"action": "f", "args": {"x": 1}},
    "template": {"thought": "t", "action": "name", "args": "args"},
    "meta_data": {"response_format": "json"},
}
CELLS = [
    {"cell_type": "markdown", "source": ["Add"]},
    {"cell_type": "code", "source": ["2+2"], "outputs": [{"data": {"text/plain": ["4"]}}]},
]
RULES = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
EVAL = {"task_id": "H/0", "prompt": "def f():\n", "test": "def check(c): pass",
        "entry_point": "f", "canonical_solution": " return 1"}  # fmt: skip
MBPP = {"task_id": 11, "text": "t", "code": "def f(): pass", "test_list": ["assert f() is None"],
        "test_setup_code": ""}  # fmt: skip
PANDA = {"idx": 0, "instruction": "i", "input": "", "response1": "a", "response2": "b",
         "annotator1": 1, "annotator2": 1, "annotator3": 2}  # fmt: skip

# Suite -> a file's name, a good row of it, and the fields without which it is none.
ROWS = {
    "mmlu": ("test/x_test.csv", CHOICES, "question A B C D answer"),
    "cmmlu": ("test/x.csv", CHINESE, "Question A B C D Answer"),
    "ceval": ("val/x_val.csv", {"id": "0", **CHOICES}, "question A B C D answer"),
    "agieval": ("v1/x.jsonl", LSAT, "question options label"),
    "gaokao": ("Multiple-choice_Questions/x.json", EXAM, "question answer"),
    "triviaqa": ("dev.jsonl", {"id": "1", "question": "q",
                               "answer": {"value": "a", "aliases": ["a"]}}, "question answer"),
    "natural_questions": ("NQ-open.dev.jsonl", {"id": 1, "question": "q", "answer": ["a"]},
                          "question answer"),
    "c3": ("c3-d-test.json",
           [["l"], [{"question": "q", "choice": ["x", "y"], "answer": "y"}], "d1"], ""),
    "race": ("x.jsonl", ARTICLE, "article questions options answers"),
    "race_rows": ("x.jsonl", {"example_id": "h1", "article": "t", "question": "q",
                              "options": ["x", "y"], "answer": "B"},
                  "question options answer"),
    "hellaswag": ("hellaswag_val.jsonl",
                  {"ind": 1, "ctx": "c", "endings": ["x", "y"], "label": "1"},
                  "ctx endings label"),
    "gsm8k": ("test.jsonl", {"question": "q", "answer": "1 #### 1"}, "question answer"),
    "math": ("test.jsonl", {"unique_id": "a/1", "problem": "q", "solution": "s \\boxed{1}",
                            "answer": "1"}, "problem solution"),
    "theoremqa": ("theoremqa_test.json", {"id": "1", "Question": "q", "Answer": "2"},
                  "Question Answer"),
    "bbh": ("bbh/x.json", {"input": "q", "target": "a"}, "input target"),
    "humaneval": ("HumanEval.jsonl", EVAL, "prompt test entry_point"),
    "humaneval_chat": ("HumanEval.jsonl", EVAL, "prompt test entry_point"),
    "mbpp": ("mbpp.jsonl", MBPP, "task_id text code test_list"),
    "leval_exam": ("Exam/x.jsonl", {"input": "t", "instructions": ["a?"], "outputs": ["A"]},
                   "input instructions outputs"),
    "leval_generation": ("Generation/x.jsonl",
                         {"input": "t", "instructions": ["a?"], "outputs": ["A"]},
                         "input instructions outputs"),
    "longbench": ("data/trec.jsonl", LONG, "input answers"),
    "teval_instruct": ("instruct_v2.json", CALL, "origin_prompt ground_truth template"),
    "cibench": ("x.ipynb", {"cells": CELLS, "metadata": {}}, "cells"),
    "ifeval": ("input_data.jsonl", RULES, "prompt instruction_id_list kwargs"),
    "ifeval_loose": ("input_data.jsonl", RULES, "prompt instruction_id_list kwargs"),
    "llmbar": ("N/dataset.json", {"input": "i", "output_1": "a", "output_2": "b", "label": 1},
               "input output_1 output_2 label"),
    "pandalm": ("testset-v1.json", PANDA,
                "instruction response1 response2 annotator1 annotator2 annotator3"),
    "mt_bench": ("question.jsonl", MT, "turns"),
}  # fmt: skip
# Suite -> where its answer is in the row, and one that is outside the choices.
OUTSIDE = {
    "mmlu": ("answer", "E"), "cmmlu": ("Answer", "E"), "ceval": ("answer", "E"),
    "agieval": ("label", "C"), "race": ("answers", ["C"]), "race_rows": ("answer", "C"),
    "hellaswag": ("label", 2), "c3": (1, [{"question": "q", "choice": ["x", "y"], "answer": "z"}]),
    "llmbar": ("label", 3), "pandalm": ("annotator2", 3),
}  # fmt: skip


def put(folder, suite, second):
    """A file of a good row and `second`; its path, the line of the second, and the layout."""
    name, first, _ = ROWS[suite]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    first = with_id(suite, first, 0)
    data = next(d for d in KNOWN[suite].data if path in folder.glob(d.files))
    where = f"{path}:3"
    if path.suffix == ".csv":
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        if not data.columns:
            table.writerow(first)
        for row in (first, second):
            table.writerow([row.get(key) for key in data.columns or first])
        text = out.getvalue()
        where = f"{path}:{2 if data.columns else 3}"
    elif path.suffix == ".jsonl":
        text, where = f"{json.dumps(first)}\n{json.dumps(second)}\n", f"{path}:2"
    elif path.suffix == ".ipynb":
        text, where = json.dumps(second), f"{path}"
    elif suite == "teval_instruct":
        text = f'{{\n"0": {json.dumps(first)},\n"1": {json.dumps(second)}}}'
    else:
        text = f"[\n{json.dumps(first)},\n{json.dumps(second)}]"
        if data.records:
            text = f'{{"about": [1, "]"], "{data.records}": {text}}}'
    path.write_text(text, encoding="utf-8")
    return path, where, data


def with_id(suite, row, number):
    """The row with an id of its own, where its suite has ids."""
    row = copy.deepcopy(row)
    key = id_of(suite)
    if key is not None:
        row[key] = number + 20 if isinstance(row[key], int) else f"{row[key]}{number}"
    return row


def id_of(suite):
    """The field of the suite's rows that names them."""
    row, data = ROWS[suite][1], KNOWN[suite].data
    keys = {d.fields.get("id", "id") for d in data if d.fields.get("id", "id") is not None}
    found = [key for key in keys if key in row] if isinstance(row, dict) else [2]
    return found[0] if found else None


def load(folder, suite, data):
    return items.load(
        folder, data.files, FORMATS[KNOWN[suite].format],
        fields=data.fields, columns=data.columns, records=data.records, only=data.only,
    )  # fmt: skip


def told(folder, suite, data):
    """The error's line, "" where the data are taken and can be asked. Anything else is raised."""
    try:
        found = load(folder, suite, data)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    for item in found:
        (*_, last) = prompts.messages(KNOWN[suite].of_group(item.group), item)
        texts = (last["content"], *item.fields.values(), *item.answers, *item.choices, item.group)
        assert all(isinstance(text, str) for text in texts), item
    return ""


def broken(value):
    """The value with one of its parts, at any depth, left out or replaced by junk."""
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            for part in (*JUNK, *broken(value[key])):
                changed = copy.copy(value)
                changed[key] = part
                yield changed


def test_every_suite_is_here():
    assert set(ROWS) == set(KNOWN)


@pytest.mark.parametrize("suite", ROWS)
def test_good_rows_are_taken(suite, tmp_path):
    _, _, data = put(tmp_path, suite, with_id(suite, ROWS[suite][1], 1))
    assert len(load(tmp_path, suite, data)) == (1 if suite == "cibench" else 2)


@pytest.mark.parametrize("suite", ROWS)
def test_a_missing_field_is_told(suite, tmp_path):
    _, good, needed = ROWS[suite]
    for field in needed.split():
        row = with_id(suite, good, 1)
        del row[field]
        if ROWS[suite][0].endswith(".csv"):
            row[field] = ""
        _, where, data = put(tmp_path, suite, row)
        assert told(tmp_path, suite, data).startswith(f"{where} has "), field


@pytest.mark.parametrize("suite", ROWS)
def test_no_junk_in_a_row_becomes_a_traceback(suite, tmp_path):
    for row in broken(with_id(suite, ROWS[suite][1], 1)):
        _, where, data = put(tmp_path, suite, row)
        said = told(tmp_path, suite, data)
        assert not said or said.startswith(f"{where} "), (row, said)


@pytest.mark.parametrize(
    ("reader", "row"),
    [
        (formats.squad, {"title": "t", "paragraphs": [{"context": "c", "qas": [
            {"id": "1", "question": "q", "answers": [{"text": "a"}], "is_impossible": False}]}]}),
        (formats.hotpotqa, {"id": "1", "question": "q", "answer": "a", "context": [["t", ["s"]]]}),
    ],
)  # fmt: skip
def test_no_junk_in_a_row_of_ruler_becomes_a_traceback(reader, row):
    for value in (row, *broken(row)):
        try:
            found = list(reader(items.Fields(Row("x:1", "", value), {})))
        except items.BadRow:
            continue
        for item in found:
            texts = (*item.fields.values(), *item.answers, *item.check["documents"], item.group)
            assert texts and all(isinstance(text, str) for text in texts), value


@pytest.mark.parametrize("suite", [s for s in ROWS if id_of(s) is not None])
def test_an_id_of_two_rows_is_told(suite, tmp_path):
    _, where, data = put(tmp_path, suite, with_id(suite, ROWS[suite][1], 0))
    assert told(tmp_path, suite, data).startswith(f"{where} has id ")


@pytest.mark.parametrize("suite", ROWS)
def test_another_encoding_is_told(suite, tmp_path):
    path, where, data = put(tmp_path, suite, with_id(suite, ROWS[suite][1], 1))
    first, _, last = path.read_bytes().rpartition(b'"' if path.suffix != ".csv" else b"two")
    path.write_bytes(first + "中".encode("gb18030") + last)
    said = told(tmp_path, suite, data)
    assert said.startswith(f"{where if ':' in where else f'{where}:1'} is not UTF-8"), said


@pytest.mark.parametrize("suite", [s for s in ROWS if not ROWS[s][0].endswith(".csv")])
def test_what_is_no_json_is_told(suite, tmp_path):
    path, where, data = put(tmp_path, suite, with_id(suite, ROWS[suite][1], 1))
    text = path.read_text()
    head, _, tail = text.rpartition(":" if "c3" not in suite else ",")
    path.write_text(f"{head};{tail}")
    said = told(tmp_path, suite, data)
    assert said.startswith(f"{where if ':' in where else f'{where}:1'} is not valid JSON"), said


@pytest.mark.parametrize("suite", OUTSIDE)
def test_an_answer_outside_the_choices_is_told(suite, tmp_path):
    row = with_id(suite, ROWS[suite][1], 1)
    key, answer = OUTSIDE[suite]
    row[key] = answer
    _, where, data = put(tmp_path, suite, row)
    assert told(tmp_path, suite, data).startswith(f"{where} has ")
