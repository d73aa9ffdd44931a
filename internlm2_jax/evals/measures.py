"""How answers are graded. A measure takes items with a response each and gives a mark each.

A response that crashes, hangs or attacks costs its own item and no other; where the machine fails
and nothing is known, there is no score and the totals say how often.
"""

from __future__ import annotations

import ast
import atexit
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from internlm2_jax.evals import rules
from internlm2_jax.evals.formats import LETTERS
from internlm2_jax.evals.items import Item
from internlm2_jax.evals.suites import Suite
from internlm2_jax.evals.texts import f1, normal, rouge_l, similar
from internlm2_jax.rlhf.verifiers import Code, Maths, Problem, Verdict, strict
from internlm2_jax.rlhf.verifiers.code import program_of
from internlm2_jax.rlhf.verifiers.maths import Accept


@dataclass(frozen=True)
class Mark:
    """Attributes:
    score: from 0 to 1; None where nothing is known.
    answer: the final answer that was read, for votes; "" where there was none.
    outcome, detail: see `Verdict`.
    """

    score: float | None
    answer: str = ""
    outcome: str = "pass"
    detail: str = ""

    @classmethod
    def of(cls, score: float, answer: str = "", detail: str = "") -> Mark:
        return cls(float(score), answer, "pass" if score == 1 else "fail", detail)


Pairs = Sequence[tuple[Item, str]]
Measure = Callable[[Suite, Pairs], list[Mark]]

# ------------------------------------------------------------------------------ texts


def taken(suite: Suite, response: str) -> str:
    """The part of a response that is the answer: all, its first line, or what it says is it."""
    part = suite.options.get("take", "all")
    if part == "line":
        return response.strip().split("\n")[0].strip()
    return strict.final_answer(response) if part == "answer" else response.strip()


def _best(compare: Callable[[str, str], float]) -> Measure:
    """The best comparison with any right answer."""

    def measure(suite: Suite, pairs: Pairs) -> list[Mark]:
        marks = []
        for item, response in pairs:
            said = taken(suite, response)
            marks.append(Mark.of(max(compare(said, r) for r in item.answers), normal(said)))
        return marks

    return measure


def _contains_all(suite: Suite, pairs: Pairs) -> list[Mark]:
    """The share of the right answers that the response has; 1 for any where one is enough (RULER's
    string_match_all and string_match_part)."""
    marks = []
    for item, response in pairs:
        said = response.lower()
        found = [answer.lower() in said for answer in item.answers]
        share = float(any(found)) if item.check.get("any") else sum(found) / len(found)
        marks.append(Mark.of(share, normal(response)[:200]))
    return marks


def _class(suite: Suite, pairs: Pairs) -> list[Mark]:
    """The longest class that the response names, of those its row lists (LongBench)."""
    marks = []
    for item, response in pairs:
        named = [
            c for c in item.check.get("classes") or item.answers if c.lower() in response.lower()
        ]
        said = max(named, key=len, default="")
        marks.append(Mark.of(said in item.answers, said))
    return marks


def _number(suite: Suite, pairs: Pairs) -> list[Mark]:
    """The share of the numbers in the response that are the right one (LongBench's synthetic)."""
    marks = []
    for item, response in pairs:
        said = re.findall(r"\d+", response)
        right = re.findall(r"\d+", item.answers[0])
        share = sum(n in right for n in said) / len(said) if said else 0.0
        marks.append(Mark.of(share, said[0] if said else ""))
    return marks


# ------------------------------------------------------------------------------ choices

_SAID = (
    re.compile(
        r"(?:answer|答案|选项?)\s*(?:is|are|为|是|选)?\s*[:：]?\s*\**[\[(（【]?\s*([A-Z])\b", re.I
    ),
    re.compile(r"^\s*[\[(（【*]*([A-Z])(?:[\])）】*.:：、\s]|$)"),
    re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z'])"),
)  # fmt: skip


def letter(response: str, count: int) -> str:
    """The letter that a response chooses of `count`, "" for none.

    The last that follows "answer", else one that it begins with, else the last alone.
    """
    allowed = LETTERS[:count]
    for number, pattern in enumerate(_SAID):
        found = [m.upper() for m in pattern.findall(response) if m.upper() in allowed]
        if found:
            return found[0] if number == 1 else found[-1]
    return ""


def _choice(suite: Suite, pairs: Pairs) -> list[Mark]:
    """A letter of the choices, or the text of the only one that the response repeats."""
    marks = []
    for item, response in pairs:
        said = letter(response, len(item.choices))
        if not said:
            inside = [
                i for i, c in enumerate(item.choices) if normal(c) and normal(c) in normal(response)
            ]
            said = LETTERS[inside[0]] if len(inside) == 1 else ""
        right = said in {LETTERS[i] for i in item.right}
        marks.append(Mark.of(right, said, "" if said else "no choice was read"))
    return marks


def _letters(suite: Suite, pairs: Pairs) -> list[Mark]:
    """GAOKAO: all letters and no other is 1, some of them and no other 1/2."""
    marks = []
    for item, response in pairs:
        said = re.findall(r"[A-G]", strict.final_answer(response).rpartition("】")[2])
        right = set(item.answers[0])
        if not item.check.get("letters"):
            marks.append(Mark.of(normal(item.answers[0]) == normal(taken(suite, response))))
            continue
        chosen = set(said)
        score = 1.0 if chosen == right else 0.5 if chosen and chosen < right else 0.0
        marks.append(Mark.of(score, "".join(sorted(chosen))))
    return marks


# ------------------------------------------------------------------------------ verified


