"""The estimator's bias and spread against theory, bands against the collision formula."""

import numpy as np
import pytest

from data_beam.kernels import minhash
from data_beam.kernels.tokens import ngram_hashes, tokenize

# The same on every machine: signatures of one corpus are made by many workers.
GOLDEN = [39339, 24332, 59250, 52120]


def pair(rng: np.random.Generator, size: int, jaccard: float) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of `size` hashes each with the given Jaccard similarity (nearly)."""
    common = round(2 * size * jaccard / (1 + jaccard))
    values = rng.choice(1 << 32, 2 * size - common, replace=False).astype(np.uint32)
    return values[:size], np.concatenate([values[:common], values[size:]])


def compact(texts: list[np.ndarray], num_perm: int = 128, seed: int = 0) -> np.ndarray:
    """[texts, num_perm] from arrays of shingles, signed as one batch."""
    offsets = np.append(0, np.cumsum([len(text) for text in texts]))
    return minhash.compact(minhash.signatures(np.concatenate(texts), offsets, num_perm, seed))


@pytest.mark.parametrize("jaccard", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("size", [60, 1000])
def test_the_estimate_is_unbiased_with_the_spread_of_theory(jaccard, size):
    rng = np.random.default_rng(round(size * jaccard))
    pairs = [pair(rng, size, jaccard) for _ in range(600)]
    exact = len(np.intersect1d(*pairs[0])) / len(np.union1d(*pairs[0]))
    signatures = compact([text for both in pairs for text in both])
    errors = minhash.similarity(signatures[0::2], signatures[1::2]) - exact
    spread = np.sqrt(exact * (1 - exact) / 128)
    assert abs(np.mean(errors)) < 3.5 * spread / np.sqrt(len(errors))
    assert np.std(errors) == pytest.approx(spread, rel=0.12)


def test_bands_meet_as_often_as_the_formula_says():
    rng = np.random.default_rng(0)
    for jaccard in (0.5, 0.8):
        pairs = [pair(rng, 300, jaccard) for _ in range(600)]
        keys = minhash.band_keys(compact([text for both in pairs for text in both]), 16, 8)
        hits = (keys[0::2] == keys[1::2]).any(axis=1).mean()
        assert hits == pytest.approx(1 - (1 - jaccard**8) ** 16, abs=0.06)


def test_one_match_in_different_bands_is_no_match():
    minima = np.tile(np.arange(8, dtype=np.uint16), 16)[None]
    assert len(set(minhash.band_keys(minima, 16, 8)[0].tolist())) == 16


def test_a_band_depends_on_all_its_rows_and_their_order():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 1 << 16, (1, 128), dtype=np.uint16)
    keys = minhash.band_keys(one, 16, 8)
    for row in range(128):
        other = one.copy()
        other[0, row] ^= 1
        differs = (minhash.band_keys(other, 16, 8) != keys)[0]
        assert np.flatnonzero(differs).tolist() == [row // 8]
    assert minhash.band_keys(one[:, ::-1].copy(), 16, 8)[0, 0] != keys[0, -1]


def test_signatures_of_a_batch_are_the_plain_minima_of_each_text():
    """Texts of every size, empty ones among them, some across the borders of blocks."""
    rng = np.random.default_rng(1)
    sizes = [0, 1, 5, 40_000, 0, 3, 32_768, 100, 25_000, 0, 0]
    texts = [rng.integers(1, 1 << 32, size, dtype=np.uint32) for size in sizes]
    offsets = np.append(0, np.cumsum(sizes))
    found = minhash.signatures(np.concatenate(texts), offsets, 16, 7)
    multipliers = minhash._multipliers(16, 7)
    for text, row in zip(texts, found, strict=True):
        plain = (text * multipliers).min(axis=1, initial=0xFFFFFFFF)
        np.testing.assert_array_equal(row, plain)


def test_signatures_are_the_same_on_every_machine_and_differ_by_seed():
    words = tokenize("the quick brown fox jumps over the lazy dog").hashes
    values, offsets = minhash.shingles([words], 5)
    assert offsets.tolist() == [0, 5]
    assert compact([values], 4)[0].tolist() == GOLDEN
    assert compact([values], 4, seed=1)[0].tolist() != GOLDEN


def test_shingles_of_a_batch_are_those_of_each_text():
    texts = ["", "one", "two words", "now five words in all", "and here are six of them", "",
             "a much longer text than the ones before it, is this one"]  # fmt: skip
    words = [tokenize(text).hashes for text in texts]
    values, offsets = minhash.shingles(words, 5)
    assert np.diff(offsets).tolist() == [0, 2, 2, 2, 2, 0, 8]
    for number, alone in enumerate(words):
        np.testing.assert_array_equal(
            values[offsets[number] : offsets[number + 1]], minhash.shingles([alone], 5)[0]
        )
    assert len(minhash.shingles([np.zeros(0, np.uint64)] * 2, 5)[0]) == 0


def test_short_texts_meet_when_equal_and_only_then():
    """All 64 bits of their hash count: with 32, unrelated short texts of a crawl would meet."""
    words = [tokenize(text).hashes for text in ("Two words", "two  words!", "two word")]
    values, _ = minhash.shingles(words, 5)
    assert values.view(np.uint64).tolist() == [int(ngram_hashes(w, 2)[0]) for w in words]
    same, again, other = compact([values[:2], values[2:4], values[4:]])
    assert same.tolist() == again.tolist() and minhash.similarity(same, other) < 0.1


def test_no_shingle_is_zero_which_every_permutation_would_prefer(monkeypatch):
    monkeypatch.setattr(minhash, "ngram_hashes", lambda words, n: np.zeros(
        max(len(words) - n + 1, 0), np.uint64))  # fmt: skip
    values, _ = minhash.shingles([np.arange(9, dtype=np.uint64)], 5)
    assert len(values) == 5 and values.min() > 0


def test_exact_jaccard():
    left, right = np.array([1, 3, 5, 7], np.uint32), np.array([3, 4, 5], np.uint32)
    assert minhash.jaccard(left, right) == 2 / 5
    assert minhash.jaccard(left[:0], right[:0]) == 0
