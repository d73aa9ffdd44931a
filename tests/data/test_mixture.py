"""Views of a source by document length, and the enhancement data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from internlm2_jax.data import mixture
from internlm2_jax.data.documents import TextDocument

LENGTHS = np.array([2, 9, 30, 5])
SOURCE = mixture.TokenDocuments(np.arange(LENGTHS.sum()), LENGTHS)


def documents(source):
    return np.split(source.tokens, np.cumsum(source.lengths)[:-1])


def transitions(source):
    return sorted((int(a), int(b)) for d in documents(source) for a, b in itertools.pairwise(d))


@pytest.mark.parametrize("length", [1, 4, 8, 100])
def test_shortened_keeps_every_transition_once(length):
    short = mixture.shortened(SOURCE, length)
    assert short.lengths.max() <= length + 1
    assert transitions(short) == transitions(SOURCE)


def test_at_least_keeps_long_documents_whole():
    long = mixture.at_least(SOURCE, 9)
    assert [d.tolist() for d in documents(long)] == [list(range(2, 11)), list(range(11, 41))]


def test_at_least_keeps_all_when_none_is_long():
    assert mixture.at_least(SOURCE, 1000).lengths.tolist() == LENGTHS.tolist()


def test_views_by_name():
    sources = {"code": SOURCE}
    options = {"short_length": 4, "long_length": 9}
    assert mixture.view("code", sources, **options) is SOURCE
    assert len(mixture.view("long/code", sources, **options).lengths) == 2
    assert mixture.view("short/code", sources, **options).lengths.max() == 5
    assert mixture.view("long/text", sources, **options) is None


def test_documented_prefers_what_explains_itself():
    bare = TextDocument("code", "a.py", "x = 1\ny = 2\n" * 20)
    good = TextDocument(
        "code", "b.py", '"""Adds numbers."""\n# why\ndef add(a, b):\n    return a + b\n'
    )
    stub = TextDocument("code", "c.py", "# licence text only\n" * 20)
    assert mixture.documented(good) > mixture.documented(bare)
    assert mixture.documented(stub) == 0
    prose = TextDocument("text", "a.txt", "This is a sentence.\nSo is this one.\n")
    table = TextDocument("text", "b.txt", "a 1 2\nb 3 4\n")
    assert mixture.documented(prose) > mixture.documented(table)


def test_enhancement_selects_the_best_documented_share():
    rows = [
        TextDocument("text", f"{i}", "A full sentence.\n" * i + "1 2\n" * (10 - i))
        for i in range(8)
    ]
    instructions = [
        {"family": "docstring", "messages": [{"content": "Q"}, {"content": "A"}]},
        {"family": "copy", "messages": [{"content": "skip"}, {"content": "skip"}]},
    ]
    texts = mixture.enhancement(rows, instructions, num_tasks=24, seed=0)
    assert texts["selected"] == [rows[7].text, rows[6].text]
    assert texts["special"] == ["Q\nA"]
    assert sum(text.startswith("Question: ") for text in texts["stem"]) == 24
