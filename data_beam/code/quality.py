"""How good a source file is, by rules that do not look at style: is it documented, named, free of
repetition, data and dead code, does it parse (the InternLM2 report, section 3.1.2, found code style
to be unreliable). A score in [0, 1], the weighted mean of what each feature is worth.

The report gives no formula. The features and what they are worth are ours; `tests` hold them to an
order: spoiling a program in one way must not raise its score.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections import Counter
from typing import NamedTuple

import numpy as np

from data_beam.code import lexing
from data_beam.code.header import legal_notice
from data_beam.code.languages import DATA_LANGUAGES
from data_beam.code.tokens import indentation, unify_line_ends

MAX_CHARS = 1_000_000  # looked at; what comes after is more of the same
_MAX_PARSED = 200_000  # characters of Python given to the parser, and per line
_MAX_PARSED_LINE = 20_000
_MAX_INDENT = 200

_WORD = re.compile(r"\w+")
_TODO = re.compile(r"TODO\b|FIXME\b|XXX\b|HACK\b")
_TESTS = (
    "assert", "expect(", "def test_", "@Test", "#[test]", "func Test", "describe(", "TEST(",
    "TEST_F(", "REQUIRE(", "EXPECT_",
)  # fmt: skip
_DEFINES = (
    "def", "class", "func", "fn", "function", "fun", "sub", "struct", "trait", "impl", "interface",
    "enum", "defun", "procedure", "proc", "module",
)  # fmt: skip
# A body in braces after brackets is a function's, or belongs to one of these.
_BODY = re.compile(
    r"\)[ \t\n]*(?:(?:const|noexcept|override|final|throws [\w., \t\n]+)[ \t\n]*)*\{"
)
_CONTROLS = ("if", "for", "while", "switch", "catch", "match", "foreach", "synchronized", "using")
_CODE_IN_COMMENT = re.compile(
    r"[;{}]\s*$|^\s*(?:if|for|while|return|import|from|def|elif|var|let|const|else)\b.*[:;({\])]\s*$"
    r"|^\s*[\w.\[\]]+\s*(?:[-+*/|&]?=|:=)\s*\S|^\s*[\w.]+\([^()]*\)\s*;?\s*$|^\s*#\s*(?:define|include)\b"
)
_COMMENT_MARKS = re.compile(
    r"^\s*(?:/?\*+|//+|#+|--+|;+|%+|\"\"\"|''')?!?\s?|\s*(?:\*+/|\"\"\"|''')\s*$"
)
# Words of the languages themselves say nothing about naming.
_KEYWORDS = frozenset(
    (
        "abstract", "and", "as", "assert", "async", "auto", "await", "bool", "boolean", "break",
        "byte", "case", "catch", "char", "class", "const", "continue", "def", "default", "del",
        "delete", "do", "double", "elif", "else", "enum", "except", "export", "extends",
        "extern", "false", "final", "finally", "float", "fn", "for", "from", "func", "function",
        "if", "implements", "import", "in", "instanceof", "int", "interface", "is", "lambda",
        "let", "long", "match", "mod", "module", "mut", "namespace", "new", "nil", "none",
        "not", "null", "nullptr", "of", "operator", "or", "override", "package", "pass",
        "private", "protected", "pub", "public", "raise", "return", "self", "short", "signed",
        "sizeof", "static", "std", "str", "string", "struct", "super", "switch", "this",
        "throw", "throws", "trait", "true", "try", "type", "typedef", "typeof", "union",
        "unsigned", "use", "using", "var", "virtual", "void", "volatile", "where", "while",
        "with", "yield",
    )
)  # fmt: skip


class Features(NamedTuple):
    """Shares lie in [0, 1]; NaN where a feature means nothing for the file."""

    code_lines: float  # not blank, not comment
    comment_share: float  # of visible characters, licence notice apart; Python's docstrings count
    dead_code_share: float  # comment lines that look like code, of all lines
    todo_density: float  # per 100 lines
    name_length: float  # mean of the distinct names, characters
    short_name_share: float  # names of one character, of all names
    name_entropy: float  # bits per name
    duplicate_line_share: float  # code lines of ten characters or more that stood before
    long_line_share: float  # lines above 120 characters
    number_share: float  # of visible characters of code
    string_share: float  # of visible characters
    nesting: float  # mean level of indentation
    definitions: float  # per 100 code lines
    tests: float  # 1 with tests or assertions
    syntax: float  # 1 valid, 0 not: Python parsed, brackets balanced elsewhere


class Worth(NamedTuple):
    """What a value of a feature is worth: linear between the points (value, worth in [0, 1])."""

    feature: str
    weight: float
    points: tuple[tuple[float, float], ...]


WORTH = (
    Worth("syntax", 3.0, ((0, 0), (1, 1))),
    Worth(
        "comment_share", 2.0, ((0, 0.2), (0.05, 0.7), (0.12, 1), (0.45, 1), (0.7, 0.4), (0.9, 0))
    ),
    Worth("name_length", 1.5, ((1, 0), (3, 0.4), (5, 0.8), (7, 1), (15, 1), (30, 0.5))),
    Worth("short_name_share", 1.5, ((0, 1), (0.15, 0.8), (0.6, 0))),
    Worth("name_entropy", 1.5, ((1, 0), (3, 0.3), (5, 0.8), (6.5, 1))),
    Worth("duplicate_line_share", 1.5, ((0, 1), (0.1, 0.9), (0.4, 0.3), (0.7, 0))),
    Worth("number_share", 1.5, ((0, 1), (0.08, 0.9), (0.3, 0.2), (0.5, 0))),
    Worth("string_share", 1.0, ((0, 1), (0.35, 0.8), (0.7, 0.2), (0.95, 0))),
    Worth("dead_code_share", 1.0, ((0, 1), (0.05, 0.7), (0.3, 0))),
    Worth("todo_density", 0.5, ((0, 1), (1, 0.8), (5, 0.2), (15, 0))),
    Worth("long_line_share", 1.0, ((0, 1), (0.05, 0.8), (0.3, 0.2), (0.6, 0))),
    Worth("nesting", 1.0, ((0, 0.6), (0.7, 1), (2.5, 0.9), (4, 0.4), (7, 0))),
    Worth("definitions", 1.0, ((0, 0.3), (1, 0.8), (3, 1))),
    Worth("code_lines", 1.5, ((1, 0), (5, 0.3), (20, 0.8), (60, 1), (3000, 1), (15000, 0.5))),
    Worth("tests", 0.5, ((0, 0.6), (1, 1))),
)


def scorable(lang: str) -> bool:
    """Whether the rules say anything about `lang`: programs, not settings and data."""
    return lang not in ("", "und") and lang not in DATA_LANGUAGES


def features(text: str, lang: str) -> Features:
    text = unify_line_ends(text[:MAX_CHARS])
    text = text[len(legal_notice(text)) :]
    spans = lexing.scan(text, lang)
    comments, strings = _split(text, spans, lang)
    code = lexing.blank(text, spans)
    lines = [stripped for line in code.split("\n") if (stripped := line.strip())]
    visible = len("".join(text.split()))
    code_visible = sum(len("".join(line.split())) for line in lines)
    all_lines = text.count("\n") + 1
    words = Counter(_WORD.findall(code))
    numbers = sum(count * len(word) for word, count in words.items() if word[0].isdigit())
    names = Counter(
        {w: n for w, n in words.items() if not w[0].isdigit() and w.lower() not in _KEYWORDS}
    )
    num_names = names.total()
    num_comment_code = sum(
        _looks_like_code(line) for comment in comments for line in comment.split("\n")
    )
    long_lines = sum(len(line) > 120 for line in text.split("\n"))
    substantial = [line for line in lines if len(line) >= 10]
    known = lexing.known(lang)
    return Features(
        code_lines=len(lines),
        comment_share=_visible(comments) / max(visible, 1) if known else math.nan,
        dead_code_share=num_comment_code / all_lines if known else math.nan,
        todo_density=100 * sum(len(_TODO.findall(comment)) for comment in comments) / all_lines,
        name_length=sum(map(len, names)) / len(names) if names else math.nan,
        short_name_share=(
            sum(count for name, count in names.items() if len(name) == 1) / num_names
            if num_names
            else math.nan
        ),
        name_entropy=_entropy(names) if num_names >= 20 else math.nan,
        duplicate_line_share=(len(substantial) - len(set(substantial))) / max(len(substantial), 1),
        long_line_share=long_lines / all_lines,
        number_share=numbers / max(code_visible, 1),
        string_share=_visible(strings) / max(visible, 1) if known else math.nan,
        nesting=_nesting(code),
        definitions=100 * _definitions(code, words) / max(len(lines), 1),
        tests=float(any(mark in code for mark in _TESTS)),
        syntax=_syntax(text, code, lang),
    )


def rule_score(text: str, lang: str) -> float:
    """NaN for what the rules say nothing about."""
    return score(features(text, lang)) if scorable(lang) else math.nan


def score(found: Features) -> float:
    """Weighted mean over the features that mean something. A file that does not parse gets at most
    half of it: nothing else it shows can be relied on."""
    total = weights = 0.0
    for worth in WORTH:
        value = getattr(found, worth.feature)
        if not math.isnan(value):
            xs, ys = zip(*worth.points, strict=True)
            total += worth.weight * float(np.interp(value, xs, ys))
            weights += worth.weight
    mean = total / weights if weights else 0.0
    return mean * (0.5 if found.syntax == 0 else 1.0)


def _split(text: str, spans: list[lexing.Span], lang: str) -> tuple[list[str], list[str]]:
    """Texts of the comments and of the strings; a docstring counts as a comment."""
    comments, strings = [], []
    for kind, start, end in spans:
        piece = text[start:end]
        if kind == lexing.COMMENT or (lang == "python" and _is_docstring(text, start, piece)):
            comments.append(piece)
        else:
            strings.append(piece)
    return comments, strings


def _is_docstring(text: str, start: int, piece: str) -> bool:
    if not piece.startswith(('"""', "'''")):
        return False
    near = text[max(0, start - _MAX_INDENT) : start]
    return not near.rpartition("\n")[2].strip(" \trRuU") and ("\n" in near or start == len(near))


