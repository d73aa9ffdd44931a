"""Threshold curves say what a rule would drop, to the document."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_beam.mix import curves
from data_beam.mix.curves import ANY_SIZE, MAXIMUM, MINIMUM
from internlm2_jax.errors import UserError

# Few different values, so that ties and values on a cut-off are common; NaN says nothing.
VALUE = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, 2.5, -3.0, 1e9, math.inf, math.nan]), st.floats(-10, 10)
)
VALUES = st.lists(st.tuples(VALUE, st.integers(1, 1000)), min_size=1, max_size=60)
DIRECTION = st.sampled_from([MINIMUM, MAXIMUM])


def dropped(values: np.ndarray, cut: float, direction: str) -> np.ndarray:
    """Document by document, in plain Python."""
    limits = (cut, math.inf) if direction == MINIMUM else (-math.inf, cut)
    return np.array([v < limits[0] or v > limits[1] for v in values.tolist()])


@settings(max_examples=150, deadline=None)
@given(VALUES, DIRECTION, st.lists(st.sampled_from([-3.0, 0.0, 0.5, 1.0, 2.0, 2.5, 7.0]),
                                   min_size=2, max_size=6, unique=True))  # fmt: skip
def test_a_curve_is_exact_on_its_edges(pairs, direction, edges):
    values = np.array([value for value, _ in pairs])
    sizes = np.array([size for _, size in pairs], float)
    edges = np.array(sorted(edges))
    counted = curves.histogram(values, sizes, edges, direction)
    assert counted.documents.sum() + counted.missing == len(values)
    curve = counted.curve()
    for place, cut in enumerate(edges):
        hit = dropped(values, cut, direction)
        assert curve.documents[place] == pytest.approx(hit.mean())
        assert curve.bytes[place] == pytest.approx(sizes[hit].sum() / sizes.sum())
        assert curve.at(cut) == (curve.documents[place], curve.bytes[place])


@settings(max_examples=60, deadline=None)
@given(VALUES, DIRECTION, st.integers(0, 60))
def test_histograms_of_parts_add_up_to_that_of_the_whole(pairs, direction, cut):
    values = np.array([value for value, _ in pairs])
    sizes = np.array([size for _, size in pairs], float)
    edges = np.linspace(-5, 5, 9)
    whole = curves.histogram(values, sizes, edges, direction)
    parts = curves.histogram(values[:cut], sizes[:cut], edges, direction) + curves.histogram(
        values[cut:], sizes[cut:], edges, direction
    )
    assert np.array_equal(whole.documents, parts.documents)
    assert np.array_equal(whole.weights, parts.weights)
    assert (whole.missing, whole.missing_weight) == (parts.missing, parts.missing_weight)


def test_histograms_over_other_edges_or_ends_do_not_add_up():
    one = curves.histogram(np.ones(3), edges=np.arange(4.0))
    with pytest.raises(ValueError, match="different edges"):
        one + curves.histogram(np.ones(3), edges=np.arange(5.0))
    with pytest.raises(ValueError, match="different edges"):
        one + curves.histogram(np.ones(3), edges=np.arange(4.0), direction=MAXIMUM)


@settings(max_examples=100, deadline=None)
@given(VALUES, DIRECTION)
def test_the_exact_curve_of_every_value(pairs, direction):
    values = np.array([value for value, _ in pairs])
    sizes = np.array([size for _, size in pairs], float)
    curve = curves.threshold_curve(values, sizes, direction)
    for cut, share, of_bytes in zip(curve.thresholds, curve.documents, curve.bytes, strict=True):
        hit = dropped(values, cut, direction)
        assert share == pytest.approx(hit.mean()) or np.isnan(values).all()
        assert of_bytes == pytest.approx(sizes[hit].sum() / sizes.sum()) or np.isnan(values).all()
    steps = np.diff(curve.documents)
    assert (steps >= 0).all() if direction == MINIMUM else (steps <= 0).all()


def test_a_long_curve_keeps_its_ends():
    values = np.random.default_rng(0).normal(size=5000)
    curve = curves.threshold_curve(values, np.ones(5000), MAXIMUM, points=100)
    assert len(curve.thresholds) == 100
    assert curve.thresholds[0] == values.min() and curve.thresholds[-1] == values.max()
    assert curve.documents[-1] == 0


@settings(max_examples=100, deadline=None)
@given(VALUES, DIRECTION, st.floats(0, 1))
def test_a_share_to_keep_gives_the_strictest_cut_off_that_keeps_it(pairs, direction, keep):
    values = np.array([value for value, _ in pairs])
    sizes = np.array([size for _, size in pairs], float)
    if not np.isfinite(values).any():
        return
    found = curves.suggest_threshold(values, direction, num_bytes=sizes, keep=keep)
    lost = {
        cut: sizes[dropped(values, cut, direction)].sum() / sizes.sum()
        for cut in values.tolist()
        if not math.isnan(cut)
    }
    fitting = [share for share in lost.values() if share <= 1 - keep + 1e-9]
    assert found.bytes == pytest.approx(max(fitting))
    assert found.bytes == pytest.approx(lost[found.threshold])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40), DIRECTION)
def test_labels_give_the_cut_off_of_the_best_f1(pairs, direction):
    values = np.array([float(value) for value, _ in pairs])
    bad = np.array([label for _, label in pairs])
    if bad.all() or not bad.any():
        with pytest.raises(UserError, match="both kinds"):
            curves.suggest_threshold(values, direction, bad=bad)
        return

    def f1(cut: float) -> float:
        hit = dropped(values, cut, direction)
        return 2 * (hit & bad).sum() / (hit.sum() + bad.sum())

    best = max(f1(cut) for cut in values)
    if best == 0:
        with pytest.raises(UserError, match="no cut-off drops bad"):
            curves.suggest_threshold(values, direction, bad=bad)
        return
    found = curves.suggest_threshold(values, direction, bad=bad)
    assert f1(found.threshold) == pytest.approx(best)
    hit = dropped(values, found.threshold, direction)
    assert found.precision == pytest.approx((hit & bad).sum() / hit.sum())
    assert found.recall == pytest.approx((hit & bad).sum() / bad.sum())


def test_a_wanted_precision_limits_the_recall():
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])
    bad = np.array([True, True, True, False, True, False, False, False])
    loose = curves.suggest_threshold(values, MINIMUM, bad=bad)
    strict = curves.suggest_threshold(values, MINIMUM, bad=bad, min_precision=1.0)
    assert (loose.threshold, loose.recall) == (6.0, 1.0)
    assert (strict.threshold, strict.precision, strict.recall) == (4.0, 1.0, 0.75)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({}, "give one of them"), ({"keep": 0.5, "bad": np.ones(3, bool)}, "give one of them"),
     ({"keep": 2.0}, "not between 0 and 1"), ({"bad": np.ones(2, bool)}, "2 labels for 3"),
     ({"bad": np.array([False, False, True]), "min_precision": 0.9}, "precision of 0.9")],
)  # fmt: skip
def test_what_gives_no_cut_off_is_told(arguments, said):
    with pytest.raises(UserError, match=said):
        curves.suggest_threshold(np.array([1.0, 2.0, 3.0]), MINIMUM, **arguments)


def test_no_values_give_no_cut_off():
    with pytest.raises(UserError, match="no value"):
        curves.suggest_threshold(np.array([math.nan]), MAXIMUM, keep=0.9)


def test_quantiles_are_close_over_many_magnitudes():
    values = np.exp(np.random.default_rng(0).normal(3, 4, 20_000))
    counted = curves.histogram(values, edges=ANY_SIZE)
    for share in (0.01, 0.25, 0.5, 0.9, 0.999):
        assert counted.quantile(share) == pytest.approx(np.quantile(values, share), rel=0.05)
    assert math.isnan(curves.histogram(np.array([math.nan])).quantile(0.5))


def axis(values, cuts, whole=False):
    return curves.axis_for(curves.histogram(np.asarray(values, float)), cuts, whole)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), max_size=30),
    st.lists(st.sampled_from([-math.inf, math.inf, 0.0, 0.1, 3.0, 200.0, 1e6, -2.0]), max_size=2),
    st.booleans(),
)
def test_an_axis_has_its_cut_offs_on_edges_and_covers_them(values, cuts, whole):
    values = [float(round(value)) for value in values] if whole else values
    edges = axis(values, cuts, whole).edges
    assert len(edges) >= 2 and (np.diff(edges) > 0).all() and np.isfinite(edges).all()
    assert len(edges) <= 120
    for cut in cuts:
        if math.isfinite(cut):
            assert edges[0] <= cut <= edges[-1]
            # Whole numbers lie in the middle of their bins.
            assert cut in edges or (whole and cut + 0.5 in edges)


def test_the_cut_off_splits_the_curve_as_the_rule_does():
    """The share read off the drawn curve is that of the rule, for whole numbers too."""
    rng = np.random.default_rng(1)
    cases = (
        (rng.integers(0, 40, 500).astype(float), 7.0, True),
        (rng.integers(0, 90_000, 500).astype(float), 200.0, True),
        (rng.random(500).round(1), 0.3, False),
        (np.exp(rng.normal(5, 3, 500)), 20.0, False),
    )
    for values, cut, whole in cases:
        for direction in (MINIMUM, MAXIMUM):
            edges = axis(values, [cut], whole).edges
            curve = curves.histogram(values, None, edges, direction).curve()
            assert curve.at(cut)[0] == pytest.approx(dropped(values, cut, direction).mean())


def test_long_tails_are_drawn_in_proportion_and_shares_are_not():
    lengths = np.exp(np.random.default_rng(0).normal(8, 2, 2000))
    assert axis(lengths, [200.0]).log
    assert not axis(np.random.default_rng(0).random(2000), [0.5]).log
    assert not axis(np.arange(30), [7], whole=True).log
    assert np.array_equal(axis([0, 1, 0, 1], [0], whole=True).edges, [-0.5, 0.5, 1.5])