def _maths(suite: Suite, pairs: Pairs) -> list[Mark]:
    """The final answer equals the right one, strictly or by math-verify."""
    verify = _verifier(suite.options.get("accept", "either"))
    said = [answer_of(response) for _, response in pairs]
    verdicts = verify([f"\\boxed{{{s}}}" for s in said], [item.answers[0] for item, _ in pairs])
    return [_of_verdict(v, _vote(s)) for v, s in zip(verdicts, said, strict=True)]


def answer_of(response: str) -> str:
    """The last box, what follows the last "answer is" or "####", else the last number."""
    if "####" in response:
        return response.rpartition("####")[2].strip().split("\n")[0].strip(" .$")
    found = strict.final_answer(response)
    if found != response.strip():
        return found.strip(" $")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", response)
    return numbers[-1].rstrip(",") if numbers else found


@functools.cache
def _verifier(accept: Accept) -> Maths:
    """One for the whole process: its workers take seconds to begin."""
    verify = Maths(accept=accept)
    atexit.register(verify.close)
    return verify


def _vote(answer: str) -> str:
    """One spelling for every way to write a number."""
    value = strict.number(answer)
    return normal(answer) if value is None else str(value)


def _code(suite: Suite, pairs: Pairs) -> list[Mark]:
    """All tests pass in the sandbox. A program that begins in the prompt is put together first."""
    timeout = suite.options.get("timeout", 10.0)
    programs, problems = [], []
    for item, response in pairs:
        check = item.check
        programs.append(f"```python\n{_program(item, response)}\n```")
        problems.append(
            Problem(
                tests=check["tests"],
                functions=check["functions"],
                setup=check.get("setup", ""),
                timeout=timeout,
            )
        )
    verdicts = Code()(programs, problems)
    return [_of_verdict(v, p) for v, p in zip(verdicts, programs, strict=True)]


def _program(item: Item, response: str) -> str:
    """HumanEval's prompt with its continuation, or with a whole program from a fenced block."""
    before = item.check.get("before", "")
    code = program_of(response)
    code = code.replace("```", "") if code is response else code
    if not before:
        return code
    if re.search(rf"^def {re.escape(item.check['entry'])}\b", code, re.M):
        return f"{before}    pass\n\n{code}"  # its imports and helpers stand before
    return before + code


def _of_verdict(verdict: Verdict, answer: str) -> Mark:
    return Mark(verdict.reward, answer, verdict.outcome, verdict.detail)


def _rules(suite: Suite, pairs: Pairs) -> list[Mark]:
    """IFEval: 1 where every rule of the prompt is kept; `loose` as in the paper's section 3."""
    keep = rules.followed_loosely if suite.options.get("loose") else rules.followed
    marks = []
    for item, response in pairs:
        kept = keep(response, item.check["rules"])
        broken = [name for (name, _), k in zip(item.check["rules"], kept, strict=True) if not k]
        marks.append(
            Mark.of(float(all(kept)), detail=f"breaks {', '.join(broken)}" if broken else "")
        )
    return marks


# ------------------------------------------------------------------------------ tools


def _call(suite: Suite, pairs: Pairs) -> list[Mark]:
    """T-Eval, instruct: share of the name and the arguments that are right; 0 for a bad form."""
    marks = []
    for item, response in pairs:
        called = read_call(response, item.check)
        if called is None:
            marks.append(Mark.of(0.0, detail=f"no call in the {item.check['style']} form"))
            continue
        action, given = called
        right = item.check["args"]
        hits = (action == item.check["action"]) + sum(
            given.get(k, "") == v for k, v in right.items()
        )
        said = json.dumps([action, given], ensure_ascii=False, sort_keys=True)
        marks.append(Mark.of(hits / (len(right) + 1), said))
    return marks


def read_call(response: str, check: Any) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call, None where it is not in the form that was asked for."""
    template = check["template"]
    if check["style"] == "json":
        inside = re.search(r"```(?:json)?\s*(.*?)```", response, re.S)
        try:
            value = json.loads(inside.group(1) if inside else response)
            action, given = value[template["action"]], value[template["args"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return (str(action), given if isinstance(given, dict) else {})
    marks = [
        template[f"{part}_{side}"]
        for part in ("thought", "action", "args")
        for side in ("start", "end")
    ]
    pattern = "{}(.*?){}{}(.*?){}{}(.*?){}".format(*map(re.escape, marks))
    match = re.search(pattern if marks[-1] else pattern + r"\Z", response, re.S)
    if not match:
        return None
    try:
        given = ast.literal_eval(match.group(3).strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        given = {}
    return match.group(2).strip(), given if isinstance(given, dict) else {}


def _ungraded(suite: Suite, pairs: Pairs) -> list[Mark]:
    """Answers that only a judge can tell apart (judge.py)."""
    return [Mark(None, outcome="ungraded") for _ in pairs]


MEASURES: dict[str, Measure] = {
    "choice": _choice,
    "letters": _letters,
    "exact": _best(lambda a, b: float(normal(a) == normal(b))),
    "contains": _best(lambda a, b: float(normal(b) in normal(a))),
    "f1": _best(f1),
    "rouge_l": _best(rouge_l),
    "similar": _best(similar),
    "contains_all": _contains_all,
    "class": _class,
    "number": _number,
    "maths": _maths,
    "code": _code,
    "rules": _rules,
    "call": _call,
    "judge": _ungraded,  # pairs: the model under test is the judge, by likelihood
    "session": _ungraded,  # graded while it runs
    "none": _ungraded,
}
