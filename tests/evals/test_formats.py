"""Every format's reader on rows of the public shape; bad rows by file and line."""

from __future__ import annotations

import dataclasses
import json

import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.evals import formats, items, prompts, rows, runner, suites

KNOWN = suites.built_in()


def loaded(suite, folder, **changes):
    return runner.load(dataclasses.replace(KNOWN[suite], **changes), folder, None)


def lines(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values))


# ------------------------------------------------------------------------------ the public shapes


def test_mmlu_as_its_authors_have_it(shared):
    found = loaded("mmlu", shared / "data/mmlu")
    assert len({i.group for i in found.items}) == 29 and len(found.pool) == 57
    assert all(len(i.choices) == 4 and len(i.right) == 1 for i in found.items)
    item = found.items[0]
    asked = prompts.messages(KNOWN["mmlu"], item, prompts.examples_for(
        KNOWN["mmlu"], item, found.pool, None))  # fmt: skip
    text = prompts.plain(KNOWN["mmlu"], asked)
    assert text.startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\n"
    )
    assert text.count("Answer: ") == 5 and text.endswith("\nAnswer:")


def test_mathematics_and_code_as_their_authors_have_them(shared):
    gsm8k = loaded("gsm8k", shared / "data/gsm8k")
    assert len(gsm8k.items) == 660 and len(gsm8k.pool[""]) == 7473
    assert gsm8k.items[0].answers == ("18",)
    assert "<<" not in gsm8k.items[0].fields["solution"]
    maths = loaded("math", shared / "data/math500")
    assert len(maths.items) == 300
    assert maths.items[0].answers == ("\\left( 3, \\frac{\\pi}{2} \\right)",)
    assert len(loaded("humaneval", shared / "data/humaneval").items) == 100
    mbpp = loaded("mbpp", shared / "data/mbpp")
    assert [i.id for i in mbpp.pool[""]] == ["2", "3", "4"] and len(mbpp.items) == 500
    text = prompts.plain(
        KNOWN["mbpp"], prompts.messages(KNOWN["mbpp"], mbpp.items[0], mbpp.pool[""])
    )
    assert text.endswith("[BEGIN]") and text.count("[DONE]") == 3


def test_alignment_as_its_authors_have_it(shared):
    assert len(loaded("ifeval", shared / "data/ifeval").items) == 541
    assert len(loaded("llmbar", shared / "data/llmbar").items) == 419
    assert 800 < len(loaded("pandalm", shared / "data/pandalm").items) < 999  # ties are left out
    assert {i.group for i in loaded("mt_bench", shared / "data/mt_bench").items} >= {"writing"}


def test_chinese_examinations(tmp_path):
    row = "0,下列哪一项是质数？,4,6,7,9,C\n"
    (tmp_path / "test").mkdir()
    (tmp_path / "test/数学.csv").write_text(",Question,A,B,C,D,Answer\n" + row, "utf-8-sig")
    (item,) = loaded("cmmlu", tmp_path, shots=0).items
    assert (item.group, item.choices, item.right) == ("数学", ("4", "6", "7", "9"), (2,))
    (tmp_path / "val").mkdir()
    (tmp_path / "val/law_val.csv").write_text("id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,B\n")
    assert loaded("ceval", tmp_path, shots=0).items[0].id == "law/0"


def test_agieval_strips_its_letters_and_takes_several(tmp_path):
    options = ["(A)red", "(B)blue", "(C)green"]
    lines(
        tmp_path / "v1/lsat.jsonl",
        {"passage": None, "question": "Sky?", "options": options, "label": "B"},
        {"passage": "P", "question": "Which?", "options": options, "label": ["A", "C"]},
    )
    first, second = loaded("agieval", tmp_path).items
    assert first.choices == ("red", "blue", "green") and first.fields["context"] == ""
    assert second.right == (0, 2) and second.fields["context"] == "P"


def test_gaokao(tmp_path):
    folder = tmp_path / "Multiple-choice_Questions"
    folder.mkdir()
    rows = [{"index": 0, "question": "选？\nA. 一 B. 二", "answer": ["A", "C"], "score": 6}]
    (folder / "2010_Physics.json").write_text(json.dumps({"example": rows}))
    (item,) = loaded("gaokao", tmp_path).items
    assert item.answers == ("AC",) and item.check["letters"]


