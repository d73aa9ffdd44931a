"""Lookups of runs of words, against the plain Python of the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_beam.kernels.ngrams import HashSet, Postings, Runs, merge
from data_beam.kernels.tokens import tokenize

words = st.lists(st.integers(0, 3), max_size=60)


@given(words, words, st.integers(1, 15))
def test_runs_are_equal_exactly_when_their_words_are(left, right, n):
    names = tokenize("one two three four").hashes
    hashes = [Runs(names[np.array(some, int)]).all(n).tolist() for some in (left, right)]
    slices = [[tuple(x[i : i + n]) for i in range(len(x) - n + 1)] for x in (left, right)]
    assert [len(some) for some in hashes] == [len(some) for some in slices]
    numbers: dict = {}
    for some, of in zip(hashes, slices, strict=True):
        for value, run in zip(some, of, strict=True):
            assert numbers.setdefault(run, value) == value
    assert len(set(numbers.values())) == len(numbers)


def test_runs_of_different_lengths_differ_and_can_be_had_one_by_one():
    runs = Runs(tokenize("a b c d e f g a b c").hashes)
    starts = np.array([0, 7, 3])
    assert runs.at(starts, 3).tolist() == runs.all(3)[starts].tolist()
    assert runs.all(3)[0] == runs.all(3)[7] != runs.all(2)[0]
    assert runs.whole() == runs.all(10)[0]


numbers = st.integers(0, 2**64 - 1)


@given(st.sets(numbers, max_size=50), st.lists(numbers, max_size=50))
def test_a_hash_set_finds_what_it_holds(keys, others):
    queries = [*others, *sorted(keys)[::2], *others]
    found = HashSet(np.array(sorted(keys), np.uint64))
    where, which = found.find(np.array(queries, np.uint64))
    assert where.tolist() == [i for i, query in enumerate(queries) if query in keys]
    assert found.keys[which].tolist() == [queries[i] for i in where]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5))), st.sets(st.integers(0, 9)))
def test_postings_are_a_mapping_to_sets(pairs, removed):
    postings = Postings.build([(np.array([key], np.uint64), value) for key, value in pairs])
    wanted: dict[int, list[int]] = {}
    for key, value in sorted(set(pairs)):
        wanted.setdefault(key, []).append(value)
    for some, expected in (
        (postings, wanted),
        (
            postings.without(np.array(sorted(removed), np.uint64)),
            {key: values for key, values in wanted.items() if key not in removed},
        ),
    ):
        assert some.keys.tolist() == list(expected)
        owner, values = some.of(np.arange(len(some.keys)))
        found: dict[int, list[int]] = {}
        for key, value in zip(some.keys[owner].tolist(), values.tolist(), strict=True):
            found.setdefault(key, []).append(value)
        assert found == expected


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1))
def test_merged_intervals_cover_the_same(intervals):
    starts = np.array([start for start, _ in intervals])
    ends = starts + np.array([length for _, length in intervals])
    first, last = merge(starts, ends)
    covered = {x for s, e in zip(starts, ends, strict=True) for x in range(s, e)}
    assert {x for s, e in zip(first, last, strict=True) for x in range(s, e)} == covered
    assert (first[1:] > last[:-1]).all()
