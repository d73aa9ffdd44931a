"""Scores: spoiling a program must not raise them. Grades: shares of bytes, agreement of models."""

import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_beam.attributes.base import Examined
from data_beam.attributes.code_quality import CodeQuality
from data_beam.attributes.licences import Licence, programming_language
from data_beam.code import lexing, quality
from data_beam.code.grades import (
    EPOCHS,
    HIGH,
    LOW,
    MODERATE,
    REPORT_SHARES,
    Cut,
    Scored,
    agreement,
    calibrate,
    from_json,
    grade,
    histogram,
    overturned,
    separation,
    to_json,
)
from data_beam.code.quality import features, rule_score, scorable
from data_beam.schema import Document, document_id
from internlm2_jax.errors import UserError

STANDARD = Path(json.__file__).parents[1]
NAMES = ["ast", "bdb", "calendar", "csv", "dis",
         "ftplib", "gettext", "heapq", "netrc", "platform",
         "sched", "shelve", "shlex", "smtplib", "string", "tempfile", "textwrap", "trace", "uuid"]  # fmt: skip
FILES = {name: (STANDARD / f"{name}.py").read_text() for name in NAMES}

SQUARE = '''"""Areas of shapes."""


def square_area(side_length):
    """The area of a square of `side_length` metres, in square metres."""
    if side_length < 0:
        raise ValueError(f"side length {side_length} is negative")
    return side_length * side_length


def total_area(lengths):
    # Squares only; circles come later.
    return sum(square_area(length) for length in lengths)
'''


def without_comments(text: str) -> str:
    spans = [s for s in lexing.scan(text, "python") if s.kind == lexing.COMMENT]
    text = lexing.blank(text, spans)
    return re.sub(r'(?ms)^([ \t]*)[rR]?""".*?"""', r"\1pass", text)


def short_names(text: str) -> str:
    spans = lexing.scan(text, "python")
    names = sorted(set(re.findall(r"\b[a-z_]\w{3,}\b", lexing.blank(text, spans))))
    names = [name for name in names if name not in quality._KEYWORDS]
    letters = {name: "abcdefgh"[number % 8] for number, name in enumerate(names)}
    return re.sub(r"\b[a-z_]\w{3,}\b", lambda m: letters.get(m[0], m[0]), text)


def broken(text: str) -> str:
    return text.replace("def ", "def (", 1)


def repeated(text: str) -> str:
    return text + text + text


def with_data(text: str) -> str:
    rows = "\n".join(
        "    " + ", ".join(str(n * k % 9973) for k in range(12)) + ","
        for n in range(len(text) // 40)
    )
    return f"{text}\nTABLE = [\n{rows}\n]\n"


def with_dead_code(text: str) -> str:
    """Every function once more, commented out."""
    lines = [f"# {line}" for line in text.split("\n") if line.strip() and not line.startswith("#")]
    return text + "\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "spoil", [without_comments, short_names, broken, repeated, with_data, with_dead_code]
)
def test_spoiling_lowers_the_score(spoil):
    lower = [
        rule_score(spoil(text), "python") < rule_score(text, "python") for text in FILES.values()
    ]
    assert sum(lower) >= 0.9 * len(lower), [
        n for n, low in zip(FILES, lower, strict=True) if not low
    ]


