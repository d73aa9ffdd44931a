"""RULER's tasks: what is hidden, where, and that the answers can be found in the text alone."""

from __future__ import annotations

import collections
import dataclasses
import json
import re

import pytest

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.evals import items as parts
from internlm2_jax.evals import measures, ruler, runner, suites

KNOWN = suites.built_in()
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


class Words:
    """A tokenizer of words."""

    @staticmethod
    def encode(text):
        return re.findall(r"\w+|[^\w\s]", text)


@pytest.fixture
def folder(tmp_path):
    """Essays, and questions of both kinds."""
    essays = [f"Sentence {i} of the essay is here. And so it goes on!" for i in range(400)]
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays/a.txt").write_text("\n".join(essays[:200]))
    (tmp_path / "essays/b.txt").write_text("\n".join(essays[200:]))

    def paragraph(n):
        asked = [
            {"id": f"{n}a", "question": f"What is {n}?", "answers": [{"text": f"It{n}"}] * 2},
            {"id": f"{n}b", "question": "What not?", "answers": [], "is_impossible": True},
        ]
        return {"context": f"Paragraph {n} says that it is It{n}. " + "word " * 40, "qas": asked}

    articles = [{"title": f"T{n}", "paragraphs": [paragraph(n)]} for n in range(30)]
    files.write_json(tmp_path / "squad/dev.json", {"version": "2", "data": articles})
    rows = [
        {"_id": f"{n}", "question": f"Who made {n}?", "answer": f"Maker{n}", "type": "bridge",
         "context": [[f"Thing {n}", [f"{n} was made ", f"by Maker{n}."]],
                     [f"Other {n}", ["Nothing. " * 30]]]}
        for n in range(30)
    ]  # fmt: skip
    files.write_json(tmp_path / "hotpotqa/dev.json", rows)
    return tmp_path


def made(task, folder=None, length=1500, **options):
    options = {"tasks": [task], "lengths": [length], "count": 3, **options}
    return ruler.items(options, Words, folder)


def context(item):
    return item.fields["question"].rpartition("\n\n")[0]


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_prompt_fills_its_length_and_holds_its_answers(task, folder):
    found = made(task, folder)
    assert found == made(task, folder) != made(task, folder, seed=1)
    assert len({item.fields["question"] for item in found}) == len(found) == 3
    for item in found:
        size = 1 + len(Words.encode(item.fields["question"]))
        assert 1400 < size <= 1500 and item.group == f"{task} 1500"
        assert item.answers and all(answer in context(item) for answer in item.answers)
        full = (item, ", ".join(item.answers))
        right, wrong = measures.MEASURES["contains_all"](KNOWN["ruler"], [full, (item, "-")])
        assert right.score == 1 and wrong.score == 0


def needles(item):
    return re.findall(r"A special value of (\S+) is (\S+)\.", context(item))


@pytest.mark.parametrize(
    ("task", "keys", "answers", "value"),
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, UUID),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multivalue", 1, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_needles_in_a_text(task, keys, answers, value, folder):
    for item in made(task, folder):
        said = needles(item)
        asked = item.fields["question"].rpartition("values of ")[2].partition(" in the")[0]
        assert len({key for key, _ in said}) == keys and len(item.answers) == answers
        assert sorted(v for k, v in said if k in asked.split(", ")) == sorted(item.answers)
        assert all(re.fullmatch(value, v) for _, v in said)
        rest = re.sub(r"A special value of \S+ is \S+\. ?", "", context(item))
        noise = task == "niah_single_1"
        assert ("river" in rest, "of the essay" in rest) == (noise, not noise)
    noisy = made(task, hay="noise")[0]
    assert "river" in noisy.fields["question"] and needles(noisy)


@pytest.mark.parametrize(
    ("task", "form"), [("niah_multikey_2", r"\d{7}"), ("niah_multikey_3", UUID)]
)
def test_a_haystack_of_needles(task, form):
    for item in made(task):
        said = needles(item)
        assert re.sub(r"A special value of \S+ is \S+\. ?", "", context(item)) == ""
        assert len(dict(said)) == len(said) > 40  # no key twice
        asked = item.fields["question"].rpartition("values of ")[2].partition(" in the")[0]
        assert dict(said)[asked] == item.answers[0] and re.fullmatch(form, item.answers[0])
        if form is UUID:
            assert re.fullmatch(UUID, asked)


def test_needles_stand_anywhere(folder):
    places = [
        text.index("A special") / len(text)
        for text in map(context, made("niah_single_2", folder, count=40))
    ]
    assert min(places) < 0.15 and max(places) > 0.85


def test_variables_are_a_chain():
    for item in made("variable_tracking"):
        first, *links = re.findall(r"Let (V\d{3}) be (?:equal to )?(\w+)\.", context(item))
        value = item.fields["question"].rpartition("the value ")[2].split()[0]
        assert first == (item.answers[0], value) and len(links) == 4
        assert links == list(zip(item.answers[1:], item.answers, strict=False))


def test_words_are_counted():
    for length, count, ratio in ((1500, 5, 10), (4096, 10, 30)):
        for item in made("common_words", length=length):
            counts = collections.Counter(context(item).split())
            assert len(item.answers) == count
            assert all(counts.pop(answer) == ratio for answer in item.answers)
            assert max(counts.values()) == 3
    for item in made("frequent_words"):
        common = collections.Counter(context(item).split()).most_common(4)
        assert [word for word, _ in common[:3]] == list(item.answers)
        assert common[2][1] > common[3][1]


