"""Grading: each measure on answers that are right, wrong and strange."""

from __future__ import annotations

import dataclasses

import pytest

from internlm2_jax.evals import measures, rules, suites
from internlm2_jax.evals.items import Item
from internlm2_jax.evals.measures import MEASURES, letter, read_call

KNOWN = suites.built_in()


def scores(suite, *pairs, **changes):
    suite = dataclasses.replace(KNOWN[suite], **changes)
    return [mark.score for mark in MEASURES[suite.measure](suite, pairs)]


def item(*answers, **parts):
    return Item("1", "x:1", answers=answers, **parts)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("B", "B"), (" (C) because", "C"), ("The answer is D.", "D"), ("Answer: **A**", "A"),
        ("A is wrong, so the answer is C", "C"), ("答案是B。", "B"), ("【答案】D", "D"),
        ("选C", "C"), ("I think it's B", "B"), ("A cat sat", "A"),
        ("none of them", ""), ("", ""), ("E", ""),
    ],
)  # fmt: skip
def test_letters_are_read(said, read):
    assert letter(said, 4) == read


def test_texts():
    assert scores("triviaqa", (item("The Beatles"), " beatles\nQ: more"), (item("x"), "y")) == [
        1,
        0,
    ]
    assert scores("bbh", (item("(A)"), "Long thought.\nSo the answer is (A).")) == [1]
    assert measures.f1("the cat sat", "a cat sat down") == pytest.approx(2 * 2 / 5)
    assert measures.f1("今天天气好", "天气很好") == pytest.approx(2 * 3 / 9)
    assert measures.rouge_l("a x b y c", "x y z") == pytest.approx(2 * 2 / 7)  # no articles
    assert scores("ruler", (item("12", "34"), "They are 34 and 56"), (item("1"), "")) == [0.5, 0]
    many = item("Date", check={"classes": ["Date", "City", "City date"]})
    assert scores("longbench", (many, "Date"), (many, "City"), measure="class") == [1, 0]
    assert scores("longbench", (item("3"), "3 of 4"), measure="number") == [0.5]


def test_gaokao_gives_half_for_a_part():
    marked = item("AC", check={"letters": True})
    said = ["【答案】AC", "【答案】 A", "【答案】AB", "no"]
    assert scores("gaokao", *[(marked, s) for s in said]) == [1, 0.5, 0, 0]


def test_mathematics():
    pairs = [(item("18"), "So she makes #### 18"), (item("1000"), "The answer is 1,000."),
             (item("18"), "It is 17 or 18 dollars"), (item("18"), "The answer is 81."),
             (item("\\frac{1}{2}"), "thus $\\boxed{0.5}$"), (item("7"), "")]  # fmt: skip
    assert scores("gsm8k", *pairs, options={"accept": "strict"}) == [1, 1, 1, 0, 1, 0]


def test_gsm8k_agrees_with_the_labels_of_its_authors(shared):
    from internlm2_jax import files

    rows = files.read_jsonl(shared / "data/gsm8k/example_model_solutions.jsonl")[:100]
    pairs, labels = [], []
    for row in rows:
        gold = row["ground_truth"].rpartition("A:")[2].strip()
        for said in row.values():
            if isinstance(said, dict) and "is_correct" in said:
                pairs.append((item(gold), said["solution"]))
                labels.append(float(said["is_correct"]))
    assert len(labels) == 400
    assert scores("gsm8k", *pairs, options={"accept": "strict"}) == labels


def test_calls():
    asked = {"action": "search", "args": {"q": "x", "n": 2}, "style": "json",
             "template": {"thought": "t", "action": "name", "args": "args"}}  # fmt: skip
    one = item("", check=asked)
    right = '```json\n{"t": "", "name": "search", "args": {"q": "x", "n": 2}}\n```'
    said = [right, '{"name": "search", "args": {"q": "y", "n": 2}}', '{"name": "f"}', "search(x)",
            '{"name": "search", "args": [1]}', "[" * 100_000]  # fmt: skip
    found = scores("teval_instruct", *[(one, s) for s in said])
    assert found == pytest.approx([1, 2 / 3, 0, 0, 1 / 3, 0])
    template = {"thought_start": "Thought:", "thought_end": "\n", "action_start": "Action:",
                "action_end": "\n", "args_start": "Args:", "args_end": ""}  # fmt: skip
    text = {**asked, "style": "string", "template": template}
    assert read_call("Thought: go\nAction: search\nArgs: {'q': 'x'}", text) == (
        "search",
        {"q": "x"},
    )
    assert read_call("Action: search", text) is None


