"""C4's choice of lines (Raffel et al. 2020, section 2.2): what remains of a page, as spans to cut.

Removed: lines that do not end in a terminal punctuation mark or closing quotation mark, or end in
an ellipsis; of fewer than five words; with the word "javascript"; with one of the phrases of policy
notices; and, as in the reference code though not in the paper (tensorflow_datasets,
text/c4_utils.py), with a word of more than 1,000 characters. Citation marks ("[1]", "[edit]",
"[citation needed]") are cut out of the lines first.

Choices: the marks of every script end a line, so that Chinese survives; words are chunks (see
`textstats`), for the same reason; sentences are counted by their ends, at least one a line, where
the reference uses NLTK's English model.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from data_beam.kernels import characters
from data_beam.kernels.textarrays import TextArrays

_MIN_WORDS = 5
_MAX_WORD = 1000  # characters
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_PHRASES = (
    "javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies",
    "use of cookies", "use cookies",
)  # fmt: skip


class C4Lines(NamedTuple):
    """`removed` [start, end, start, end, ...] characters of the text; `lines` kept, `sentences` in
    them."""

    removed: list[int]
    lines: int
    sentences: int


def select_lines(text: str, arrays: TextArrays | None = None) -> C4Lines:
    """`arrays` are those of `text`, where the caller has them already."""
    citations = [match.span() for match in _CITATION.finditer(text)] if "[" in text else []
    places = None
    if citations:
        kept = np.ones(len(text), bool)
        for start, end in citations:
            kept[start:end] = False
        places = np.flatnonzero(kept)
        arrays = TextArrays(_CITATION.sub("", text))
    elif arrays is None:
        arrays = TextArrays(text)
    starts, ends = _good_lines(arrays)
    counts = np.searchsorted(arrays.sentence_ends, ends, "right")
    counts -= np.searchsorted(arrays.sentence_ends, starts, "right")
    sentences = int(np.maximum(counts, 1).sum())
    if places is not None and len(starts):
        starts, ends = places[starts], places[ends - 1] + 1
    return C4Lines(_complement(text, starts, ends, citations), len(starts), sentences)


def _good_lines(arrays: TextArrays) -> tuple[np.ndarray, np.ndarray]:
    starts, ends = arrays.lines.starts, arrays.lines.ends
    words = np.searchsorted(arrays.chunks, ends) - np.searchsorted(arrays.chunks, starts)
    good = (arrays.line_end_flags & (characters.TERMINAL | characters.QUOTE)) != 0
    good &= words >= _MIN_WORDS
    good &= ~arrays.ellipsis_lines
    lower = arrays.text.lower()
    if len(lower) != len(arrays.text):  # a few capitals become two characters
        lower = "".join(low if len(low := c.lower()) == 1 else c for c in arrays.text)
    for phrase in _PHRASES:
        at = lower.find(phrase)
        while at >= 0:
            number = int(np.searchsorted(starts, at, "right")) - 1
            if at < ends[number]:
                good[number] = False
            at = lower.find(phrase, at + 1)
    bounds = np.append(arrays.chunks, len(arrays.text))
    for chunk in np.flatnonzero(np.diff(bounds) > _MAX_WORD):
        start, end = bounds[chunk], bounds[chunk + 1]
        if len(arrays.text[start:end].rstrip()) > _MAX_WORD:
            good[np.searchsorted(starts, start, "right") - 1] = False
    return starts[good], ends[good]


def _complement(
    text: str, starts: np.ndarray, ends: np.ndarray, citations: list[tuple[int, int]]
) -> list[int]:
    """Spans outside the lines, but for the newline after each."""
    cut: list[list[int]] = []

    def remove(start: int, end: int) -> None:
        if cut and cut[-1][1] == start:
            cut[-1][1] = end
        elif start < end:
            cut.append([start, end])

    inside = iter(citations)
    citation = next(inside, None)
    position = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        remove(position, start)
        while citation is not None and citation[0] < end:
            if citation[0] >= start:
                remove(*citation)
            citation = next(inside, None)
        newline = text.find("\n", end)
        newline = len(text) if newline < 0 else newline
        remove(end, newline)
        position = newline + 1
    remove(position, len(text))
    return [place for span in cut for place in span]
