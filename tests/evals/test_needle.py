"""Needle tests: where the needle lands, how long the prompt is, what each score says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from internlm2_jax.data import haystacks
from internlm2_jax.errors import UserError
from internlm2_jax.evals import needle
from internlm2_jax.evals.needle_text import TEXTS


class ByteTokenizer:
    """One token a byte: cutting can split a character, and lengths are easy to count."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class PairTokenizer(ByteTokenizer):
    """Merges pairs of bytes, so that inserting text shifts every pair behind it."""

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        return [int.from_bytes(data[i : i + 2]) | (len(data[i : i + 2]) << 16)
                for i in range(0, len(data), 2)]  # fmt: skip

    def decode(self, ids: list[int]) -> str:
        data = b"".join((i & 0xFFFF).to_bytes(i >> 16) for i in ids)
        return data.decode("utf-8", errors="replace")


DOCUMENTS = [f"Sentence {i} stands here. It goes on, and on! Does it?" for i in range(40)]
CHINESE = [f"第{i}句话在这里。它继续说下去！是不是？" for i in range(40)]


def sample(length: int = 2000, depth: float = 50, **options) -> needle.Sample:
    tokenizer = options.pop("tokenizer", ByteTokenizer())
    haystack = needle.Haystack(tokenizer, options.pop("documents", DOCUMENTS), seed=0)
    return needle.build_sample(tokenizer, haystack, length, depth, buffer=100, **options)


@pytest.mark.parametrize("depth", [0, 21, 50, 84, 100])
def test_the_needle_stands_between_sentences_at_its_depth(depth):
    built = sample(3000, depth)
    assert built.prompt.count(built.first.text) == 1
    before = built.prompt.split(built.first.text)[0].rstrip()
    assert depth == 0 or before[-1] in ".!?" or depth == 100
    assert built.first.position == pytest.approx(depth / 100, abs=0.02)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PairTokenizer()])
@pytest.mark.parametrize("length", [800, 1501, 4000])
def test_the_whole_prompt_with_its_buffer_fills_the_length(tokenizer, length):
    built = sample(length, 42, tokenizer=tokenizer)
    count = len(tokenizer.encode(built.prompt))
    assert count == built.num_tokens
    assert length - 100 - 8 <= count <= length - 100
    assert built.prompt.rstrip().endswith('"'), "the question must stand at the end"


def test_chinese_uses_the_reports_needle_and_no_half_character():
    built = sample(2001, 63, documents=CHINESE, language="zh")
    assert built.first.text == "小明最喜欢的实习的地点就是上海人工智能实验室。"
    assert "\ufffd" not in built.prompt
    assert built.prompt.split(f"\n{built.first.text}")[0][-1] in "。！？\n"


def test_a_short_haystack_is_repeated_and_the_order_follows_the_seed():
    tokenizer = ByteTokenizer()
    texts = {seed: needle.Haystack(tokenizer, DOCUMENTS, seed).take(9000) for seed in (0, 1)}
    assert len(texts[0]) == 9000 > sum(map(len, DOCUMENTS))
    assert texts[0] != texts[1]
    assert texts[0] == needle.Haystack(tokenizer, DOCUMENTS, 0).take(9000)


def test_pairs_of_subject_and_answer_do_not_repeat_early():
    for text in TEXTS.values():
        assert np.gcd(len(text.subjects), len(text.answers)) == 1
        assert text.needle.startswith(text.opening)
    needles = {sample(index=i).first.text for i in range(56)}
    assert len(needles) == 56


@pytest.mark.parametrize(
    ("response", "score"), [("abc", 1), ("a b\nc", 1), ("abd", 2 / 3), ("", 0), ("abcabc", 0.5)]
)
def test_edit_score_by_hand(response, score):
    assert needle.edit_score(response, "abc") == pytest.approx(score)


def test_needlebench_gives_a_keyword_all_and_a_near_miss_a_fifth():
    built = sample()
    assert needle.needle_score(f"I think: {built.first.answer}, yes", built.first) == 1
    wrong = built.first.text.replace(built.first.answer, built.first.distractors[0])
    assert needle.keyword_score(wrong, built.first) == 0
    assert 0.1 < needle.needle_score(wrong, built.first) < 0.2


def copying_model(conversations):
    """Finds the needle if it stands in the first 1500 characters."""
    answers = []
    for [message] in conversations:
        head = message["content"][:1500]
        answers += [
            next((line for line in head.split("\n") if line.startswith("The favourite")), "no idea")
        ]
    return answers


def test_the_grid_is_depth_by_length_and_shows_what_a_model_cannot_see():
    grid = needle.needle_grid(
        ByteTokenizer(), DOCUMENTS, [1500, 6000], [0, 50, 100],
        score="keyword", generate=copying_model, buffer=50, repeats=2,
    )  # fmt: skip
    np.testing.assert_array_equal(grid, [[1, 1], [1, 0], [1, 0]])


