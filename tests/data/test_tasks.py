import ast
import random
import re

import pytest

from internlm2_jax.data import tasks
from internlm2_jax.errors import UserError


@pytest.fixture(scope="module")
def train():
    return tasks.generate(2400, 0, "train")


@pytest.fixture(scope="module")
def evaluation():
    return tasks.generate(400, 0, "held_out")


def solve(task):
    """Works the answer out again from the prompt's text alone, another way than the generator."""
    prompt = task.prompt
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    if task.family == "copy":
        return prompt.split("\n", 1)[1]
    if task.family in ("first_word", "last_word"):
        words = prompt.split("\n")[1:]
        return words[0] if task.family == "first_word" else words[-1]
    if task.family == "addition":
        return str(sum(numbers))
    if task.family == "subtraction":
        return str(max(numbers) - min(numbers))
    if task.family == "comparison":
        return str(max(numbers) if "larger" in prompt else min(numbers))
    if task.family == "parity":
        return ("even", "odd")[numbers[0] % 2]
    if task.family == "retrieval":
        asked = re.search(r"of (\w+)[.?]$", prompt).group(1)
        return re.search(rf"of {asked} is (\d+)\.", prompt).group(1)
    if task.family == "python_len":
        return str(len(ast.literal_eval(re.search(r"len\((.*)\)", prompt).group(1))))
    if task.family == "python_index":
        literal, index = re.search(r"print\((.*)\[(-?\d+)\]\)", prompt).groups()
        return str(ast.literal_eval(literal)[int(index)])
    word = re.search(r"Write (\w+)|\"(\w+)\"", prompt)
    word = word.group(1) or word.group(2)
    return word.upper() if task.family == "upper" else word.lower()


def test_every_answer_is_right(train, evaluation):
    for task in train + evaluation:
        assert tasks.check(task, solve(task)), task


def test_recall_sessions_answer_from_their_own_facts():
    sessions = tasks.recall_sessions(50, seed=0)
    assert sessions == tasks.recall_sessions(50, seed=0) != tasks.recall_sessions(50, seed=1)
    for text in sessions:
        facts = dict(re.findall(r"The \w+ of (\w+) is (\d+)\.", text))
        answers = dict(re.findall(r"^(?:What|Give).* of (\w+)[?.] (\d+)$", text, re.MULTILINE))
        assert answers == facts
        assert 2 <= len(facts) <= 16


def test_every_family_appears_in_both_splits(train, evaluation):
    for split in (train, evaluation):
        assert {task.family for task in split} == set(tasks.FAMILIES)


def test_check_is_strict_after_strip(train):
    task = next(t for t in train if t.family == "addition")
    assert tasks.check(task, f" {task.answer}\n")
    for response in ("", f"{task.answer}.", f"It is {task.answer}", task.answer + task.answer):
        assert not tasks.check(task, response)


def test_no_content_is_shared_between_the_splits(train, evaluation):
    assert not {t.key for t in train} & {t.key for t in evaluation}
    assert not {t.prompt for t in train} & {t.prompt for t in evaluation}
    # A word held out from upper case is held out from lower case too.
    cases = [
        {t.answer.lower() for t in split if t.family in ("upper", "lower")}
        for split in (train, evaluation)
    ]
    assert cases[0] and cases[1] and not cases[0] & cases[1]
    # Neither in another order: 3 + 5 against 5 + 3.
    sums = [
        {tuple(sorted(re.findall(r"\d+", t.prompt))) for t in split if t.family == "addition"}
        for split in (train, evaluation)
    ]
    assert sums[0] and sums[1] and not sums[0] & sums[1]


def test_a_fixed_share_of_a_small_space_is_held_out():
    keys = [f"addition: {a} {b}" for a in range(21) for b in range(a, 21)]
    assert 0.05 < sum(map(tasks.held_out, keys)) / len(keys) < 0.16


def test_prompts_are_distinct_and_follow_the_seed(train):
    assert len({t.prompt for t in train}) == len(train)
    assert tasks.generate(50, 0, "train") == train[:50]
    assert tasks.generate(50, 1, "train") != train[:50]


def test_wrong_answers_are_wrong_and_never_empty(train):
    rng = random.Random(0)
    for task in train:
        for _ in range(3):
            wrong = tasks.wrong_answer(task, rng)
            assert wrong.strip() and not tasks.check(task, wrong)


def test_wrong_answers_are_plausible(train):
    rng = random.Random(0)
    for task in train:
        if task.answer.isdigit():
            assert tasks.wrong_answer(task, rng).isdigit()
        if task.family == "retrieval":
            assert tasks.wrong_answer(task, rng) in task.prompt


def test_rows_survive_json(train):
    assert tasks.Task(**train[0].row()) == train[0]


def test_texts_are_short(train):
    assert max(len(t.prompt) for t in train) <= 220 and max(len(t.answer) for t in train) <= 60


def test_too_many_or_unknown_are_refused():
    with pytest.raises(UserError, match="distinct held_out tasks"):
        tasks.generate(10_000, 0, "held_out", ["upper"])
    with pytest.raises(UserError, match="unknown task family 'division'"):
        tasks.generate(1, 0, "train", ["division"])
