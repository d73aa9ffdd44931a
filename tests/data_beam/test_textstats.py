"""Repetition signals against slow, literal implementations of their definitions."""

import math
import random

import pytest

from data_beam.kernels.textstats import Signals


def covered_share(words: list[str], n: int) -> float:
    """Characters of words in an n-gram seen before, one by one."""
    seen, covered = set(), [False] * len(words)
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        if gram in seen:
            covered[start : start + n] = [True] * n
        seen.add(gram)
    return sum(len(w) for w, c in zip(words, covered, strict=True) if c) / sum(map(len, words))


def top_share(words: list[str], n: int) -> float:
    counts: dict[tuple[str, ...], int] = {}
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        counts[gram] = counts.get(gram, 0) + 1
    best = max(
        (count * sum(map(len, gram)) for gram, count in counts.items() if count > 1), default=0
    )
    return min(1.0, best / sum(map(len, words)))


@pytest.mark.parametrize("vocabulary", [3, 30, 3000])
def test_ngram_shares_match_the_definition(vocabulary):
    rng = random.Random(vocabulary)
    words = [f"w{rng.randrange(vocabulary)}" for _ in range(400)]
    words[300:330] = words[100:130]
    signals = Signals(" ".join(words))
    for n in (5, 10):
        assert signals.duplicate_ngram_char_share(n) == pytest.approx(covered_share(words, n))
    for n in (2, 3, 4):
        assert signals.top_ngram_char_share(n) == pytest.approx(top_share(words, n))


def test_line_signals():
    signals = Signals("- one.\n- two\n\n- one.\nthe end...\n")
    assert signals.duplicate_line_share == pytest.approx(1 / 4)
    assert signals.duplicate_line_char_share == pytest.approx(6 / 27)
    assert signals.bullet_line_share == pytest.approx(3 / 4)
    assert signals.ellipsis_line_share == pytest.approx(1 / 4)
    assert signals.sentence_end_share == pytest.approx(3 / 4)
    assert (signals.max_line_length, signals.mean_line_length) == (10, 27 / 4)


def test_character_signals():
    signals = Signals("abc 123 d4 _ #!")
    assert signals.letter_share == pytest.approx(4 / 11)
    assert signals.digit_share == pytest.approx(4 / 11)
    assert signals.alphabetic_word_share == pytest.approx(2 / 4)
    assert signals.symbol_word_ratio == pytest.approx(1 / 4)


def test_word_length_means_nothing_for_chinese():
    assert math.isnan(Signals("你好世界" * 50).mean_word_length)
    assert Signals("four word text here " * 5).mean_word_length == pytest.approx(4.0)


@pytest.mark.parametrize("text", ["", "\n", "!", "a", "中"])
def test_every_signal_of_almost_nothing_is_a_number(text):
    signals = Signals(text)
    for name in (
        "num_words", "letter_share", "mean_line_length", "top_2gram_char_share",
        "duplicate_10gram_char_share", "duplicate_line_share", "alphabetic_word_share",
    ):  # fmt: skip
        assert 0 <= float(getattr(signals, name)) <= 1
