"""Verifiers: right answers pass, wrong ones fail, and a failing machine is neither."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm2_jax.errors import UserError
from internlm2_jax.rlhf.verifiers import Checks, Code, Maths, Problem, Verdict, summary
from internlm2_jax.rlhf.verifiers.code import program_of, same, same_output
from internlm2_jax.rlhf.verifiers.strict import equal, final_answer, number
from internlm2_jax.sandbox import Jail, SandboxError, require

# ---------------------------------------------------------------------------------- strict


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{12}", "12"),
        ("\\boxed{1} and then \\boxed{\\frac{1}{2}} holds", "\\frac{1}{2}"),
        ("\\boxed{7} but \\boxed{unclosed", "7"),
        ("Let me think.\nThe final answer is 42.", "42"),
        ("Answer: $3$", "$3$"),
        ("  12\n", "12"),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-0.50", Fraction(-1, 2)), ("1,234.5", Fraction(2469, 2)), ("1e5", 100000),
        ("\\frac{3}{4}", Fraction(3, 4)), ("-\\dfrac{1}{2}", Fraction(-1, 2)), 
        ("1/3", Fraction(1, 3)),
        ("50\\%", Fraction(1, 2)), ("$ 7 $", 7), ("\\text{ 7 }", 7),
        ("12,34", None), ("1/0", None), ("x", None), ("", None), ("1/2/3", None), ("9" * 999, None),
        ("1e999", 10**999), ("1e9999", None), ("--1", None), ("٣", None), ("1 2", None),
    ],
)  # fmt: skip
def test_number(text, value):
    assert number(text) == value


@given(st.fractions(max_denominator=10**6))
def test_every_fraction_is_read_back(value):
    assert number(f"{value.numerator}/{value.denominator}") == value
    sign = "-" if value < 0 else ""
    assert number(f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}") == value


@given(st.text(max_size=40))
def test_no_text_breaks_the_strict_check(text):
    number(text)
    assert equal(text, text)
    final_answer(f"\\boxed{{{text}")


# ------------------------------------------------------------------------------ math-verify


@pytest.fixture(scope="module")
def maths():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    with Maths(workers=1, timeout=20) as one:
        yield one


def test_mathematics_that_letters_do_not_show(maths):
    responses = ["\\boxed{x^2+2x+1}", "\\boxed{2^3}", "\\boxed{x=5}", "\\boxed{x+1}", "12", "(((("]
    golds = ["(x+1)^2", "8", "5", "x+2", "12", "1"]
    verdicts = maths(responses, golds)
    assert [v.outcome for v in verdicts] == ["pass", "pass", "pass", "fail", "pass", "fail"]
    assert [v.disputed for v in verdicts] == [True, True, True, False, False, False]


def test_known_errors_of_math_verify_do_not_pass(maths):
    wrong = [
        ("\\boxed{3*x-1*y+13=0}", "3x + 4y + 14=0"),  # both are read as 0
        ("\\boxed{12} or \\boxed{13}", "12"),  # two boxes are one set
        ("\\boxed{1, 2, 3}", "2"),
    ]
    verdicts = maths(*zip(*wrong, strict=True))
    assert [v.outcome for v in verdicts] == ["fail"] * 3


def test_an_answer_that_never_ends_is_late_and_harms_no_other():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    with Maths(workers=1, timeout=1.5) as maths:
        tower = "\\boxed{2^{2^{2^{2^{2^{2}}}}}}"
        verdicts = maths([tower, "\\boxed{2^3}"], ["7", "8"])
    assert [v.outcome for v in verdicts] == ["timeout", "pass"]


def test_a_worker_that_dies_is_asked_again_and_then_no_more(monkeypatch):
    import pebble

    maths, asked = Maths(workers=1), []

    def dies(answer, gold):
        asked.append(answer)
        future = concurrent.futures.Future()
        future.set_exception(pebble.ProcessExpired("killed"))
        return future

    monkeypatch.setattr(maths, "_ask", dies)
    (verdict,) = maths(["a"], ["b"])
    assert verdict.outcome == "fail" and len(asked) == 2

    def breaks(answer, gold):
        future = concurrent.futures.Future()
        future.set_exception(OSError("no more processes"))
        return future

    monkeypatch.setattr(maths, "_ask", breaks)
    (verdict,) = maths(["a"], ["b"])
    assert verdict.outcome == "infrastructure" and verdict.reward is None


def test_strict_alone_needs_nothing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Maths(accept="strict")(["\\boxed{2}"], ["2"])[0].outcome == "pass"
    with pytest.raises(UserError, match=r"pip install 'internlm2-jax\[verify\]'"):
        Maths()


# ------------------------------------------------------------------------------------- code


@pytest.fixture(scope="module")
def code():
    try:
        require()
    except UserError as error:
        pytest.skip(str(error))
    return Code(workers=2)


ADD = Problem(tests=["assert add(1, 2) == 3", "assert add(b=1, a=1) == 2"], functions=["add"])
EVIL_EQUAL = """
class All(int):
    def __eq__(self, other): return True
