"""The estimator's bias and spread against theory, bands against the collision formula."""

import numpy as np
import pytest

from data_beam.kernels import minhash
from data_beam.kernels.tokens import tokenize

GOLDEN = [182516109, 534862170, 1061834122, 1815269220]


def pair(rng: np.random.Generator, size: int, jaccard: float) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of `size` hashes each with the given Jaccard similarity (nearly)."""
    common = round(2 * size * jaccard / (1 + jaccard))
    values = rng.choice(1 << 32, 2 * size - common, replace=False).astype(np.uint32)
    return values[:size], np.concatenate([values[:common], values[size:]])


def compact(values: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.frombuffer(minhash.compact(minhash.signature(values, 128, seed)), "<u2")


@pytest.mark.parametrize("jaccard", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("size", [60, 1000])
def test_the_estimate_is_unbiased_with_the_spread_of_theory(jaccard, size):
    rng = np.random.default_rng(round(size * jaccard))
    errors = []
    for _ in range(300):
        left, right = pair(rng, size, jaccard)
        exact = len(np.intersect1d(left, right)) / len(np.union1d(left, right))
        errors.append(float(minhash.similarity(compact(left), compact(right))) - exact)
    spread = np.sqrt(jaccard * (1 - jaccard) / 128)
    assert abs(np.mean(errors)) < 3.5 * spread / np.sqrt(len(errors))
    assert np.std(errors) == pytest.approx(spread, rel=0.2)


def test_bands_collide_as_often_as_the_formula_says():
    rng = np.random.default_rng(0)
    for jaccard in (0.5, 0.8):
        hits = 0
        for _ in range(300):
            keys = [
                set(minhash.band_keys(minhash.signature(v, 128, 0), 16, 8).tolist())
                for v in pair(rng, 300, jaccard)
            ]
            hits += bool(keys[0] & keys[1])
        expected = 1 - (1 - jaccard**8) ** 16
        assert hits / 300 == pytest.approx(expected, abs=0.09)


def test_one_match_in_different_bands_is_no_match():
    minima = np.tile(np.arange(8, dtype=np.uint32), 16)
    assert len(set(minhash.band_keys(minima, 16, 8).tolist())) == 16


def test_signature_of_many_blocks_is_the_plain_minimum():
    values = np.random.default_rng(1).integers(0, 1 << 32, 10_000, dtype=np.uint32)
    xor, multiply = minhash._family(16, 7)
    plain = ((values[None] ^ xor) * multiply).min(axis=1)
    np.testing.assert_array_equal(minhash.signature(values, 16, 7), plain)


def test_signatures_are_the_same_on_every_machine_and_differ_by_seed():
    values = minhash.shingles(tokenize("the quick brown fox jumps over the lazy dog").hashes, 5)
    assert len(values) == 5
    assert minhash.signature(values, 4, 0).tolist() == GOLDEN
    assert minhash.signature(values, 4, 1).tolist() != GOLDEN


def test_short_texts_are_one_shingle():
    equal = [minhash.shingles(tokenize(text).hashes, 5) for text in ("Two words", "two  words!")]
    np.testing.assert_array_equal(*equal)
    assert len(equal[0]) == 1
    assert len(minhash.shingles(tokenize("").hashes, 5)) == 1
