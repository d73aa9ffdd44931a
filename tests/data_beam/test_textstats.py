"""Every signal against a literal reading of its definition, on made-up texts and on real ones, and
against values worked out by hand."""

import gzip
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import text_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from data_beam.kernels.c4 import select_lines
from data_beam.kernels.repetition import ngram_shares
from data_beam.kernels.textstats import SIGNALS, Signals, share_ngram_work

# No reference: checked by hand below.
BY_HAND = {"generated_mark", "spaced_ideograph_share"}
PIECES = [
    "the", "be", "That", "word", "a", "b", "Lorem ipsum", "x_1", "3.14", "don't", "É", "cafÃ©",
    "â€™", "Ä“", "İstanbul", "你好", "世界", "我们", "。", "，", "！", "……", "「", "」", "ไทย",
    "カナ", "한국어", "привет", ".", "!", "?", "...", "…", "#", "-", "•", "----", "====", "|", "{",
    "(", ")", '"', "”", "[1]", " ", " ", " ", "  ", "\n", "\n", "\n\n", "\t", "\u3000", "\u00a0",
    "\ufffd", "\u200b", "\u200d", "\ue000", "😀", "½", "[citation needed]", "JavaScript",
    "privacy policy", "word word word word.",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


def check(text: str) -> None:
    found, expected = Signals(text), reference.signals(text)
    assert set(expected) == set(SIGNALS) - BY_HAND
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, nan_ok=True, abs=1e-12), name


def cut(text: str, removed: list[int]) -> str:
    for start, end in reversed(list(zip(removed[::2], removed[1::2], strict=True))):
        text = text[:start] + text[end:]
    return text


def check_c4(text: str) -> None:
    found = select_lines(text)
    kept, sentences = reference.c4(text)
    assert cut(text, found.removed).removesuffix("\n") == kept
    assert (found.sentences, found.lines) == (sentences, kept.count("\n") + bool(kept))


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_signals_follow_their_definitions(text):
    check(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, "a line of five words. ", "他说这是一个好主意。"]),
                max_size=60).map("".join))  # fmt: skip
