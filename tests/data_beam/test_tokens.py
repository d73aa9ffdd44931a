"""Words, their hashes and n-grams against a plain Python reading of the same rules."""

import re
import unicodedata

import numpy as np
import pytest

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