# ------------------------------------------------------------------------------ IFEval

KEPT_AND_BROKEN = {
    "keywords:existence": ({"keywords": ["sun", "moon"]}, "Sun and moon.", "Sun only."),
    "keywords:frequency": (
        {"keyword": "war", "frequency": 2, "relation": "at least"}, "war, WAR", "war",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["rock"]}, "rocket", "a rock."),
    "keywords:letter_frequency": (
        {"letter": "!", "let_frequency": 2, "let_relation": "less than"}, "Oh!", "Oh!!",
    ),
    "language:response_language": (
        {"language": "de"}, "Das Wetter ist heute sehr schön und warm.", "It is nice today.",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"}, "Mr. Fox ran. He fell!", "One. Two. Three",
    ),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "at least"}, "one two three", "one two",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, "a\n\nThen, b", "a\n\nb",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] [b]", "[a]"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "x\nP.P.S y", "x\nP.S. y"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, "*one* and *two*", "*one* and two",
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSection 2", "Section 1",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:title": ({}, "<<A title>>\ntext", "<< >>\ntext"),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi!"),
    "startend:end_checker": ({"end_phrase": "The end."}, "so: the end.\n", "The end. Or not"),
    "startend:quotation": ({}, '"quoted"', 'not "quoted"'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "BIG and BOLD", "Big and BOLD",
    ),
    "change_case:english_capital": ({}, "THE WEATHER IS NICE TODAY IN THE CITY", "The Weather"),
    "change_case:english_lowercase": ({}, "the weather is nice today in the city", "The weather"),
    "punctuation:no_comma": ({}, "no comma here", "one, two"),
}  # fmt: skip


def test_every_rule_has_a_case():
    assert set(KEPT_AND_BROKEN) == set(rules.RULES) and len(rules.RULES) == 25


@pytest.mark.parametrize("name", KEPT_AND_BROKEN)
def test_rules_are_kept_or_broken(name):
    given, kept, broken = KEPT_AND_BROKEN[name]
    if name.startswith(("language", "change_case:english")):
        pytest.importorskip("pycld2", reason="pip install -e '.[data]'")
    assert rules.followed(kept, [[name, given]]) == [True]
    assert rules.followed(broken, [[name, given]]) == [False]
    assert rules.followed("", [[name, given]]) == [False]


def test_rules_may_be_kept_loosely_and_all_count():
    no_comma = ["punctuation:no_comma", {}]
    text = "Sure, here it is:\nno comma"
    assert rules.followed(text, [no_comma]) == [False]
    assert rules.followed_loosely(text, [no_comma]) == [True]
    both = item(check={"rules": [no_comma, ["startend:quotation", {}]]})
    (mark,) = MEASURES["rules"](KNOWN["ifeval"], [(both, "no quotes")])
    assert mark.score == 0 and mark.detail == "breaks startend:quotation"


# ------------------------------------------------------------------------------ code


@pytest.fixture(scope="module")
def isolated():
    from internlm2_jax.errors import UserError
    from internlm2_jax.sandbox import require

    try:
        require()
    except UserError as error:
        pytest.skip(str(error))


def test_programs_that_crash_or_cheat_cost_their_own_item(isolated, shared):
    from internlm2_jax.evals import runner

    items = runner.load(KNOWN["humaneval"], shared / "data/humaneval").items[:5]
    right = [i.answers[0] for i in items]
    whole = f"Here:\n```python\n{items[1].fields['prompt']}{right[1]}\n```"
    said = [
        right[0],
        whole,
        "    import os; os._exit(0)\n",
        "    while True: pass\n",
        "    return (\n",
    ]
    marks = MEASURES["code"](
        dataclasses.replace(KNOWN["humaneval"], options={"timeout": 1.0}),
        list(zip(items, said, strict=True)),
    )
    assert [mark.score for mark in marks] == [1, 1, 0, 0, 0]
    assert marks[3].outcome == "timeout" and "SyntaxError" in marks[4].detail


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["humaneval", "mbpp"])
def test_the_authors_own_solutions_pass(isolated, shared, suite):
    from internlm2_jax.evals import runner

    items = runner.load(dataclasses.replace(KNOWN[suite], shots=0), shared / f"data/{suite}").items
    marks = MEASURES["code"](KNOWN[suite], [(i, i.answers[0]) for i in items])
    wrong = [(i.id, m.detail) for i, m in zip(items, marks, strict=True) if m.score != 1]
    assert len(wrong) <= 0.02 * len(items), wrong