def test_c4_lines_follow_their_definition(text):
    check_c4(text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_any_text_at_all_has_signals(text):
    signals = Signals(text)
    for name, kind in SIGNALS.items():
        value = getattr(signals, name)
        assert isinstance(value, kind), name
        if name.endswith("_share"):
            assert math.isnan(value) or 0 <= value <= 1
    removed = select_lines(text).removed
    assert removed == sorted(removed) and (not removed or removed[-1] <= len(text))


def pages(language: str, count: int) -> list[str]:
    paths = sorted(Path("/usr/share/man", language).glob("man*/*.gz"))
    return [gzip.decompress(path.read_bytes()).decode("utf-8", "replace") for path in paths[:count]]


@pytest.mark.parametrize("language", ["de", "fr", "ja", "ko", "ru", "zh_CN", "man1"])
def test_manual_pages(language):
    texts = pages("" if language == "man1" else language, 3)
    if not texts:
        pytest.skip(f"no manual pages in {language} on this machine")
    for text in texts:
        check(text[:8000])
        check_c4(text[:8000])


def test_literature(shared):
    play = (shared / "data/tinyshakespeare/input.txt").read_text()[:40_000]
    poems = json.loads((shared / "data/chinese_poetry/poet.tang.0.json").read_text())
    verses = "\n\n".join("\n".join(poem["paragraphs"]) for poem in poems)[:20_000]
    essay = (shared / "data/chinese_poetry/guwenguanzhi.json").read_text()[:20_000]
    for text in (play, verses, essay):
        check(text)
        check_c4(text)


@pytest.mark.parametrize("vocabulary", [3, 30, 3000])
def test_ngram_shares_of_repetitive_words(vocabulary):
    rng = random.Random(vocabulary)
    words = [f"w{rng.randrange(vocabulary)}" for _ in range(400)]
    words[300:330] = words[100:130]
    check(" ".join(words))


def test_texts_counted_together_do_not_meet():
    rng = random.Random(0)
    # The second begins with what would make another "b c" of the end of the first.
    texts = [
        "a b c a b",
        "c d",
        "",
        "one two one two",
        "你好你好你好你好你好你好",
        "one two three " * 9,
        "no",
    ]
    texts += [" ".join(f"w{rng.randrange(50)}" for _ in range(rng.randrange(3000)))
              for _ in range(150)]  # fmt: skip
    texts.append(" ".join(f"w{rng.randrange(5000)}" for _ in range(140_000)))  # alone in its group
    texts += texts[:5]
    alone = [Signals(text).ngrams for text in texts]
    assert ngram_shares([Signals(text).ngram_words for text in texts]) == alone
    together = [Signals(text) for text in texts]
    share_ngram_work(together)
    assert [one.ngrams for one in together] == alone


def test_ngrams_by_hand():
    # The most frequent 2-gram is "a b" (3 times), though "longer words" covers more.
    signals = Signals("a b c a b d a b longer words longer words")
    assert signals.top_2gram_char_share == pytest.approx(3 * 2 / (8 + 2 * 11))
    # Of the ten words repeated, the second run alone counts.
    run = "one two three four five six seven eight nine ten"
    signals = Signals(f"{run} apart {run}")
    chars = len(run.replace(" ", ""))
    for n in range(5, 11):
        share = getattr(signals, f"duplicate_{n}gram_char_share")
        assert share == pytest.approx(chars / (2 * chars + 5))
    assert Signals("a a a a").top_2gram_char_share == 1.0


def test_chinese_ngrams_are_of_words_of_two_characters():
    ten = "天地玄黄宇宙洪荒日月"
    assert Signals(f"{ten}盈{ten}").duplicate_5gram_char_share == pytest.approx(10 / 21)
    assert Signals(f"{ten}盈{ten[:9]}").duplicate_5gram_char_share == 0
    assert Signals(ten).num_words == 5


def test_lines_by_hand():
    signals = Signals("- one.\n- two\n\n- one.\nthe end...\n")
    assert signals.duplicate_line_share == pytest.approx(1 / 4)
    assert signals.duplicate_line_char_share == pytest.approx(6 / 27)
    assert signals.duplicate_paragraph_share == 0
    assert signals.bullet_line_share == pytest.approx(3 / 4)
    assert signals.ellipsis_line_share == pytest.approx(1 / 4)
    assert signals.sentence_end_share == pytest.approx(3 / 4)
    assert (signals.max_line_length, signals.mean_line_length) == (10, 27 / 4)
    assert signals.blank_line_share == pytest.approx(1 / 5)
    assert signals.newline_word_ratio == pytest.approx(5 / 5)
    paragraphs = Signals("same here\n\nother\n\nsame here\n")
    assert paragraphs.duplicate_paragraph_share == pytest.approx(1 / 3)
    assert paragraphs.duplicate_paragraph_char_share == pytest.approx(9 / 23)
    # 29 columns are short, 30 are not; a Chinese character takes two.
    assert Signals("x" * 29 + "\n" + "x" * 30).short_line_share == 0.5
    assert Signals("字" * 14 + "\n" + "字" * 15).short_line_share == 0.5


def test_words_and_characters_by_hand():
    signals = Signals("abc 123 d4 _ #!")
    assert signals.letter_share == pytest.approx(4 / 11)
    assert signals.digit_share == pytest.approx(4 / 11)
    assert signals.alphabetic_word_share == pytest.approx(2 / 5)
    assert signals.symbol_word_ratio == pytest.approx(1 / 5)
    assert signals.punctuation_share == pytest.approx(3 / 11)
    assert signals.space_share == pytest.approx(4 / 15)
    assert Signals("# one ... two … three").symbol_word_ratio == pytest.approx(2 / 6)
    assert Signals("The dogs of war, and THE men.").english_stop_words == 3
    assert Signals("caf\u00c3\u00a9 ok").mojibake_share == pytest.approx(2 / 8)
    assert Signals("a\ufffdb\u0007").abnormal_char_share == pytest.approx(2 / 4)
    assert Signals("ab ab").char_entropy == pytest.approx(1.0)
    assert Signals("aaab").top_char_share == pytest.approx(0.75)
    assert Signals("ab ====== cd --").repeated_mark_share == pytest.approx(6 / 12)
    assert Signals("One. Two (or so.) Pi is 3.14 now").words_per_sentence == pytest.approx(9 / 2)
    assert Signals('("Is it so?") Yes.').words_per_sentence == pytest.approx(4 / 2)
    assert Signals("他来了。你呢？好！").words_per_sentence == pytest.approx(3 / 3)
    spaced = Signals("s p a c e d  o u t words of text")
    assert spaced.single_letter_word_share == pytest.approx(9 / 12)
    assert Signals("你 好 世 界 你 好 世 界 你 好").spaced_ideograph_share == pytest.approx(9 / 10)
    assert Signals("你好世界 你好世界你好").spaced_ideograph_share == pytest.approx(1 / 10)


def test_word_length_means_nothing_for_chinese():
    assert math.isnan(Signals("你好世界" * 50).mean_word_length)
    assert Signals("four word text here " * 5).mean_word_length == pytest.approx(4.0)
    assert Signals("한국어 문장은 " * 5).mean_word_length == pytest.approx(6.0)


def test_generated_files_say_so():
    for head in ("// Code generated by protoc. DO NOT EDIT.", "# @generated", "/* AutoGenerated */",
                 "This file was generated by hand"):  # fmt: skip
        assert Signals(head).generated_mark == 1
        assert Signals("x" * 1500 + head).generated_mark == 0
    assert Signals("We edit and modify generated text.").generated_mark == 0


def test_c4_by_hand():
    text = (
        "Home | About\n\nThis is a sentence that stays here.\nToo short.\n"
        "Please enable JavaScript to read this page.\n  A claim with a source.[12]  \n"
        "Read more about this and that...\n我们今天讨论这个问题。\n"
    )
    found = select_lines(text)
    assert cut(text, found.removed) == (
        "This is a sentence that stays here.\nA claim with a source.\n我们今天讨论这个问题。\n"
    )
    assert (found.lines, found.sentences) == (3, 3)


def test_every_value_is_a_plain_number():
    signals = Signals("Some words. " * 30)
    for name in SIGNALS:
        assert not isinstance(getattr(signals, name), np.generic), name