def test_reading(tmp_path):
    row = {"article": "Text.", "questions": ["Q1?", "Q2?"], "answers": ["A", "D"],
           "id": "high1.txt", "options": [["w", "x", "y", "z"], ["1", "2", "3", "4"]]}  # fmt: skip
    path = tmp_path / "test/high/1.txt.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([row]))
    first, second = loaded("race", tmp_path).items
    assert (first.right, second.right) == ((0,), (3,)) and first.id != second.id
    dialogue = [
        ["男：你好", "女：好"],
        [{"question": "谁？", "choice": ["男", "女"], "answer": "女"}],
        "d-1",
    ]
    (tmp_path / "c3-d-test.json").write_text(json.dumps([dialogue]))
    (item,) = loaded("c3", tmp_path, shots=0).items
    assert item.right == (1,) and item.fields["context"] == "男：你好\n女：好"


def test_open_answers(tmp_path):
    alias = {"value": "Paris", "aliases": ["Paris", "City of Light"]}
    lines(tmp_path / "dev.jsonl", {"question": "Capital?", "answer": alias})
    assert loaded("triviaqa", tmp_path, shots=0).items[0].answers == ("Paris", "City of Light")
    (tmp_path / "nq-dev.qa.csv").write_text("question\tanswer\n")
    lines(tmp_path / "NQ-open.dev.jsonl", {"question": "who", "answer": ["a", "b"]})
    assert loaded("natural_questions", tmp_path, shots=0).items[0].answers == ("a", "b")
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh/dyck.json").write_text(
        json.dumps({"canary": "x", "examples": [{"input": "(", "target": ")"}]})
    )
    (item,) = loaded("bbh", tmp_path).items
    assert (item.group, item.answers) == ("dyck", (")",))
    (tmp_path / "theoremqa_test.json").write_text(
        json.dumps([{"Question": "Limit?", "Answer": "[1, 2]", "Answer_type": "list of integer"}])
    )


def test_long_context(tmp_path):
    lines(
        tmp_path / "data/trec.jsonl",
        {"input": "Type?", "context": "long", "answers": ["Date"], "all_classes": ["Date", "City"],
         "_id": "1", "length": 3},
    )  # fmt: skip
    (item,) = loaded("longbench", tmp_path).items
    assert item.check["classes"] == ["Date", "City"]
    assert KNOWN["longbench"].of_group(item.group).measure == "class"
    lines(
        tmp_path / "Exam/quality.jsonl",
        {"instructions": ["a?", "b?"], "outputs": ["A", "B"], "input": "text"},
    )
    assert [i.answers for i in loaded("leval_exam", tmp_path).items] == [("A",), ("B",)]


def test_tools(tmp_path):
    turns = [{"role": "system", "content": "tools"}, {"role": "user", "content": "go"}]
    said = {"origin_prompt": turns, "template": {"thought": "t", "action": "name", "args": "args"},
            "ground_truth": {"action": "f", "args": {"x": 1}},
            "meta_data": {"response_format": "json"}}  # fmt: skip
    (tmp_path / "instruct_v2.json").write_text(json.dumps({"0": said}))
    (item,) = loaded("teval_instruct", tmp_path).items
    assert item.id == "2/0"
    assert item.messages[-1] == {"role": "user", "content": "go"}
    shown = {"data": {"text/plain": ["4"]}}
    cells = [{"cell_type": "markdown", "source": ["Add"]},
             {"cell_type": "code", "source": ["2+2"], "outputs": [shown]},
             {"cell_type": "markdown", "source": "Import"},
             {"cell_type": "code", "source": "import os", "outputs": []}]  # fmt: skip
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
    (item,) = loaded("cibench", tmp_path).items
    assert [(s["kind"], s["output"]) for s in item.check["steps"]] == [
        ("general", "4"),
        ("exec", ""),
    ]


