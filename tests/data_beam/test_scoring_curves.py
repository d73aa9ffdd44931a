"""Curves against their definitions, cut-offs that keep their word, calibration that mends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_beam.scoring import curves
from data_beam.scoring.curves import Calibration, CutoffRule
from internlm2_jax.errors import UserError

# Few distinct scores, so that ties are common.
SCORED = st.lists(
    st.tuples(st.booleans(), st.integers(0, 8), st.sampled_from([0.5, 1.0, 3.0])),
    min_size=2,
    max_size=30,
).filter(lambda rows: {row[0] for row in rows} == {True, False})


def columns(rows):
    labels, scores, weights = zip(*rows, strict=True)
    return np.array(labels), np.array(scores, float) / 8, np.array(weights)


@settings(deadline=None, max_examples=60)
@given(SCORED)
def test_areas_are_what_they_are_defined_to_be(rows):
    labels, scores, weights = columns(rows)
    counts = curves.count(labels, scores, weights)
    pairs = [
        (wp * wn, float(sp > sn) + 0.5 * (sp == sn))
        for lp, sp, wp in zip(labels, scores, weights, strict=True)
        for ln, sn, wn in zip(labels, scores, weights, strict=True)
        if lp and not ln
    ]
    chance = sum(w * s for w, s in pairs) / sum(w for w, _ in pairs)
    assert curves.auc(counts) == pytest.approx(chance)
    # every threshold, counted one by one
    for i, threshold in enumerate(counts.thresholds):
        flagged = scores >= threshold
        true = weights[flagged & labels].sum()
        assert counts.precision[i] == pytest.approx(true / weights[flagged].sum())
        assert counts.recall[i] == pytest.approx(true / weights[labels].sum())
        rate = weights[flagged & ~labels].sum() / weights[~labels].sum()
        assert counts.false_positive_rate[i] == pytest.approx(rate)


@settings(deadline=None, max_examples=60)
@given(SCORED, st.sampled_from([0.3, 0.6, 0.9, 1.0]))
def test_the_cutoff_has_the_most_recall_at_the_wanted_precision(rows, precision):
    labels, scores, weights = columns(rows)
    counts = curves.count(labels, scores, weights)
    threshold = CutoffRule(precision=precision).choose(counts)
    fit = {
        t: counts.recall[i]
        for i, t in enumerate(counts.thresholds)
        if counts.precision[i] >= precision
    }
    if threshold is None:
        assert not fit
    else:
        found = curves.at(counts, threshold)
        assert found["precision"] >= precision and found["recall"] == max(fit.values())


@settings(deadline=None, max_examples=60)
@given(SCORED, st.sampled_from([0.5, 1.0, 2.0]))
def test_the_cutoff_has_the_largest_f_score(rows, beta):
    labels, scores, weights = columns(rows)
    counts = curves.count(labels, scores, weights)
    with np.errstate(invalid="ignore"):
        p, r = counts.precision, counts.recall
        f = np.nan_to_num((1 + beta**2) * p * r / (beta**2 * p + r))
    np.testing.assert_allclose(counts.f_score(beta), f, atol=1e-12)
    threshold = CutoffRule(beta=beta).choose(counts)
    assert f[list(counts.thresholds).index(threshold)] == pytest.approx(f.max())


def test_a_threshold_between_scores_flags_what_lies_above():
    counts = curves.count(np.array([1, 0, 1, 0], bool), np.array([0.9, 0.7, 0.5, 0.1]))
    assert curves.at(counts, 0.6) == curves.at(counts, 0.7)
    assert curves.at(counts, 0.6)["precision"] == 0.5
    assert curves.at(counts, 0.95) == {
        "precision": 1.0, "recall": 0.0, "false_positive_rate": 0.0, "flagged_share": 0.0, "f1": 0.0
    }  # fmt: skip
    assert curves.at(counts, 0.0)["recall"] == 1.0


def test_the_plotted_curve_keeps_both_ends_and_the_numbers():
    rng = np.random.default_rng(0)
    counts = curves.count(rng.random(5000) < 0.3, rng.random(5000))
    curve = curves.curve(counts, points=50)
    assert len(curve["threshold"]) == 50
    assert curve["threshold"] == sorted(curve["threshold"], reverse=True)
    assert curve["recall"][-1] == 1.0 and curve["flagged_share"][-1] == 1.0
    assert curve["threshold"][0] == counts.thresholds[0]


@pytest.mark.parametrize("temperature,bias", [(3.0, 0.0), (0.4, 1.5), (1.0, -2.0)])
def test_calibration_finds_what_distorted_the_logits(temperature, bias):
    rng = np.random.default_rng(1)
    truth = rng.normal(0, 2, 40_000)
    labels = rng.random(40_000) < curves.sigmoid(truth)
    logits = (truth - bias) * temperature
    found = curves.calibrate(labels, logits)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.bias == pytest.approx(bias, abs=0.05)
    before = curves.calibration_error(labels, curves.sigmoid(logits))
    after = curves.calibration_error(labels, found.probability(logits))
    assert after < 0.015 and (after < before / 3 or before < 0.02)


def test_calibration_of_separable_useless_and_inverted_logits():
    labels = np.arange(200) % 2 == 0
    apart = curves.calibrate(labels, np.where(labels, 9.0, -9.0))
    assert 0 < apart.temperature < 9 and abs(apart.bias) < 1e-6
    for logits in (np.zeros(200), np.where(labels, -1.0, 1.0)):
        useless = curves.calibrate(labels, logits)
        assert useless.temperature == curves.MAX_TEMPERATURE
        np.testing.assert_allclose(useless.probability(logits), 0.5, atol=0.01)
    few = curves.calibrate(np.arange(200) < 20, np.zeros(200))
    np.testing.assert_allclose(few.probability(np.zeros(1)), 0.1, atol=0.01)


def test_the_report_measures_on_texts_that_chose_nothing():
    rng = np.random.default_rng(2)

    def part(n, shift):
        labels = rng.random(n) < 0.3
        return labels, rng.normal(0, 1, n) + 2 * labels + shift, np.ones(n)

    calibration, found = curves.report(CutoffRule(precision=0.8), part(3000, 0.0), part(3000, 0.0))
    assert isinstance(calibration, Calibration) and found["calibration"]["temperature"] > 0
    cutoff = found["cutoff"]
    assert cutoff["rule"] == "most recall at precision 0.8"
    assert cutoff["validation"]["precision"] >= 0.8
    assert cutoff["test"]["precision"] == pytest.approx(0.8, abs=0.06)
    assert 0.85 < found["test"]["auc"] < 0.97


def test_a_precision_out_of_reach_is_told_not_approximated():
    labels, logits, weights = np.arange(100) % 2 == 0, np.linspace(0, 1, 100), np.ones(100)
    part = (labels, logits, weights)  # the highest score is of label 0
    _, found = curves.report(CutoffRule(precision=1.0), part, part)
    assert found["cutoff"] == {"rule": "most recall at precision 1", "threshold": None}


def test_what_cannot_be_measured_is_told():
    with pytest.raises(UserError, match="3 of label 1 and 0 of label 0"):
        curves.count(np.ones(3, bool), np.arange(3.0))
    with pytest.raises(UserError, match="0 of label 1 and 0 of label 0"):
        curves.count(np.zeros(0, bool), np.zeros(0))
    with pytest.raises(UserError, match="not a finite number"):
        curves.count(np.array([True, False]), np.array([np.nan, 1.0]))
    with pytest.raises(UserError, match="target precision is"):
        CutoffRule(precision=1.5)
