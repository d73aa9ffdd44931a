"""Words, their hashes and n-grams against a plain Python reading of the same rules."""

import re
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_beam.kernels.tokens import (
    IDEOGRAPH,
    character_classes,
    codepoints,
    ngram_hashes,
    tokenize,
)


def words(text: str) -> list[str]:
    tokens = tokenize(text)
    low = text.lower()
    return [low[s:e] for s, e in zip(tokens.starts, tokens.ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World_2!", ["hello", "world_2"]),
        ("你好，世界 abc中文x", ["你", "好", "世", "界", "abc", "中", "文", "x"]),
        ("한국어 단어", ["한국어", "단어"]),  # Hangul has spaces
        ("カナ", ["カ", "ナ"]),
        ("", []),
        ("—… !!", []),
        ("e\u0301a", ["e\u0301a"]),  # a combining mark belongs to its word
        ("a\ud800b", ["a", "b"]),  # a lone surrogate is no letter and no error
        ("𠀀𠀁", ["𠀀", "𠀁"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_words_agree_with_a_regular_expression_on_spaced_text():
    text = "Der Straße-Test: x1 + y_2 == ΣΑΣ\t(foo.bar)\n«цитата» naïve\n" * 7
    assert words(text) == re.findall(r"\w+", text.lower())


def test_the_hash_depends_on_the_letters_only():
    text = "tea eat ate TEA x" + " filler" * 5000 + " tea"
    tokens = tokenize(text)
    tea, eat, ate, upper = (int(h) for h in tokens.hashes[:4])
    assert tea == upper == int(tokens.hashes[-1]) == int(tokenize("tea").hashes[0])
    assert len({tea, eat, ate}) == 3


def test_no_collision_among_many_words():
    text = " ".join(f"w{n}" for n in range(200_000))
    assert len(np.unique(tokenize(text).hashes)) == 200_000


def test_ngrams_depend_on_order_and_content():
    hashes = tokenize("a b c d a b c").hashes
    grams = ngram_hashes(hashes, 3)
    assert len(grams) == 5 and grams[0] == grams[4]
    assert len(set(grams[:4].tolist())) == 4
    assert len(ngram_hashes(hashes, 8)) == 0


def test_character_classes_follow_unicode():
    for character in "aZ9_é中ぁー한ก":
        assert character_classes()[ord(character)], character
    for character in " \n.,;(){}—。、":
        assert not character_classes()[ord(character)], unicodedata.name(character, "control")
    assert character_classes()[ord("中")] == IDEOGRAPH
    assert codepoints("a😀").tolist() == [97, 0x1F600]


def test_the_hash_of_a_word_does_not_depend_on_its_text():
    """Nor on the way that text is read: the same word in plain ASCII and beside other scripts."""
    words_ = ["a", "eight888", "nine_nine", "sixteen_bytes_16", "seventeen_bytes17", "x" * 31,
              "x" * 32, "x" * 33, "long" * 100, "große", "привет", "中"]  # fmt: skip
    alone = [int(tokenize(word).hashes[0]) for word in words_]
    together = tokenize("\u3002" + " ".join(words_) + " tail").hashes[:-1].tolist()
    assert alone == together
    assert len(set(alone)) == len(words_)
    only_ascii = [word for word in words_ if word.isascii()]
    assert tokenize(" ".join(only_ascii)).hashes.tolist() == [
        hash_ for word, hash_ in zip(words_, alone, strict=True) if word.isascii()
    ]


@given(st.lists(st.text(st.characters(categories=("Ll", "Nd")), min_size=1, max_size=70)))
def test_equal_hashes_mean_equal_words(some):
    joined = " ".join(some)
    tokens = tokenize(joined)
    low = joined.lower()
    by_hash = {}
    for start, end, hash_ in zip(tokens.starts, tokens.ends, tokens.hashes.tolist(), strict=True):
        assert by_hash.setdefault(hash_, low[start:end]) == low[start:end]
    assert len(set(by_hash.values())) == len(by_hash)


@given(st.text())
def test_spans_of_any_text_are_ordered_and_apart(text):
    tokens = tokenize(text)
    assert len(tokens.codepoints) == len(text.lower())
    assert (tokens.starts < tokens.ends).all()
    assert (tokens.starts[1:] >= tokens.ends[:-1]).all()
    classes = character_classes()[tokens.codepoints]
    assert (tokens.ends - tokens.starts).sum() == np.count_nonzero(classes)


def test_one_word_of_megabytes_takes_no_time():
    text = "A" * 20_000_000 + " end"
    start = time.process_time()
    tokens = tokenize(text)
    assert len(tokens.hashes) == 2
    assert time.process_time() - start < 3


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_ngrams_of_every_order_are_distinct_sums(n):
    hashes = tokenize(" ".join(f"w{number % 50}" for number in range(300))).hashes
    grams = ngram_hashes(hashes, n)
    assert len(grams) == 300 - n + 1
    for first, second in ((0, 50), (7, 107)):
        assert grams[first] == grams[second]
    assert len(set(grams.tolist())) == 50
