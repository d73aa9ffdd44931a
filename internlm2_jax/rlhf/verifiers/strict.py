"""A strict check of a final answer: the last boxed text or all of a short one, equal as a number or
as text. It never guesses: what it cannot read as a number is compared letter by letter."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER = re.compile(r"(?:final answer|answer)(?: is)?\s*:?\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?", re.I | re.A)
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_SPACE = re.compile(r" (?!\w)|(?<!\w) ")  # of no meaning, unless it parts two words or numbers
_DRESS = (r"\left", r"\right", r"\,", r"\!", r"\;", r"\ ", r"\$", "$")
MOST_DIGITS = 200


def final_answer(response: str) -> str:
    """The text of the last \\boxed{...}; else what follows the last "answer"; else all of it."""
    starts = [match.end() for match in _BOXED.finditer(response)]
    for start in reversed(starts):
        if (inside := _to_brace(response, start)) is not None:
            return inside.strip()
    lines = response.strip().splitlines()
    for line in reversed(lines):
        if match := _ANSWER.search(line):
            return match.group(1).strip().rstrip(".")
    return response.strip()


def _to_brace(text: str, start: int) -> str | None:
    """What lies between `start` and the brace that closes there; None where none does."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return None


def number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal, a fraction or a percentage; None for all else.

    Commas must group by three; 1e5 is a hundred thousand. More than MOST_DIGITS letters are no
    number: somebody is joking.
    """
    text = _undressed(text).replace("\\%", "%")
    if not text or len(text) > MOST_DIGITS:
        return None
    if text.endswith("%"):
        part = number(text[:-1])
        return None if part is None else part / 100
    if match := _FRACTION.fullmatch(text):
        sign, top, bottom = match.groups()
        value = _ratio(top, bottom)
        return value if value is None or sign != "-" else -value
    if text.count("/") == 1:
        return _ratio(*text.split("/"))
    if not _NUMBER.fullmatch(text) or ("," in text and not _GROUPED.fullmatch(text)):
        return None
    try:
        return Fraction(Decimal(text.replace(",", "")))
    except (InvalidOperation, ValueError):
        return None


def _ratio(top: str, bottom: str) -> Fraction | None:
    above, below = number(top), number(bottom)
    return None if above is None or not below else above / below


def _undressed(text: str) -> str:
    for dress in _DRESS:
        text = text.replace(dress, "")
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    return _SPACE.sub("", " ".join(text.split()))


def equal(answer: str, gold: str) -> bool:
    """Whether two final answers are one number, or the same text but for white space and dress."""
    left, right = number(answer), number(gold)
    if left is not None and right is not None:
        return left == right
    return _undressed(answer) == _undressed(gold)