def add(a, b): return All()
"""
EVIL_ERROR = """
import builtins
builtins.AssertionError = SystemExit
def add(a, b): raise SystemExit
"""
LOOP = "def add(a, b):\n    while True: pass"
SORTED = Problem(
    setup="import random", tests=["a = [3, 1]\nf(a)\nassert a == [1, 3]"], functions=["f"]
)
RAISES = Problem(tests=["try: f()\nexcept KeyError: pass\nelse: assert False"], functions=["f"])
SUMS = Problem(stdio=[("1\n2", "3"), ("4\n5\n", "9 \n")])
TENTHS = Problem(calls=[("f", [[1, 2]], (0.1, 0.2))])
METHOD = Problem(calls=[("Solution.add", [1, 2], 3)])
PROGRAMS = [
    ("def add(a, b): return a + b", ADD, "pass"),
    ("def add(a, b): return a - b", ADD, "fail"),
    ("def add(a, b): return 3", ADD, "fail"),
    # ways to fake a pass
    ("import os\nos._exit(0)", ADD, "fail"),
    ("import sys\nsys.exit(0)", ADD, "fail"),
    ("import os\ndef add(a, b): os._exit(0)", ADD, "fail"),
    ("import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 0", ADD, "fail"),
    (EVIL_EQUAL, ADD, "fail"),
    (EVIL_ERROR, ADD, "fail"),
    ("", ADD, "fail"),
    ("def add(:", ADD, "fail"),
    (LOOP, dataclasses.replace(ADD, tests=ADD.tests[:1], timeout=0.4), "timeout"),
    ("print(int(input()) + int(input()))", SUMS, "pass"),
    ("print(3)", SUMS, "fail"),
    ("class Solution:\n    def add(self, a, b): return a + b", METHOD, "pass"),
    ("def f(rows): return [x / 10 for x in rows]", TENTHS, "pass"),
    ("def f(rows): rows.sort()", SORTED, "pass"),
    ("def f(): raise KeyError('k')", RAISES, "pass"),
]


def test_programs_are_told_for_what_they_are(code):
    verdicts = code([p for p, _, _ in PROGRAMS], [p for _, p, _ in PROGRAMS])
    assert [v.outcome for v in verdicts] == [outcome for _, _, outcome in PROGRAMS], verdicts


def test_a_share_of_the_tests_can_count(code):
    half = Code(workers=1, score="share")
    (verdict,) = half(["def add(a, b): return 3"], [ADD])
    assert (verdict.outcome, verdict.score) == ("fail", 0.5)


def test_a_machine_that_fails_scores_nothing(code, monkeypatch):
    def start(self):
        raise SandboxError("no memory for another sandbox")

    monkeypatch.setattr(Jail, "start", start)
    (verdict,) = code(["def add(a, b): return a + b"], [ADD])
    assert verdict.outcome == "infrastructure" and verdict.reward is None


def test_tests_that_are_broken_are_no_fault_of_the_program(code):
    problem = Problem(setup="import nowhere", tests=["assert add(1, 2) == 3"], functions=["add"])
    (verdict,) = code(["def add(a, b): return a + b"], [problem])
    assert verdict.outcome == "infrastructure" and "nowhere" in verdict.detail


def test_a_program_is_found_in_its_response():
    assert program_of("Here:\n```python\nx = 1\n```\nDone.") == "x = 1\n"
    assert program_of("```py\na\n```\nand\n```\nb\n```") == "b\n"
    assert program_of("```python\nx = 1") == "x = 1"
    assert program_of("x = 1") == "x = 1"


def test_comparisons():
    assert same_output("a \nb\n\n", "a\nb") and not same_output("a\n\nb", "a\nb")
    assert same((1, [2.0]), [1, [2.0 + 1e-12]]) and same(float("nan"), float("nan"))
    assert same({"a": (1,)}, {"a": [1]})
    for value, expected in ((True, 1), (1, True), ("1", 1), ([1], [1, 2]), (None, 0), ("a", 0.5)):
        assert not same(value, expected)


# ------------------------------------------------------------------------------------- rows


def test_rows_of_all_kinds_keep_their_order():
    rows = [
        {"check": {"kind": "maths", "answer": "\\frac{1}{2}"}},
        {"check": {"kind": "exact", "answer": "cat"}},
        {"check": {"kind": "maths", "answer": "3"}},
    ]
    with Checks(maths_accept="strict") as checks:
        checks.validate(rows, "rows.jsonl")
        verdicts = checks(rows, ["0.5", "dog", "3"])
    assert [v.outcome for v in verdicts] == ["pass", "fail", "pass"]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (None, "no check of a known kind"),
        ({"kind": "poetry"}, "exact, maths, code"),
        ({"kind": "exact", "answer": 3}, "has no \"answer\" that is a text"),
        ({"kind": "code"}, "has no stdio, no calls and no tests"),
        ({"kind": "code", "tests": ["assert f()"]}, "name some in `functions`"),
        ({"kind": "code", "cases": []}, "no field 'cases'"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_checked_is_named(check, message):
    good = {"check": {"kind": "exact", "answer": "a"}}
    with pytest.raises(UserError, match=r"p\.jsonl:2: ") as error:
        Checks().validate([good, {"check": check}], "p.jsonl")
    assert message in str(error.value)


def test_summary_leaves_out_what_could_not_be_judged():
    verdicts = [
        Verdict("pass", score=1.0), Verdict("fail"), Verdict("timeout"), Verdict("infrastructure"),
    ]  # fmt: skip
    found = summary(verdicts)
    assert found["pass_rate"] == pytest.approx(1 / 3)
    assert found["timeouts"] == found["infrastructure_errors"] == 0.25
    assert summary([])["pass_rate"] == 0