def test_likelihood_scores_rank_the_right_answer_among_the_distractors():
    seen = []

    def likelihood(requests):
        seen.extend(requests)
        # Prefers what occurs in the context, then longer text: right beats all but never by luck.
        return [[100.0 * (t.strip() in context) + len(t) for t in ts] for context, ts in requests]

    grid = needle.needle_grid(
        ByteTokenizer(), DOCUMENTS, [1500], [0, 100], score="choice", likelihood=likelihood,
        buffer=50, repeats=3, num_distractors=4,
    )  # fmt: skip
    np.testing.assert_array_equal(grid, [[1], [1]])
    context, continuations = seen[0]
    opening = TEXTS["en"].opening.format(subject="Anna")
    assert context.endswith(opening)
    assert continuations[0] == " Shanghai AI Laboratory"
    assert len(set(continuations)) == 5
    assert opening + continuations[0] in context


def test_likelihood_is_graded_and_choice_is_not():
    built = [sample(num_distractors=4)]

    def likelihood(requests):
        return [[0.0, -1.0, -2.0, 1.0, -3.0]]

    assert needle.score_samples(built, "likelihood", likelihood=likelihood) == [0.75]
    assert needle.score_samples(built, "choice", likelihood=likelihood) == [0.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 200}, "no room"),
        ({"depth": 101}, "not a percentage"),
        ({"language": "fr"}, "choose from"),
        ({"documents": [" "]}, "no documents"),
        ({"num_distractors": 8}, "give 1 to 7"),
    ],
)
def test_bad_requests_say_how_to_mend_them(options, said):
    with pytest.raises(UserError, match=said):
        sample(**options)


def test_several_needles_stand_at_even_distances_and_all_are_asked_for():
    built = sample(6000, 40, num_needles=3)
    lines = built.prompt.split("\n")
    assert [n.text in lines for n in built.needles] == [True] * 3
    assert len({n.answer for n in built.needles}) == 3
    positions = [n.position for n in built.needles]
    assert positions == pytest.approx([0.4, 0.6, 0.8], abs=0.02)
    order = [lines.index(n.text) for n in built.needles]
    assert order == sorted(order)
    for built_needle in built.needles:
        assert built_needle.opening.rpartition(" is")[0].split()[-1] in built.prompt[-600:]
    assert len(ByteTokenizer().encode(built.prompt)) <= 5900
    with pytest.raises(UserError, match="give 1 to 7"):
        sample(num_needles=8)


def test_a_response_is_scored_for_all_needles_or_each_for_its_own():
    built = sample(6000, 0, num_needles=2)
    one, other = (n.text for n in built.needles)
    assert needle.mark("keyword", built, [f"{one} {other}"]) == 1
    assert needle.mark("keyword", built, [one]) == 0.5
    assert needle.mark("keyword", built, [one, other]) == 1
    assert needle.mark("keyword", built, [other, one]) == 0
    assert needle.mark("edit", built, [one, other]) == 1


def test_the_needle_of_pairs_is_what_models_are_trained_on():
    texts = list(haystacks.recall_texts(30, 200, 0))
    text = TEXTS["pairs"]
    fact = text.needle.format(subject="amber", answer="lamp")
    assert fact == haystacks.FACT.format(subject="amber", answer="lamp")
    assert fact.startswith(text.opening.format(subject="amber") + " ")
    assert text.question == haystacks.QUESTION
    for found in texts:
        lines = found.split("\n")
        facts, asked = lines[: lines.index("?")], lines[lines.index("?") + 1 :]
        assert asked and set(asked) == {x for x in facts if not x.startswith("The ")}
        assert len(asked) == haystacks.ASKED * len(set(asked))
        assert len({x.split()[0] for x in asked}) == len(set(asked))
    assert texts == list(haystacks.recall_texts(30, 200, 0))
    assert texts != list(haystacks.recall_texts(30, 200, 1))
    words = set(haystacks.filler_text(50, 0).replace(".", "").split())
    assert not words & {*haystacks.NAMES, *haystacks.PARTNERS}


@pytest.mark.parametrize(
    ("means", "length"), [([1, 0.9, 0.9], 4000), ([1, 0.8, 1], 1000), ([0.1, 1, 1], None)]
)
def test_the_effective_length_ends_at_the_first_miss(means, length):
    assert needle.effective_length([1000, 2000, 4000], means, 0.85) == length


def test_unknown_scores_and_missing_functions_are_named_before_any_work():
    with pytest.raises(UserError, match="unknown; choose from keyword"):
        needle.needle_grid(ByteTokenizer(), DOCUMENTS, [900], [0], score="bleu")
    with pytest.raises(UserError, match="needs the `likelihood`"):
        needle.needle_grid(ByteTokenizer(), DOCUMENTS, [900], [0], score="choice")


def test_no_jax_is_imported():
    code = (
        "import sys; import internlm2_jax.evals.needle, internlm2_jax.evals.perplexity;"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
