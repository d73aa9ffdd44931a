"""Words of a program and changes of indentation, for the search of duplicates at file level.

The report (section 3.1.2) compares whole files with a tokenizer for which two spaces, four spaces
and a tab are the same indentation. Here a line counts by its level: how many indentations it stands
in, as Python's own tokenizer counts them. A notice of copyright at the top is left out: it makes
unrelated files alike (of the pairs among 150 files of Java, 2.0 % had J >= 0.5 with it, 0.2 %
without).

Punctuation is left out. Counting it would double the work, and move the Jaccard similarity of word
5-grams of files in which 3 % of the words were changed from 0.77 to 0.86, so that the usual
threshold of 0.7 would stand for twice as many edits; unrelated files score alike either way.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from data_beam.code.header import legal_notice
from data_beam.kernels.tokens import (
    Tokens,
    character_classes,
    codepoints,
    hash_slices,
    mix64,
    spans,
)

# So that a change of indentation has a hash of its own, whatever words are hashed to.
_CHANGE = 0xD1B54A32D192ED03
_MAX_CHANGE = 64


@functools.cache
def _ascii_classes() -> bytes:
    return character_classes()[:256].tobytes()


class _Levels:
    """Leading white space to level. A file mixes widths as it likes, as long as an inner block
    stands further to the right than its outer one; tabs reach to the next multiple of eight."""

    def __init__(self) -> None:
        self.stack = [0]

    def level(self, space: str) -> int:
        width = len(space.expandtabs(8))
        stack = self.stack
        while stack[-1] > width:
            stack.pop()
        if width > stack[-1]:
            stack.append(width)
        return len(stack) - 1


def unify_line_ends(text: str) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def indentation(text: str) -> tuple[list[int], list[int]]:
    """Offsets of the first character of the lines that stand at another level than the line before,
    and their levels. Blank lines have none. Lines end with \\n."""
    levels = _Levels()
    offsets, values = [], []
    previous, current, offset = "", 0, 0
    for line in text.split("\n"):
        content = line.lstrip()
        if content:
            width = len(line) - len(content)
            space = line[:width]
            if space != previous:
                previous = space
                level = levels.level(space)
                if level != current:
                    offsets.append(offset + width)
                    values.append(level)
                    current = level
        offset += len(line) + 1
    return offsets, values


def tokenize_code(text: str) -> Tokens:
    """Words as they are written, and one token for each line whose level differs from that of the
    line before, with an empty span at its first character. The code points are those of the text
    without its notice of copyright and with \\n as line end."""
    text = unify_line_ends(text)
    program = text[len(legal_notice(text)) :]
    text = program if program.strip() else text
    points = codepoints(text)
    data = text.encode("utf-8", "surrogatepass")
    if len(data) == len(text):
        starts, ends = spans(np.frombuffer(data.translate(_ascii_classes()), np.uint8))
        hashes = hash_slices(data, starts, ends)
    else:
        starts, ends = spans(character_classes().take(points))
        first_byte = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)
        first_byte = np.append(first_byte, len(data))
        hashes = hash_slices(data, first_byte.take(starts), first_byte.take(ends))
    offsets, levels = indentation(text)
    if not offsets:
        return Tokens(points, starts, ends, hashes)
    changes = np.diff(np.array([0, *levels])).clip(-_MAX_CHANGE, _MAX_CHANGE)
    marks = mix64((changes + _MAX_CHANGE).astype(np.uint64) + np.uint64(_CHANGE))
    where = np.array(offsets)
    # A change stands before the word at its place.
    places = starts.searchsorted(where) + np.arange(len(where))
    words = np.ones(len(starts) + len(where), bool)
    words[places] = False
    merged = (np.empty(len(words), array.dtype) for array in (starts, ends, hashes))
    result = []
    for target, source, extra in zip(
        merged, (starts, ends, hashes), (where, where, marks), strict=True
    ):
        target[words] = source
        target[places] = extra
        result.append(target)
    return Tokens(points, *result)


def normalized_lines(text: str) -> list[str]:
    """Lines that are not blank, each with one space per level and nothing after its last
    character."""
    levels = _Levels()
    lines = []
    previous, indent = "", ""
    for line in unify_line_ends(text).split("\n"):
        content = line.strip()
        if not content:
            continue
        space = line[: line.index(content[0])]
        if space != previous:
            previous = space
            indent = " " * levels.level(space)
        lines.append(indent + content)
    return lines


def normalized_hash(text: str) -> bytes:
    """16 bytes, equal for files that differ only in how wide their indentation is, in tabs, blank
    lines, white space at line ends, line ends and a byte order mark; files whose lines nest
    differently get different ones."""
    whole = "\n".join(normalized_lines(text.removeprefix("\ufeff")))
    return hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).digest()
