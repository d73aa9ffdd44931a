"""Views of a source by document length, and the enhancement data."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from internlm2_jax.data import mixture
from internlm2_jax.data.documents import TextDocument
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.errors import UserError

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


def test_rows_by_name():
    sources = {"code": SOURCE}
    pack = mixture.Rows(64, short_length=4, long_length=9)
    assert sorted(pack.pack("code", sources).packing.length.tolist()) == [1, 4, 8, 29]
    assert sorted(pack.pack("long/code", sources).packing.length.tolist()) == [8, 29]
    assert pack.pack("short/code", sources).packing.length.max() == 4
    assert pack.pack("long/text", sources) is None
    with pytest.raises(UserError, match="'far/code' begins with 'far'"):
        pack.pack("far/code", sources)


ROWS = {"high": 100, "moderate": 300, "web": 5000}


def shares(epochs, total=1000, **options):
    weights = {"high": 0.5, "moderate": 0.3, "web": 0.2}
    return mixture.limited(weights, ROWS, epochs, total=total, row_length=10, **options)


def test_without_limits_weights_are_shares():
    assert shares({}) == pytest.approx({"high": 0.5, "moderate": 0.3, "web": 0.2})
    assert shares({"high": 5}) == pytest.approx({"high": 0.5, "moderate": 0.3, "web": 0.2})


def test_what_a_source_lacks_goes_to_the_others():
    got = shares({"high": 2, "moderate": 1})
    # 500 wanted of 200: the rest would give "moderate" 480 of 300, so it is limited in turn.
    assert got == pytest.approx({"high": 0.1995, "moderate": 0.2995, "web": 0.501})


def test_no_row_is_repeated_more_often_than_allowed():
    sources = {name: Numbered(count) for name, count in ROWS.items()}
    batches = Batches(sources, shares({"high": 2, "moderate": 1}), batch_size=10, seed=0)
    seen = collections.Counter()
    for step in range(100):
        batch = batches(step)
        names = (batches.names[i] for i in batch["source"])
        seen.update(zip(names, batch["row"].tolist(), strict=True))
    most = collections.Counter()
    for (name, _), times in seen.items():
        most[name] = max(most[name], times)
    assert most == {"high": 2, "moderate": 1, "web": 1}
    assert sum(n for (name, _), n in seen.items() if name == "high") in (199, 200)


class Numbered:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return {"row": np.array(row)}


@pytest.mark.parametrize(
    ("epochs", "options", "message"),
    [
        ({"high": 2}, {"when_short": "error"}, r"'high' \(2 x 100 rows\) .* 3,000 tokens are miss"),
        (
            {"high": 1, "moderate": 1, "web": 0.1},
            {},
            r"cannot give its share .* tokens are missing",
        ),
        ({"books": 1}, {}, "epochs name 'books', which is not in the mixture of high, moderate"),
        ({"high": 0}, {"label": "phase 'x'"}, "phase 'x': epochs of 'high' are 0"),
    ],
)
def test_mistakes_in_epochs(epochs, options, message):
    with pytest.raises(UserError, match=message):
        shares(epochs, **options)


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