def test_style_does_not_count():
    rng = random.Random(0)
    for text in FILES.values():
        tabs = re.sub(r"(?m)^(?: {4})+", lambda m: "\t" * (len(m[0]) // 4), text)
        spaced = re.sub(r"(?m)(?<!\\)$", lambda m: " " * rng.randrange(3), text)
        assert rule_score(tabs, "python") == pytest.approx(rule_score(text, "python"), abs=0.01)
        assert rule_score(spaced, "python") == pytest.approx(rule_score(text, "python"), abs=0.01)


def test_features_of_a_small_program():
    found = features(SQUARE, "python")
    assert found.code_lines == 6
    assert 0.3 < found.comment_share < 0.6
    assert found.syntax == 1 and found.tests == 0 and found.todo_density == 0
    assert found.duplicate_line_share == 0 and found.number_share == pytest.approx(
        1 / 216, abs=0.01
    )
    assert found.definitions == pytest.approx(100 * 2 / 6)
    assert 0.5 < found.nesting < 2
    todo = features(SQUARE.replace("# Squares", "# TODO squares"), "python")
    assert todo.todo_density == pytest.approx(100 / 14, rel=0.1)


def test_the_notice_of_copyright_is_no_documentation():
    notice = "# Copyright 2020 A. Author\n" + "# All rights reserved.\n" * 20
    assert features(notice + SQUARE, "python") == features(SQUARE, "python")


@pytest.mark.parametrize(
    ("text", "lang", "expected"),
    [
        ("def f(:\n", "python", 0), ("print 'two'\n", "python", 0), ("x = 1\n", "python", 1),
        ("\x00", "python", 0), ("(" * 5000, "python", 0), ("-" * 15_000 + "1", "python", 0),
        ("x = 1\n" * 50_000, "python", math.nan),
        ("int f() { return (1); }", "c", 1), ("int f() { return (1; }", "c", 0),
        ('char *s = "(((";', "c", 1), ("# a", "make", math.nan),
    ],
)  # fmt: skip
def test_syntax(text, lang, expected):
    found = features(text, lang).syntax
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_what_is_not_scored():
    assert not scorable("json") and not scorable("und") and not scorable("") and scorable("python")
    assert math.isnan(rule_score("{}", "json"))


@given(st.text(max_size=400), st.sampled_from(["python", "c", "rust", "haskell", "unknown"]))
def test_scores_lie_in_zero_to_one(text, lang):
    assert 0 <= rule_score(text, lang) <= 1


def test_every_feature_has_a_worth():
    assert {worth.feature for worth in quality.WORTH} == set(quality.Features._fields)
    for worth in quality.WORTH:
        xs = [x for x, _ in worth.points]
        assert xs == sorted(xs) and all(0 <= y <= 1 for _, y in worth.points)


@pytest.mark.parametrize(
    "unit", ["(", ") ", "a ", "\n", "# x = 1\n", "def ", "    x\n  y\n", '"', "{}"]
)
def test_hostile_texts_take_linear_time(unit):
    text = unit * (300_000 // len(unit))
    start = time.process_time()
    features(text, "python")
    features(text, "c")
    assert time.process_time() - start < 4


# --- Grades ---


def test_calibration_gives_the_shares_of_bytes_in_every_language():
    rng = np.random.default_rng(0)
    histograms, rows = {}, []
    for lang, low in (("python", 0.5), ("c", 0.0)):
        scores = rng.uniform(low, low + 0.5, 5000)
        sizes = rng.integers(100, 10_000, 5000)
        shards = [histogram(scores[n::4], sizes[n::4]) for n in range(4)]
        histograms[lang] = sum(shards)
        np.testing.assert_array_equal(histograms[lang], histogram(scores, sizes))
        rows += [(lang, score, size) for score, size in zip(scores, sizes, strict=True)]
    cuts = calibrate(histograms)
    assert cuts["c"].high < cuts["python"].low
    for lang in histograms:
        total = sum(size for name, _, size in rows if name == lang)
        for kind, share in zip((HIGH, MODERATE, LOW), REPORT_SHARES, strict=True):
            found = sum(s for name, v, s in rows if name == lang and grade(cuts, name, v) == kind)
            assert found / total == pytest.approx(share, abs=0.005)
    assert EPOCHS[HIGH] > EPOCHS[MODERATE] > EPOCHS[LOW] == 0


def test_small_languages_lose_nothing():
    histograms = {
        "python": histogram([0.5], [1_000_000]),
        "zig": histogram([0.1, 0.2, 0.9], [20, 100, 20]),
    }
    cuts = calibrate(histograms)
    assert grade(cuts, "zig", 0.0) == MODERATE
    assert calibrate(histograms, keep_below=0)["zig"].low > 0


def test_files_without_a_score_or_a_cut_are_moderate():
    cuts = {"python": Cut(0.4, 0.8), "go": Cut(0.4, 0.8, "model")}
    assert [grade(cuts, "python", s) for s in (0.39, 0.4, 0.79, 0.8, math.nan)] == [
        LOW, MODERATE, MODERATE, HIGH, MODERATE,
    ]  # fmt: skip
    assert grade(cuts, "cobol", 0.1) == MODERATE
    assert grade(cuts, "go", 0.1, 0.9) == HIGH  # the model's score counts there
    assert grade(cuts, "go", 0.9) == MODERATE
    assert histogram([math.nan, 0.5], [7, 8]).sum() == 8


def test_cut_offs_are_kept_as_json():
    cuts = {"python": Cut(0.4, 0.8), "go": Cut(0.4, 0.8, "model")}
    assert from_json(json.loads(json.dumps(to_json(cuts)))) == cuts
    for bad in (None, {"python": 1}, {"python": {"low": 1}}):
        with pytest.raises(UserError, match="cut-offs"):
            from_json(bad)


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (1.0,)])
def test_shares_add_up(shares):
    with pytest.raises(UserError, match="shares"):
        calibrate({}, shares)


@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 5), max_size=8))
def test_separation_counts_pairs(up, down):
    pairs = [(u > d) + 0.5 * (u == d) for u in up for d in down]
    found = separation(up, down)
    assert math.isnan(found) if not pairs else found == pytest.approx(sum(pairs) / len(pairs))