# ------------------------------------------------------------------------------ bad data


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "choices": ["a", "b"]}, "has no 'answer'"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "'C', outside its choices A, B"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer 2, outside its 2 choices"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "a list of two or more"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "an empty 'question'"),
        ({"question": 3, "choices": ["a", "b"], "answer": 0}, "'question' of type int"),
        (1, "is int; expected an object"),
    ],
)  # fmt: skip
def test_a_bad_row_is_told_with_file_and_line(tmp_path, row, said):
    good = {"question": "q", "choices": ["a", "b"], "answer": "A"}
    lines(tmp_path / "x.jsonl", good, row, {**good, "id": 7})
    with pytest.raises(UserError) as told:
        items.load(tmp_path, "*.jsonl", formats.choices)
    assert str(told.value).startswith(f"{tmp_path / 'x.jsonl'}:2 ") and said in str(told.value)
    assert "\n" not in str(told.value)


def test_all_bad_rows_are_counted_and_ids_are_of_one_row(tmp_path):
    good = {"id": 1, "question": "q", "choices": ["a", "b"], "answer": "A"}
    lines(tmp_path / "x.jsonl", good, good, {"id": 3})
    with pytest.raises(UserError, match=r"x.jsonl:3 has no 'choices' \(and 1 more bad rows\)"):
        items.load(tmp_path, "*.jsonl", formats.choices)
    lines(tmp_path / "x.jsonl", good, {**good, "id": 2}, good)
    with pytest.raises(UserError, match=r"x.jsonl:3 has id 'x/1', as .*x.jsonl:1 has"):
        items.load(tmp_path, "*.jsonl", formats.choices)


def test_bad_files_are_told_with_file_and_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes('{"a": 1}\n{"a": "中"}\n'.encode("gb18030"))
    with pytest.raises(UserError, match=r"x.jsonl:2 is not UTF-8 \(byte 0xd6\)"):
        rows.read(tmp_path, "*.jsonl")
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"x.jsonl:2 is not valid JSON"):
        rows.read(tmp_path, "*.jsonl")
    (tmp_path / "x.csv").write_text('a,b\n"one\nline",2\n1\n')
    with pytest.raises(UserError, match=r"x.csv:4 has 1 columns; expected 2"):
        rows.read(tmp_path, "*.csv")
    with pytest.raises(UserError, match=r"there is no .*test/\*_test.csv"):
        loaded("mmlu", tmp_path)


def test_records_of_json_know_their_line(tmp_path):
    (tmp_path / "x.json").write_text('[\n {"a": "[,{"},\n\n {"a": 2}, {"a":\n 3}]')
    where = [row.where.rpartition(":")[2] for row in rows.read(tmp_path, "*.json")]
    assert where == ["2", "4", "4"]


# ------------------------------------------------------------------------------ suites, examples


def test_own_suites_are_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "mine:\n  dimension: examinations\n  format: choices\n  measure: choice\n"
        "  data: [{files: '*.jsonl'}]\n"
    )
    (suite,) = suites.find(str(path))
    assert suite.name == "mine" and suite.data[0].files == "*.jsonl"
    good = path.read_text()
    for wrong, said in (
        ("shotz: 3", "no field 'shotz'"),
        ("cut: right", "cut is 'right'"),
        ("samples: 0", "samples is 0"),
        ("k: [3]", "pass@3 needs as many"),
    ):
        path.write_text(f"{good}  {wrong}\n")
        with pytest.raises(UserError, match=said):
            suites.find(str(path))
    with pytest.raises(UserError, match="no suite 'mmlo'; there are mmlu"):
        suites.find("mmlo")


def test_examples_keep_to_their_group_and_seed(tmp_path):
    suite = dataclasses.replace(KNOWN["gsm8k"], shots=3)
    pool = {"": [items.Item(str(i), "", "") for i in range(20)]}
    item = pool[""][1]
    first = prompts.examples_for(suite, item, pool, None)
    assert [e.id for e in first] == ["0", "2", "3"]  # never the item itself
    drawn = prompts.examples_for(suite, item, pool, 5)
    assert drawn == prompts.examples_for(suite, item, pool, 5) != first
    assert drawn != prompts.examples_for(suite, item, pool, 6)
    lonely = {"x": [pool[""][0]]}
    with pytest.raises(UserError, match="3 examples are asked for, and group 'x' has 1"):
        prompts.examples_for(suite, dataclasses.replace(item, group="x"), lonely, None)


def test_a_template_that_names_no_field_is_told():
    suite = dataclasses.replace(KNOWN["gsm8k"], prompt="{quesion}")
    with pytest.raises(UserError, match=r"the template names 'quesion'; .* have answer, group"):
        prompts.question(suite, items.Item("1", ""))
