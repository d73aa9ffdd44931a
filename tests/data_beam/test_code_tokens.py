"""Indentation: what is equal, what is not, and the tokens for near-duplicates."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_beam.code.tokens import (
    indentation,
    normalized_hash,
    normalized_lines,
    tokenize_code,
)

STANDARD = Path(json.__file__).parents[1]
NOTICE = "# Copyright 2020 A. Author\n# Licensed under the MIT License.\n"

# A program as (level, text) of its lines, where a level rises by one at most.
LINE = st.sampled_from(["x = 1", "if a:", "return f(x)", "# note", "y += 'a  b'"])


@st.composite
def programs(draw):
    level, lines = 0, []
    for _ in range(draw(st.integers(1, 12))):
        lines.append((level, draw(LINE)))
        level = draw(st.integers(0, level + 1))
    return lines


def render(program, unit: str, end: str = "\n", trailing: str = "", blank: bool = False) -> str:
    out = []
    for level, text in program:
        out.append(unit * level + text + trailing + end)
        if blank:
            out.append(trailing + end)
    return "".join(out)


@given(programs(), st.sampled_from([" ", "  ", "   ", "    ", "\t", "        "]), st.data())
def test_width_tabs_line_ends_and_blank_lines_do_not_count(program, unit, data):
    other = render(
        program,
        unit,
        data.draw(st.sampled_from(["\n", "\r\n", "\r"])),
        data.draw(st.sampled_from(["", " ", "\t "])),
        data.draw(st.booleans()),
    )
    text = render(program, "    ")
    assert normalized_hash(text) == normalized_hash(other)
    assert normalized_hash("\ufeff" + other) == normalized_hash(text)
    np.testing.assert_array_equal(tokenize_code(text).hashes, tokenize_code(other).hashes)


@given(programs(), programs())
def test_another_nesting_is_another_file(one, other):
    same = one == other
    assert (normalized_hash(render(one, "  ")) == normalized_hash(render(other, "\t"))) == same


def test_a_line_that_leaves_its_block_is_seen():
    inside = "if a:\n    b()\n    c()\n"
    after = "if a:\n    b()\nc()\n"
    assert normalized_hash(inside) != normalized_hash(after)
    assert set(tokenize_code(inside).hashes) != set(tokenize_code(after).hashes)


def test_white_space_inside_a_line_counts():
    assert normalized_hash("x = 'a b'") != normalized_hash("x = 'a  b'")


@pytest.mark.parametrize("name", ["argparse", "json/decoder", "shutil", "typing", "ast"])
def test_real_files_reindented_with_tabs(name):
    text = (STANDARD / f"{name}.py").read_text()
    tabs = re.sub(r"(?m)^(?: {4})+", lambda m: "\t" * (len(m[0]) // 4), text)
    assert tabs != text
    assert normalized_hash(tabs) == normalized_hash(text)
    np.testing.assert_array_equal(tokenize_code(tabs).hashes, tokenize_code(text).hashes)


def test_levels_mix_widths():
    text = "a\n  b\n      c\n  d\n\te\n   \nf"
    offsets, levels = indentation(text)
    assert [text[offset] for offset in offsets] == ["b", "c", "d", "e", "f"]
    assert levels == [1, 2, 1, 2, 0]
    assert normalized_lines(text) == ["a", " b", "  c", " d", "  e", "f"]


@pytest.mark.parametrize(
    "text", ["int f(int aB) { return aB_2; }\n", "näme = 'ü' + 变量\n\tx\n", "", "\n \n"]
)
def test_words_are_those_of_the_text(text):
    tokens = tokenize_code(text)
    words = [text[s:e] for s, e in zip(tokens.starts, tokens.ends, strict=True) if e > s]
    assert words == re.findall(r"[变量]|[^\W变量]+", text)
    assert len(tokens.codepoints) == len(text)
    assert np.all(np.diff(tokens.starts) >= 0)


def test_words_keep_their_case_and_their_hash_wherever_they_stand():
    hashes = tokenize_code("Tree tree x = tree\n").hashes
    assert hashes[0] != hashes[1] == hashes[3]
    assert tokenize_code("ü tree").hashes[1] == hashes[1]  # beside what is not ASCII


def test_one_token_per_change_of_level():
    tokens = tokenize_code("a\n  b\n  c\n    d\ne\n")
    empty = tokens.ends == tokens.starts
    assert empty.tolist() == [False, True, False, False, True, False, True, False]
    deeper, deeper_again, back_two = tokens.hashes[empty]
    assert deeper == deeper_again != back_two


def test_the_notice_of_copyright_is_no_part_of_the_program():
    body = "def f():\n    return 1\n"
    np.testing.assert_array_equal(tokenize_code(NOTICE + body).hashes, tokenize_code(body).hashes)
    kept = "# What this does\n"
    assert len(tokenize_code(kept + body).hashes) > len(tokenize_code(body).hashes)


def test_a_file_that_is_only_a_notice_keeps_its_words():
    assert len(tokenize_code(NOTICE).hashes) > 5


@given(st.text(max_size=300))
def test_any_text(text):
    tokens = tokenize_code(text)
    assert len(tokens.starts) == len(tokens.ends) == len(tokens.hashes)
    assert tokens.ends.max(initial=0) <= len(tokens.codepoints)
    assert len(normalized_hash(text)) == 16


def test_lone_surrogates():
    assert len(tokenize_code("a\ud800b = 1").hashes) >= 3
    assert len(normalized_hash("a\ud800")) == 16
