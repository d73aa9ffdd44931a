"""The rules of each preset: every one with a document that breaks it first, and the published ones
with the papers' own numbers."""

import math
import random

import numpy as np
import pyarrow as pa
import pytest

from data_beam.attributes.base import Examined
from data_beam.attributes.signals import C4Lines, TextSignals
from data_beam.mix import rules
from data_beam.schema import Document

RNG = random.Random(0)
VOCABULARY = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(2, 9)))
              for _ in range(3000)]  # fmt: skip
GOPHER = {
    "num_words": (50, 100_000), "mean_word_length": (3, 10), "symbol_word_ratio": (None, 0.1),
    "bullet_line_share": (None, 0.9), "ellipsis_line_share": (None, 0.3),
    "alphabetic_word_share": (0.8, None), "english_stop_words": (2, None),
    "duplicate_line_share": (None, 0.3), "duplicate_paragraph_share": (None, 0.3),
    "duplicate_line_char_share": (None, 0.2), "duplicate_paragraph_char_share": (None, 0.2),
    "top_2gram_char_share": (None, 0.2), "top_3gram_char_share": (None, 0.18),
    "top_4gram_char_share": (None, 0.16),
    **{f"duplicate_{n}gram_char_share": (None, round(0.2 - n / 100, 2)) for n in range(5, 11)},
}  # fmt: skip
FINEWEB = {
    "terminal_line_share": (0.12, None), "short_line_share": (None, 0.67),
    "duplicate_line_char_share": (None, 0.1), "newline_word_ratio": (None, 0.3),
}  # fmt: skip


def reasons(texts: list[str], preset: str, source: str = "text", lang: str = "en") -> list[str]:
    """Of every text the reason why the preset drops it, "" when it does not."""
    batch = [Examined(Document(f"{i:032x}", text, source)) for i, text in enumerate(texts)]
    columns = {}
    for attribute in (TextSignals(), C4Lines()):
        table = pa.table(attribute.compute(batch), attribute.schema)
        columns |= {f"{attribute.name}.{name}": table[name] for name in table.column_names}
    found = np.full(len(texts), "", object)
    for rule in rules.rules_for(source, rules.load(preset)):
        if rule.lang is None or lang in rule.lang:
            found[(found == "") & rules.broken(rule, columns)] = rule.reason
    return list(found)


def words(count: int, seed: int = 0) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


def prose(count: int, seed: int = 0) -> str:
    some = words(count, seed)
    return "".join(" ".join(some[i : i + 12]) + ".\n" for i in range(0, count, 12))


def english(count: int, seed: int = 0) -> str:
    """Prose with stop words."""
    return "".join(f"To {line[:-1]} of the day.\n" for line in prose(count, seed).splitlines())


def program(count: int, seed: int = 0) -> str:
    lines = [f"def {a}({b}):\n    return {b}.{c}" for a, b, c in
             zip(*(words(count, seed + i) for i in range(3)), strict=True)]  # fmt: skip
    return "\n\n".join(lines) + "\n"


def han(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return "".join("".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(30)) + "。\n"
                   for _ in range(count))  # fmt: skip


def repeated(phrase: str, times: int, gap: int, source=words) -> str:
    return "".join(f"{phrase} {' '.join(source(gap, seed=i))}.\n" for i in range(times))


def copies(size: int, different: int, gap: int, lines: int) -> str:
    """Lines of `size` words out of a stock of `different` such runs, then `gap` new words."""
    return "".join(
        f"{' '.join(words(size, seed=i % different))} {' '.join(words(gap, seed=1000 + i))}.\n"
        for i in range(lines)
    )


