"""Bits per byte and the baselines, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.evals.perplexity import bits_per_byte, unigram_baseline


def test_unigram_baselines_by_hand():
    baseline = unigram_baseline([np.array([0, 0, 1])], [np.array([[0, 1], [1, 1]])], vocab_size=3)
    # Smoothed training shares are 3/6, 2/6, 1/6; validation shares are 1/4 and 3/4.
    assert baseline.cross_entropy == pytest.approx(-(math.log(3 / 6) + 3 * math.log(2 / 6)) / 4)
    assert baseline.validation_entropy == pytest.approx(
        -(math.log(1 / 4) + 3 * math.log(3 / 4)) / 4
    )


def test_the_baselines_agree_on_one_large_distribution_and_never_cross():
    rng = np.random.default_rng(0)
    train, same = rng.zipf(1.5, (2, 200_000)) % 50
    baseline = unigram_baseline(np.split(train, 4), [same], vocab_size=50)
    assert 0 < baseline.cross_entropy - baseline.validation_entropy < 1e-3
    other = unigram_baseline([train], [49 - same], vocab_size=50)
    assert other.cross_entropy > other.validation_entropy + 1


def test_a_token_never_seen_in_training_costs_a_finite_amount():
    baseline = unigram_baseline([np.zeros(7, np.int32)], [np.array([1])], vocab_size=2)
    assert baseline.cross_entropy == pytest.approx(math.log(9))
    assert baseline.validation_entropy == 0


def test_tokens_of_another_tokenizer_are_refused():
    with pytest.raises(UserError, match="another tokenizer"):
        unigram_baseline([np.array([5])], [np.array([0])], vocab_size=5)
    with pytest.raises(UserError, match="no validation tokens"):
        unigram_baseline([np.array([0])], [], vocab_size=5)


def test_bits_per_byte():
    assert bits_per_byte(math.log(2), num_tokens=10, num_bytes=40) == pytest.approx(0.25)
