"""pass@k against all subsets, intervals and tests against what they must be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.evals import statistics


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right, k):
    subsets = list(itertools.combinations([1] * right + [0] * (5 - right), k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert statistics.pass_at_k(5, right, k) == pytest.approx(expected)


def test_pass_at_k_refuses_more_than_there_are():
    with pytest.raises(UserError, match="pass@3 of 2"):
        statistics.pass_at_k(2, 1, 3)


def test_votes():
    assert statistics.majority(["7", "8", "7"], [True, False, True]) == 1
    assert statistics.majority(["7", "8", "8"], [True, False, False]) == 0
    assert statistics.majority(["7", "8"], [True, False]) == 0.5  # a tie
    assert statistics.majority(["", "", "7"], [False, False, True]) == 1  # no answer, no vote
    assert statistics.majority(["", ""], [False, False]) == 0


def test_an_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = statistics.interval(rng.random(80) < 0.3, resamples=500, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_an_interval_is_the_same_every_time_and_in_bounded_memory():
    scores = np.tile([0.0, 1.0, 1.0], 40_000)  # resampled in several parts
    first = statistics.interval(scores, resamples=100)
    assert first == statistics.interval(scores, resamples=100)
    assert first[0] < 2 / 3 < first[1]


def test_mcnemar_where_scores_are_right_or_wrong():
    a = [0] * 9 + [1] * 1 + [1] * 40
    b = [1] * 9 + [0] * 1 + [1] * 40
    found = statistics.paired(a, b)
    assert (found.better, found.worse) == (9, 1)
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10)  # two-sided binomial of 1 in 10
    assert found.difference == pytest.approx(8 / 50)
    assert found.low > 0


def test_random_signs_where_scores_are_shares():
    same = statistics.paired([0.5, 0.25, 1.0], [0.5, 0.25, 1.0])
    assert (same.p, same.difference, same.low, same.high) == (1, 0, 0, 0)
    rng = np.random.default_rng(1)
    a = rng.random(12)
    b = a + rng.random(12) * 0.2
    exact = 2 / 2**12  # all signs are one way
    assert statistics.paired(a, b).p == pytest.approx(exact, abs=1.5e-3)


def test_two_runs_of_one_model_differ_in_nothing_at_the_rate_that_p_says():
    rng = np.random.default_rng(2)
    small = sum(
        statistics.paired(rng.random(60) < 0.5, rng.random(60) < 0.5, resamples=50).p < 0.05
        for _ in range(200)
    )
    assert small <= 20


def test_a_paired_test_needs_pairs():
    with pytest.raises(UserError, match="same items; got 2 and 3"):
        statistics.paired([1, 0], [1, 0, 1])