def _visible(pieces: list[str]) -> int:
    return sum(len("".join(piece.split())) for piece in pieces)


def _definitions(code: str, words: Counter[str]) -> int:
    """Functions and types, counted by the words and braces that begin them."""
    bodies = len(_BODY.findall(code)) - sum(words[word] for word in _CONTROLS)
    return max(bodies, sum(words[word] for word in _DEFINES))


def _looks_like_code(line: str) -> bool:
    line = line.rstrip()
    if len(line) < 4 or (line[-1] not in ";{}()]:," and "=" not in line and "#" not in line):
        return False
    content = _COMMENT_MARKS.sub("", line)
    return len(content) > 3 and _CODE_IN_COMMENT.search(content[:300]) is not None


def _entropy(counts: Counter[str]) -> float:
    numbers = np.fromiter(counts.values(), np.float64, len(counts))
    shares = numbers / numbers.sum()
    return float(-(shares * np.log2(shares)).sum())


def _nesting(code: str) -> float:
    """Mean level over the lines of code."""
    offsets, levels = indentation(code)
    if not offsets:
        return 0.0
    # A level holds from its line to the next change: weigh by lines between.
    newlines = np.flatnonzero(
        np.frombuffer(code.encode("utf-32-le", "surrogatepass"), np.uint32) == 10
    )
    starts = np.searchsorted(newlines, offsets)
    lengths = np.diff(np.append(starts, len(newlines) + 1))
    before = int(starts[0])
    return float((np.array(levels) * lengths).sum() / max(lengths.sum() + before, 1))


def _syntax(text: str, code: str, lang: str) -> float:
    if lang == "python":
        return _parses(text)
    if lang in _BALANCED:
        return _balanced(code)
    return math.nan


def _parses(text: str) -> float:
    """NaN for what is too large to be worth it. The parser's own limits (depth of nesting, of
    recursion) count as a fault: no person writes such a file."""
    if len(text) > _MAX_PARSED or max(map(len, text.split("\n"))) > _MAX_PARSED_LINE:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return 0.0
    return 1.0


_BALANCED = frozenset(
    ("c", "c++", "java", "go", "rust", "c#", "kotlin", "scala", "swift", "javascript", "typescript",
     "php", "dart", "cuda", "zig", "d", "julia", "r")
)  # fmt: skip


def _balanced(code: str) -> float:
    """Whether as many brackets close as open; one in a hundred may be off, for preprocessor
    conditionals open a bracket in each of their branches."""
    counts = [(code.count("("), code.count(")")), (code.count("["), code.count("]"))]
    counts.append((code.count("{"), code.count("}")))
    return float(all(abs(opened - closed) <= 0.01 * (opened + closed) for opened, closed in counts))