def test_questions_stand_among_the_documents_of_others(folder):
    for task, own in (("qa_1", 1), ("qa_2", 2)):
        found = made(task, folder, length=700)
        assert len({item.fields["question"].rpartition("Question: ")[2] for item in found}) == 3
        for item in found:
            documents = re.split(r"(?:^|\n\n)Document \d+:\n", context(item))[1:]
            assert len(documents) == len(set(documents)) > own
            number = re.search(r"\d+", item.answers[0]).group()
            with_number = [d for d in documents if re.search(rf"\b(?:It|Maker)?{number}\b", d)]
            assert len(with_number) == own
    # when the documents run out, the prompt is shorter
    item = made("qa_2", folder, length=100_000)[0]
    assert len(re.findall(r"Document \d+:", item.fields["question"])) == 60


def test_one_of_several_answers_is_enough_for_a_question():
    item = parts.Item("1", "", answers=("one", "two"), check={"any": True})
    (mark,) = measures.MEASURES["contains_all"](KNOWN["ruler"], [(item, "It is two.")])
    assert mark.score == 1


def test_what_cannot_be_made_is_told(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for task, what in (
        ("niah_single_2", r"essays: give a folder with essays/\*.txt by --data"),
        ("qa_1", r"SQuAD's questions: give a folder with squad/\*.json"),
        ("qa_2", r"HotpotQA's questions: give a folder with hotpotqa/\*.json"),
    ):
        with pytest.raises(UserError, match=what):
            made(task)
        with pytest.raises(UserError, match=f"there is no {empty}"):
            made(task, empty)
    with pytest.raises(UserError, match="40 tokens cannot hold"):
        made("niah_multivalue", folder, length=40)
    with pytest.raises(UserError, match="no task 'niah'"):
        made("niah")
    with pytest.raises(UserError, match="hay is 'straw'; it is essays or noise"):
        made("niah_single_2", hay="straw")
    (folder / "essays/b.txt").write_bytes(b"One.\nTwo \xff.")
    with pytest.raises(UserError, match=r"b.txt:2 is not UTF-8"):
        made("niah_single_2", folder)


def _squad(folder, change):
    path = folder / "squad/dev.json"
    content = json.loads(path.read_text())
    change(content["data"][1])
    rows = ",\n".join(json.dumps(row) for row in content["data"])
    path.write_text(f'{{"data": [\n{rows}]}}')
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop("paragraphs"), "has no 'paragraphs'"),
        (lambda a: a["paragraphs"][0].pop("context"), "has no 'context' in paragraph 1"),
        (lambda a: a["paragraphs"][0].pop("qas"), "has no 'qas' in paragraph 1"),
        (lambda a: a["paragraphs"][0]["qas"][0].pop("id"), "has no 'id' in a question of"),
        (lambda a: a["paragraphs"][0]["qas"][0].pop("question"), "has no 'question' in a question"),
        (lambda a: a["paragraphs"][0]["qas"][0].update(answers=[]), "has no answer in a question"),
        (lambda a: a["paragraphs"][0]["qas"][0].update(answers=[3]), "has no 'text' in an answer"),
        (lambda a: a["paragraphs"][0]["qas"][0].update(id="0a"), "has id '0a', as "),
    ],
)
def test_bad_squad_files_are_told_with_file_and_line(folder, change, said):
    path = _squad(folder, change)
    with pytest.raises(UserError) as told:
        made("qa_1", folder)
    assert str(told.value).startswith(f"{path}:3 {said}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": None}, "has no 'context'"),
        ({"context": []}, "has no documents"),
        ({"context": [["T"]]}, "has document 1 ['T']; expected [title, [sentences]]"),
        ({"context": [["T", "text"]]}, "has document 1 ['T', 'text']; expected"),
        ({"answer": " "}, "has an empty 'answer'"),
        ({"question": 3}, "has 'question' of type int"),
        ({"_id": "0"}, "has id 'dev/0', as "),
    ],
)
def test_bad_hotpotqa_files_are_told_with_file_and_line(folder, change, said):
    path = folder / "hotpotqa/dev.json"
    rows = json.loads(path.read_text())
    rows[1].update(change)
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "]")
    with pytest.raises(UserError) as told:
        made("qa_2", folder)
    assert str(told.value).startswith(f"{path}:3 {said}")


def test_the_suites_make_all_their_tasks(subject, folder):
    options = {**KNOWN["ruler"].options, "lengths": [1300], "count": 1}
    suite = dataclasses.replace(KNOWN["ruler"], options=options)
    items = runner.load(suite, folder, subject.tokenizer).items
    assert [item.id.split("/")[0] for item in items] == list(ruler.TASKS)
    options = {**KNOWN["ruler_made"].options, "lengths": [1024], "count": 1}
    suite = dataclasses.replace(KNOWN["ruler_made"], options=options)
    items = runner.load(suite, None, subject.tokenizer).items
    assert len(items) == 10
    for item in items:
        assert len(subject.encode(item.fields["question"])) <= 1024