TEXT = {
    "too_short": "Too short to say anything.",
    "too_long": prose(160_000),
    "generated": "This file was generated, do not edit.\n" + prose(200),
    "mojibake": prose(60).replace(".", "Ã©"),
    "abnormal_characters": prose(60).replace(".", "\ufffd"),
    "long_line": " ".join(words(4000)),
    "short_lines": "\n".join(words(200)),
    "blank_lines": prose(100).replace("\n", "\n\n\n\n\n"),
    "one_word_lines": "\n".join("".join(words(3, seed=i)) for i in range(60)),
    "white_space": prose(100).replace(" ", " " * 12),
    "spaced_letters": "\n".join(" ".join(" ".join(w) for w in words(9, seed=i)) for i in range(20)),
    "spaced_ideographs": " ".join(han(20)).replace(" \n ", "\n"),
    "too_few_words": "\n".join(f"{''.join(words(12, seed=i))} {i}" for i in range(6)),
    "encoded_data": prose(200) + "x" * 1200,
    "word_length": "\n".join(" ".join(w * 4 for w in words(6, seed=i)) for i in range(30)),
    "few_letters": "\n".join(f"{w} 1234567 == 8901 ++ 22." for w in words(100)),
    "one_character": "\n".join(f"{w}zzzzzz ends here." for w in words(100)),
    "few_characters": "\n".join(
        " ".join("".join(random.Random(f"{i} {j}").choices("abcdefgh", k=5)) for j in range(9))
        for i in range(40)),
    "few_alphabetic_words": "\n".join(f"{w}{w}{w}{w} 1 2 3 4 and." for w in words(100)),
    "symbols": "".join(f"{line[:-1]} #{line[0]} # ?\n" for line in prose(300).splitlines()),
    "punctuation": "\n".join(f"<<{w}>> [[{w[::-1]}]]" for w in VOCABULARY if len(w) == 5),
    "one_mark": "\n".join(", ".join(words(8, seed=i)) for i in range(40)),
    "drawn_lines": "\n".join(f"{' '.join(words(5, seed=i))}\n----====~~~~++++"
                             for i in range(30)),
    "bullets": "".join(f"- {line}\n" for line in prose(300).splitlines()),
    "ellipses": prose(300).replace(".\n", "...\n"),
    "no_sentences": prose(300).replace(".\n", "\n"),
    "no_punctuation": prose(600).replace(".", ":") + prose(600, seed=1).replace(".", ";"),
    "repeated_lines": prose(600) + "Returns.\n" * 100,
    "repeated_line_chars": prose(300) + prose(72, seed=1) * 4,
    "top_2gram": repeated("overwhelmingly repetitive", 30, 9),
    "top_3gram": repeated("these same three", 30, 9),
    "top_4gram": repeated("we say it again", 30, 8),
    "repeated_5grams": "".join(
        f"{' '.join(words(5, seed=i % 40))} {VOCABULARY[i]}.\n" for i in range(200)),
    "repeated_10grams": copies(14, 40, 14, 120),
}  # fmt: skip
CODE = {
    "too_short": "x = 1\n",
    "too_long": program(40_000),
    "generated": "# Code generated by tool. DO NOT EDIT.\n" + program(40),
    "mojibake": program(40).replace("return", "rÃ©tÃ©rn"),
    "abnormal_characters": program(40).replace("return", "\ufffd" * 6),
    "long_line": program(40) + "x = [" + "a, " * 500 + "]\n",
    "minified": "\n".join(";".join(words(40, seed=i)) for i in range(20)),
    "too_few_words": "a = (\n" + "((((())))) + [[[[]]]] \n" * 10 + ")\n",
    "encoded_data": program(40) + "key = '" + "A" * 300 + "'\n",
    "few_letters": "\n".join(f"{w} = [[{i}], [({{}})], ((--1))]" for i, w in
                             enumerate(words(60))),
    "digits": "\n".join(f"measured_{w} = {10**8 + i}" for i, w in enumerate(words(100))),
    "repeated_lines": program(40) + "    pass  # nothing\n" * 400,
    "repeated_10grams": "\n".join(
        f"print({', '.join(words(11, seed=i % 20))}, {i})" for i in range(80)),
}  # fmt: skip
BROKEN_GOPHER = {
    "too_few_words": english(30),
    "too_many_words": english(80_000),
    "word_length": "\n".join(f"be of {' '.join(w * 4 for w in words(9, seed=i))}."
                             for i in range(30)),
    "symbols": "".join(f"{line} #{line[3]} #a #b\n" for line in english(300).splitlines()),
    "bullets": "".join(f"- {line}\n" for line in english(300).splitlines()),
    "ellipses": english(300).replace(".\n", "...\n"),
    "few_alphabetic_words": "".join(f"{line} 1 2 3 4 5 6\n" for line in english(300).splitlines()),
    "no_stop_words": prose(300),
    "repeated_lines": english(300) + "So it goes.\n" * 15,
    "repeated_paragraphs": "\n\n".join(
        [english(300), *(english(24, seed=10 + i) for i in range(6)), *["So it\n goes."] * 8]),
    "repeated_line_chars": english(300) + english(120, seed=1) * 2,
    # The same lines, but for the white space inside of paragraphs, which counts there alone.
    "repeated_paragraph_chars": "\n\n".join(
        [*english(300).splitlines(), *[("\n" + " " * 150).join(["so", "it", "goes", "on"])] * 3]),
    "top_2gram": repeated("overwhelmingly repetitive", 30, 9).replace(".\n", " of the.\n"),
    "top_3gram": repeated("these same three", 30, 9) + "of the",
    "top_4gram": repeated("we say it again", 30, 8) + "of the",
    "repeated_5grams": copies(5, 15, 8, 60) + "of the",
    "repeated_6grams": copies(6, 19, 21, 60) + "of the",
    "repeated_7grams": copies(7, 19, 27, 60) + "of the",
    "repeated_8grams": copies(8, 19, 34, 60) + "of the",
    "repeated_9grams": copies(9, 19, 43, 60) + "of the",
    "repeated_10grams": copies(10, 19, 55, 60) + "of the",
}  # fmt: skip
BROKEN_C4 = {
    "lorem_ipsum": english(100) + "Lorem ipsum dolor sit amet.\n",
    "curly_bracket": english(100) + "if (x) { return; }\n",
    "too_few_sentences": "One short line.\nTwo here.\n" + "This line alone is long enough.\n" * 2,
}
BROKEN_FINEWEB = {
    "line_punctuation": prose(300).replace(".\n", "\n"),
    "short_lines": prose(120) + "\n".join(f"{w}." for w in words(30)),
    "repeated_line_chars": prose(300) + prose(48, seed=1) * 2,
    "list": "\n\n\n".join(f"{' '.join(words(6, seed=i))} and so on." for i in range(30)),
}


