"""Every transition once, no row too full, no conversation cut."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm2_jax.data.packing import (
    ExampleSource,
    PackedSource,
    Piece,
    full_rows,
    pack,
    pack_full,
)
from internlm2_jax.errors import UserError

lengths_and_capacity = st.tuples(st.lists(st.integers(0, 60)), st.integers(1, 20))


def source_of(documents):
    tokens = np.concatenate([np.asarray(d, np.uint16) for d in [*documents, []]])
    return SimpleNamespace(tokens=tokens, lengths=np.array([len(d) for d in documents], np.int64))


@given(lengths_and_capacity)
def test_every_transition_exactly_once(case):
    lengths, capacity = case
    packing = pack(lengths, capacity)
    seen = Counter((p.doc, p.start + i) for row in packing for p in row for i in range(p.length))
    assert seen == Counter((d, i) for d, n in enumerate(lengths) for i in range(n - 1))
    assert all(0 < sum(p.length for p in row) <= capacity for row in packing)


@given(lengths_and_capacity)
def test_a_document_that_fits_is_not_cut(case):
    lengths, capacity = case
    pieces = Counter(p.doc for row in pack(lengths, capacity) for p in row)
    assert all(pieces[d] == -(-max(0, n - 1) // capacity) for d, n in enumerate(lengths))


@given(lengths_and_capacity)
def test_rows_agree_with_the_documents(case):
    lengths, capacity = case
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 60_000, n).astype(np.uint16) for n in lengths]
    source = PackedSource(source_of(documents), capacity)
    for row, pieces in enumerate(source.packing):
        out = source[row]
        assert all(a.shape == (capacity,) for a in out.values())
        assert {n: a.dtype.name for n, a in out.items()} == {
            "tokens": "int32", "targets": "int32", "segment_ids": "int32", "positions": "int32",
            "loss_mask": "float32",
        }  # fmt: skip
        end = 0
        for segment, (doc, start, length) in enumerate(pieces, start=1):
            at = slice(end, end + length)
            text = documents[doc][start : start + length + 1].tolist()
            assert out["tokens"][at].tolist() == text[:-1]
            assert out["targets"][at].tolist() == text[1:]
            assert set(out["segment_ids"][at].tolist()) == {segment}
            assert out["positions"][at].tolist() == list(range(length))
            end += length
        assert out["loss_mask"].tolist() == [1.0] * end + [0.0] * (capacity - end)
        assert not any(a[end:].any() for a in out.values())


def test_short_pieces_fill_the_tightest_hole():
    # In rows of 10, the 2 completes the 8, not the 7, which has room for 3; the 1 goes to the 7.
    rows = [sorted(p.length for p in row) for row in pack([9, 8, 3, 2], 10)]
    assert sorted(rows) == [[1, 7], [2, 8]]


def test_long_document_is_cut_with_one_token_of_overlap():
    assert list(pack([25], 10)) == [[Piece(0, 0, 10)], [Piece(0, 10, 10)], [Piece(0, 20, 4)]]
    assert list(pack([1, 0], 10)) == []


def test_rows_are_nearly_full_and_packing_is_deterministic():
    lengths = np.random.default_rng(0).lognormal(5, 1, 5_000).astype(int) + 2
    source = PackedSource(
        SimpleNamespace(tokens=np.zeros(lengths.sum(), np.uint16), lengths=lengths), 512
    )
    assert 0.99 < source.fill_rate <= 1
    used = sum(int(source[i]["loss_mask"].sum()) for i in range(len(source)))
    assert source.fill_rate == used / (512 * len(source))
    again = pack(lengths, 512)
    assert list(again) == list(source.packing)


@given(lengths_and_capacity)
def test_full_packing_needs_no_look_at_the_lengths(case):
    lengths, capacity = case
    packing = pack_full(lengths, capacity)
    seen = Counter((p.doc, p.start + i) for row in packing for p in row for i in range(p.length))
    assert seen == Counter((d, i) for d, n in enumerate(lengths) for i in range(n - 1))
    assert all(0 < sum(p.length for p in row) <= capacity for row in packing)
    assert len(packing) == full_rows(sum(max(0, n - 1) for n in lengths), capacity)


def test_full_packing_cuts_few_documents():
    lengths = np.random.default_rng(0).lognormal(5, 1, 5_000).astype(int) + 2
    pieces = Counter(p.doc for row in pack_full(lengths, 2048) for p in row)
    needless = sum(pieces[d] > -(-(n - 1) // 2048) for d, n in enumerate(lengths.tolist()))
    assert needless < 5
    # 7, 6 and 6 transitions go into two rows of 10: the last 6 is cut to fill both holes.
    assert [list(row) for row in pack_full([7, 7, 8], 10)] == [
        [Piece(2, 0, 7), Piece(1, 4, 2)], [Piece(0, 0, 6), Piece(1, 0, 4)]
    ]  # fmt: skip


def test_indices_of_rows():
    packing = pack([9, 9, 9], 8)
    assert packing[-1] == packing[2]
    with pytest.raises(IndexError):
        packing[3]
    with pytest.raises(UserError, match="row_length is 0"):
        pack([3], 0)


def examples(*lengths):
    return [
        (list(range(100 * k, 100 * k + n)), [i >= n // 2 for i in range(n)])
        for k, n in enumerate(lengths, start=1)
    ]


def test_examples_are_whole_and_keep_their_masks():
    given_examples = examples(9, 5, 4, 3, 7)
    source = ExampleSource(given_examples, 8)
    found = []
    for row in range(len(source)):
        out = source[row]
        for segment in range(1, out["segment_ids"].max() + 1):
            here = out["segment_ids"] == segment
            ids = [int(out["tokens"][here][0]), *out["targets"][here].tolist()]
            found.append((ids, [False, *out["loss_mask"][here].astype(bool).tolist()]))
    assert sorted(found) == sorted(given_examples)
    assert (source.num_dropped, source.num_truncated) == (0, 0)


def test_too_long_examples_are_counted():
    given_examples = [
        *examples(10, 4),
        (list(range(9)), [False] * 9),
        (list(range(30)), [False] * 29 + [True]),
    ]
    dropped = ExampleSource(given_examples, 8)
    assert (dropped.num_dropped, dropped.num_truncated, len(dropped)) == (3, 0, 1)
    cut = ExampleSource(given_examples, 8, too_long="truncate")
    assert (cut.num_dropped, cut.num_truncated, len(cut)) == (2, 1, 2)
    rows = [cut[i]["targets"].tolist() for i in range(2)]
    assert list(range(101, 109)) in rows


def test_bad_examples():
    with pytest.raises(UserError, match="'drop' or 'truncate'"):
        ExampleSource(examples(4), 8, too_long="cut")
    with pytest.raises(UserError, match="example 0 has 2 ids but a loss mask of 1"):
        ExampleSource([([1, 2], [True])], 8)
    with pytest.raises(UserError, match="none of the 1 examples fits 8 tokens"):
        ExampleSource(examples(40), 8)
