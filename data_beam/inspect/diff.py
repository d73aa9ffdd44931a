"""Two texts side by side: equal lines once, changed lines next to each other with the words that
differ marked, long equal stretches left out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from internlm2_jax.report.blocks import Piece, Row

# Comparing is quadratic in the worst case: more than this of a text is not looked at.
MAX_CHARS = 60_000
MAX_LINE = 2_000
MAX_ROWS = 24
_CONTEXT = 1  # equal lines around a change
_KEEP = 60  # characters of an equal stretch inside a line, on either side of a change
# A word, one character of a script without spaces, white space, or any other character.
_PARTS = re.compile(r"[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+|\s+|.", re.DOTALL)


def compare(left: str, right: str, max_rows: int = MAX_ROWS) -> list[Row]:
    """What differs between two texts, at most `max_rows` rows of it; one row when nothing does."""
    whole = max(len(left), len(right)) <= MAX_CHARS
    if left == right:
        return [Row(skipped=f"The texts are the same, all {len(left):,} characters.")]
    rows: list[Row] = []
    for row in _rows(_lines(left[:MAX_CHARS]), _lines(right[:MAX_CHARS])):
        if len(rows) == max_rows:
            rows.append(Row(skipped="More differences follow."))
            return rows
        rows.append(row)
    if not whole:
        rows.append(Row(skipped=f"Only the first {MAX_CHARS:,} characters are compared."))
    return rows


def _lines(text: str) -> list[str]:
    """Lines; very long ones are cut, at the same places in both texts if these agree before."""
    return [
        line[start : start + MAX_LINE]
        for line in text.split("\n")
        for start in range(0, max(len(line), 1), MAX_LINE)
    ]


def _rows(left: list[str], right: list[str]) -> Iterator[Row]:
    matcher = difflib.SequenceMatcher(None, left, right)
    codes = matcher.get_opcodes()
    for number, (tag, start, end, other, other_end) in enumerate(codes):
        if tag != "equal":
            yield from _changed(left[start:end], right[other:other_end])
            continue
        before = _CONTEXT if number else 0
        after = _CONTEXT if number < len(codes) - 1 else 0
        if end - start <= before + after + 1:
            yield from (Row(same=_short(line)) for line in left[start:end])
            continue
        yield from (Row(same=_short(line)) for line in left[start : start + before])
        yield Row(skipped=f"{end - start - before - after:,} equal lines")
        yield from (Row(same=_short(line)) for line in left[end - after : end])


def _changed(left: list[str], right: list[str]) -> Iterator[Row]:
    """Lines that were replaced, paired in their order. A blank line that only one side has is
    shown as a sign, since nothing would be seen."""
    for number in range(max(len(left), len(right))):
        one, two = (side[number] if number < len(side) else None for side in (left, right))
        pieces = _pieces(one or "", two or "")
        rest = (
            found or ([Piece("¶", True)] if line == "" else [])
            for found, line in zip(pieces, (one, two), strict=True)
        )
        yield Row(left=next(rest), right=next(rest))


def _pieces(left: str, right: str) -> tuple[list[Piece], list[Piece]]:
    """Both lines in pieces, what differs marked."""
    ones, twos = _PARTS.findall(left), _PARTS.findall(right)
    result: tuple[list[Piece], list[Piece]] = ([], [])
    codes = _opcodes(ones, twos)
    for number, (tag, start, end, other, other_end) in enumerate(codes):
        ends = (number == 0, number == len(codes) - 1)
        for side, words in enumerate((ones[start:end], twos[other:other_end])):
            text = "".join(words)
            if text:
                shown = _middle(text, *ends) if tag == "equal" else _short(text, 600)
                result[side].append(Piece(shown, tag != "equal"))
    return result


def _opcodes(ones: list[str], twos: list[str]) -> list[tuple[str, int, int, int, int]]:
    """difflib's opcodes. What both begin and end with is matched first: difflib looks for anchors
    among rare words only (all words would take it minutes for a line of two words repeated), and
    would miss a single edit in such a line."""
    shorter = min(len(ones), len(twos))
    head = next((n for n in range(shorter) if ones[n] != twos[n]), shorter)
    rest = shorter - head
    tail = next((n for n in range(rest) if ones[-1 - n] != twos[-1 - n]), rest)
    inner = difflib.SequenceMatcher(
        None, ones[head : len(ones) - tail], twos[head : len(twos) - tail]
    )
    codes: list[tuple[str, int, int, int, int]] = []
    if head:
        codes.append(("equal", 0, head, 0, head))
    codes += [
        (tag, start + head, end + head, other + head, other_end + head)
        for tag, start, end, other, other_end in inner.get_opcodes()
    ]
    if tail:
        codes.append(("equal", len(ones) - tail, len(ones), len(twos) - tail, len(twos)))
    return codes


def _middle(text: str, first: bool, last: bool) -> str:
    """An equal stretch, its middle left out; only its end before the first change, and so on."""
    head, tail = (0 if first else _KEEP), (0 if last else _KEEP)
    if len(text) <= head + tail + _KEEP:
        return text
    return f"{text[:head]} … {text[len(text) - tail :]}"


def _short(text: str, length: int = 160) -> str:
    return text if len(text) <= length else f"{text[:length]} …"