def test_a_model_is_used_where_it_agrees():
    rng = random.Random(0)
    rows = []
    for n in range(400):
        rule, label = n / 400, int(n >= 200)
        rows.append(Scored("python", rule, label + rng.random(), label))  # agrees with people
        rows.append(Scored("go", rule, rng.random(), label))  # knows nothing
        rows.append(Scored("c", rule, rule + rng.random() / 4))  # no labels: agrees with the rules
        rows.append(Scored("java", rule, -rule))  # contradicts them
        rows.append(Scored("r", rule, math.nan))
    rows += [Scored("zig", n / 5, n / 5) for n in range(5)]  # too few to tell
    found = agreement(rows)
    assert {lang for lang, one in found.items() if one.accepted} == {"python", "c"}
    assert found["python"].reference == "labels" and found["python"].separation == 1
    assert found["c"].reference == "rules" and "r" not in found
    models = {"python": histogram([r.model / 2 for r in rows if r.lang == "python"], [1] * 400)}
    rules = {"python": histogram([r.rule for r in rows if r.lang == "python"], [1] * 400)}
    assert calibrate(rules, models=models)["python"].scorer == "model"


def test_labels_that_a_scorer_overturns():
    labels = {"a": 1, "b": 0, "c": 1, "d": 0}
    assert overturned(labels, {"a": LOW, "b": HIGH, "c": HIGH, "d": MODERATE}) == ["a", "b"]


# --- Attributes ---


def document(path: str, text: str, source: str = "code", **fields) -> Document:
    return Document(document_id(source, path, text), text, source, path=path, **fields)


DOCUMENTS = [
    document("a/square.py", SQUARE, repo="r"),
    document("a/LICENSE", "Apache License\nVersion 2.0, January 2004\n", repo="r"),
    document("a/x_pb2.py", "# SPDX-License-Identifier: GPL-2.0\nx = 1\n", repo="r"),
    document("README.md", "# Shop", repo="r"),
    document("", "int main() { return 0; }", lang="c"),
    document("", "A page of prose.", source="text"),
]


def test_attributes():
    batch = [Examined(one) for one in DOCUMENTS]
    found = Licence().compute(batch)
    assert list(found) == Licence.schema.names
    assert found["spdx"] == [None, "Apache-2.0", "GPL-2.0-only", None, None, None]
    assert found["permissive"] == [None, True, False, None, None, None]
    assert found["generated"] == [False, False, True, False, False, None]
    assert found["generated_reason"] == [None, None, "generated_name", None, None, None]
    assert Licence(allowed=("GPL-2.0-only",)).compute(batch)["permissive"][1:3] == [False, True]
    scores = CodeQuality().compute(batch)
    assert list(scores) == CodeQuality.schema.names
    assert [math.isnan(score) for score in scores["rule_score"]] == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    assert scores["rule_score"][0] == pytest.approx(rule_score(SQUARE, "python"))
    assert scores["comment_share"][0] == features(SQUARE, "python").comment_share


@pytest.mark.parametrize(
    ("one", "expected"),
    [(DOCUMENTS[0], "python"), (DOCUMENTS[3], None), (DOCUMENTS[4], "c"), (DOCUMENTS[5], None),
     (document("x.h", "class A;\n", lang="c"), "c++"), (document("README", "x", lang="c"), None)],
)  # fmt: skip
def test_the_language_of_a_document(one, expected):
    assert programming_language(one) == expected


def test_values_fit_the_schema_and_do_not_depend_on_neighbours():
    import pyarrow as pa

    for attribute in (Licence(), CodeQuality()):
        together = attribute.compute([Examined(one) for one in DOCUMENTS])
        for place, one in enumerate(DOCUMENTS):
            alone = attribute.compute([Examined(one)])
            for field in attribute.schema:
                whole = pa.array(together[field.name], field.type)
                assert pa.array(alone[field.name], field.type)[0].equals(whole[place]) or (
                    math.isnan(alone[field.name][0]) and math.isnan(together[field.name][place])
                )