@pytest.mark.parametrize(
    "preset, source, broken",
    [
        ("internlm2_text", "text", TEXT),
        ("internlm2_code", "code", CODE),
        ("gopher", "text", BROKEN_GOPHER),
        ("c4", "text", BROKEN_C4),
        ("fineweb", "text", BROKEN_FINEWEB),
    ],
)
def test_every_rule_has_a_document_that_breaks_it_first(preset, source, broken):
    found = reasons(list(broken.values()), preset, source)
    assert found == list(broken)
    assert set(broken) == {rule.reason for rule in rules.load(preset)[source]}


@pytest.mark.parametrize("preset", ["internlm2_text", "gopher", "c4", "fineweb"])
def test_ordinary_text_passes(preset):
    texts = [english(300), english(3000, seed=1)]
    assert reasons(texts, preset) == ["", ""]
    assert reasons([han(20), han(200, seed=1)], preset, lang="zh") == ["", ""]


def test_ordinary_code_passes():
    assert reasons([program(40), program(400, seed=1)], "internlm2_code", "code") == ["", ""]


def limits(preset: str) -> dict[str, tuple]:
    def known(limit: float) -> float | None:
        return limit if math.isfinite(limit) else None

    found: dict[str, tuple] = {}
    for rule in rules.load(preset)["text"]:
        name = rule.signal.removeprefix("signals.")
        low, high = found.get(name, (None, None))
        found[name] = (known(rule.minimum) or low, known(rule.maximum) or high)
    return found


def test_published_limits():
    assert limits("gopher") == GOPHER
    assert limits("fineweb") == FINEWEB
    assert [(rule.signal, rule.minimum, rule.maximum) for rule in rules.load("c4")["text"]] == [
        ("signals.lorem_ipsum", -math.inf, 0),
        ("signals.curly_bracket", -math.inf, 0),
        ("c4.sentences", 3, math.inf),
    ]


def test_a_value_at_the_limit_passes():
    """Columns are float32, and the float32 next to 0.3 is above 0.3."""
    seven = "".join(f"{line}\n" for line in english(84).splitlines())
    three = english(36, seed=1).replace(".\n", "...\n")
    text = seven + three
    assert text.count("\n") == 10 and text.count("...\n") == 3
    assert reasons([text], "gopher") == [""]


def test_other_languages_need_no_english_stop_words():
    assert reasons([prose(300)], "gopher", lang="de") == [""]


@pytest.mark.parametrize("preset", ["internlm2_text", "internlm2_code", "gopher", "c4", "fineweb"])
def test_rules_name_columns_that_exist(preset):
    columns = {
        f"{attribute.name}.{name}"
        for attribute in (TextSignals, C4Lines)
        for name in attribute.schema.names
    }
    for some in rules.load(preset).values():
        assert {rule.signal for rule in some} <= columns
