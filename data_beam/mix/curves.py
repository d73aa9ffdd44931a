"""What a cut-off does: histograms of a signal, the share that every other cut-off would drop, and
cut-offs proposed from data.

A cut-off of direction MINIMUM drops the values below it, one of direction MAXIMUM the values above
it; a document at the cut-off stays, and one without a value (NaN) passes every cut-off, as in
`data_beam.mix.rules`. Everything is a pure function of its arguments; histograms of parts add up to
the histogram of the whole, so that shards can be counted one by one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from internlm2_jax.errors import UserError

Direction = Literal["minimum", "maximum"]
MINIMUM: Direction = "minimum"
MAXIMUM: Direction = "maximum"
# Edges for values of any size: 16 to an octave (4.4 %) from 2^-30 to 2^60, on both sides of zero.
_MAGNITUDES = 2.0 ** (np.arange(-30 * 16, 60 * 16 + 1) / 16)
ANY_SIZE = np.concatenate([-_MAGNITUDES[::-1], [0.0], _MAGNITUDES])
_LONG_TAIL = 30.0  # a range that spans so many times its median is drawn on a log axis


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Documents and their weights (bytes) between fixed edges.

    `documents`, `weights` [bins + 2]: what lies below the first edge, in the bins, and beyond the
    last edge. For MINIMUM a value on an edge counts to the bin above it, for MAXIMUM to the one
    below: so a cut-off on an edge splits the counts exactly as the rule does. `missing`,
    `missing_weight`: documents without a value.
    """

    edges: np.ndarray
    documents: np.ndarray
    weights: np.ndarray
    direction: Direction = MINIMUM
    missing: int = 0
    missing_weight: float = 0.0

    def __add__(self, other: Histogram) -> Histogram:
        if self.direction != other.direction or not np.array_equal(self.edges, other.edges):
            raise ValueError("histograms with different edges do not add up")
        return dataclasses.replace(
            self,
            documents=self.documents + other.documents,
            weights=self.weights + other.weights,
            missing=self.missing + other.missing,
            missing_weight=self.missing_weight + other.missing_weight,
        )

    @property
    def count(self) -> int:
        """Documents that have a value."""
        return int(self.documents.sum())

    def curve(self) -> Curve:
        """The share that a cut-off at each edge drops, of all documents counted."""
        documents, weights = self.documents, self.weights
        if self.direction == MINIMUM:
            dropped = np.cumsum(documents)[:-1], np.cumsum(weights)[:-1]
        else:
            dropped = (np.cumsum(documents[::-1])[::-1][1:], np.cumsum(weights[::-1])[::-1][1:])
        return Curve(
            self.edges,
            dropped[0] / max(self.count + self.missing, 1),
            dropped[1] / max(float(weights.sum()) + self.missing_weight, 1e-300),
            self.direction,
        )

    def quantile(self, share: float) -> float:
        """The value below which `share` of the documents with a value lie, interpolated inside its
        bin; NaN without documents."""
        if not self.count:
            return math.nan
        total = np.cumsum(self.documents)
        wanted = share * total[-1]
        place = int(np.searchsorted(total, max(wanted, 1e-9)))
        if place == 0:
            return float(self.edges[0])
        if place == len(self.edges):
            return float(self.edges[-1])
        inside = (wanted - total[place - 1]) / self.documents[place]
        low, high = self.edges[place - 1], self.edges[place]
        return float(low + inside * (high - low))


@dataclasses.dataclass(frozen=True)
class Curve:
    """Shares in 0..1 of the documents and of their bytes that a cut-off at each threshold drops;
    `thresholds` ascend."""

    thresholds: np.ndarray
    documents: np.ndarray
    bytes: np.ndarray
    direction: Direction

    def at(self, threshold: float) -> tuple[float, float]:
        """Shares dropped at `threshold`, or at the nearest known one that is more lenient."""
        if self.direction == MINIMUM:
            place = int(np.searchsorted(self.thresholds, threshold, side="right")) - 1
        else:
            place = int(np.searchsorted(self.thresholds, threshold, side="left"))
        place = min(max(place, 0), len(self.thresholds) - 1)
        return float(self.documents[place]), float(self.bytes[place])


def histogram(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    edges: np.ndarray = ANY_SIZE,
    direction: Direction = MINIMUM,
) -> Histogram:
    """Counts `values` (NaN = none), and `weights` (1 each when None), between ascending `edges`."""
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    valid = ~np.isnan(values)
    side: Literal["left", "right"] = "right" if direction == MINIMUM else "left"
    places = np.searchsorted(edges, values[valid], side=side)
    size = len(edges) + 1
    return Histogram(
        edges,
        np.bincount(places, minlength=size),
        np.bincount(places, weights[valid], minlength=size),
        direction,
        int(len(values) - valid.sum()),
        float(weights[~valid].sum()),
    )


def outside(values: np.ndarray, minimum: float, maximum: float) -> np.ndarray:
    """[values] bool: dropped by a rule with these limits."""
    with np.errstate(invalid="ignore"):
        return (values < minimum) | (values > maximum)


def threshold_curve(
    values: np.ndarray, num_bytes: np.ndarray, direction: Direction, points: int = 512
) -> Curve:
    """The exact curve at up to `points` of the values, evenly spread over the documents."""
    values, num_bytes = np.asarray(values, np.float64), np.asarray(num_bytes, np.float64)
    valid = ~np.isnan(values)
    edges = np.unique(values[valid])
    if not len(edges):
        return Curve(np.zeros(1), np.zeros(1), np.zeros(1), direction)
    if len(edges) > points:
        edges = edges[np.unique(np.linspace(0, len(edges) - 1, points).round().astype(int))]
    return histogram(values, num_bytes, edges, direction).curve()


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A cut-off, and what it does. Shares in 0..1; precision and recall of what is dropped, where
    labels say what should be (else NaN)."""

    threshold: float
    documents: float
    bytes: float
    precision: float = math.nan
    recall: float = math.nan


def suggest_threshold(
    values: np.ndarray,
    direction: Direction,
    *,
    num_bytes: np.ndarray | None = None,
    keep: float | None = None,
    bad: np.ndarray | None = None,
    min_precision: float | None = None,
) -> Suggestion:
    """A cut-off from data: give either `keep` or `bad`.

    keep: the strictest cut-off that keeps at least this share of the bytes (of the documents
    without `num_bytes`). bad: one boolean per value, True for what should be dropped; the cut-off
    of the best F1 score or, with `min_precision`, of the highest recall among those whose dropped
    documents are bad at that rate. Ties go to the more lenient cut-off. Raises UserError when
    nothing fits: no values, a share outside 0..1, no labels of both kinds, no precise cut-off.
    """
    values = np.asarray(values, np.float64)
    sizes = np.ones(len(values)) if num_bytes is None else np.asarray(num_bytes, np.float64)
    if not np.isfinite(values).any():
        raise UserError("no value to choose a cut-off from; compute the attribute first")
    if (keep is None) == (bad is None):
        raise UserError("a cut-off follows from a share to keep or from labels: give one of them")
    exact = threshold_curve(values, sizes, direction, points=len(values))
    strictness = np.arange(len(exact.thresholds))
    if direction == MAXIMUM:
        strictness = strictness[::-1]
    if keep is not None:
        if not 0 <= keep <= 1:
            raise UserError(f"a share to keep of {keep} is not between 0 and 1; try 0.9")
        fits = exact.bytes <= 1 - keep + 1e-12
        # The more lenient of two thresholds that drop the same.
        best = int(np.lexsort((strictness, -exact.bytes, ~fits))[0])
        return _suggestion(exact, best)
    labels = np.asarray(bad, bool)
    precision, recall = precision_recall(values, labels, exact.thresholds, direction)
    if min_precision is None:
        with np.errstate(invalid="ignore", divide="ignore"):
            score = np.nan_to_num(2 * precision * recall / (precision + recall), nan=-1.0)
    else:
        score = np.where(np.nan_to_num(precision, nan=-1.0) >= min_precision, recall, -1.0)
    best = int(np.lexsort((strictness, -score))[0])
    if score[best] < 0:
        raise UserError(
            "no cut-off drops bad documents"
            + (f" with a precision of {min_precision}" if min_precision is not None else "")
            + "; look at the signal's histogram, or label more documents"
        )
    return _suggestion(exact, best, float(precision[best]), float(recall[best]))


def _suggestion(curve: Curve, place: int, *scores: float) -> Suggestion:
    return Suggestion(
        float(curve.thresholds[place]), float(curve.documents[place]), float(curve.bytes[place]),
        *scores,
    )  # fmt: skip


def precision_recall(
    values: np.ndarray, bad: np.ndarray, thresholds: np.ndarray, direction: Direction
) -> tuple[np.ndarray, np.ndarray]:
    """[thresholds] each: bad documents among the dropped (NaN when nothing is), and dropped ones
    among the bad. Labels of only one kind are a UserError."""
    bad = np.asarray(bad, bool)
    if len(bad) != len(values):
        raise UserError(f"{len(bad)} labels for {len(values)} values; give one for each")
    if not bad.any() or bad.all():
        raise UserError("labels must hold both kinds of documents, to drop and to keep")
    counted = histogram(np.asarray(values, np.float64), bad, thresholds, direction)
    dropped = counted.curve()
    total = np.round(dropped.documents * len(values))
    hits = np.round(dropped.bytes * bad.sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, hits / total, math.nan), hits / bad.sum()


@dataclasses.dataclass(frozen=True)
class Axis:
    """Where to draw a signal: ascending edges, and whether they are spaced in proportion."""

    edges: np.ndarray
    log: bool


def axis_for(
    rough: Histogram, cuts: Sequence[float] = (), whole: bool = False, bins: int = 48
) -> Axis:
    """An `Axis` for a signal of which `rough` is the histogram over ANY_SIZE.

    Covers all but the thousandth at either end, and the finite `cuts`, each of which is an edge.
    Long-tailed signals get edges in proportion; `whole` numbers in a short range a bin each.
    """
    finite = sorted({float(cut) for cut in cuts if math.isfinite(cut)})
    known = rough.count > 0
    ends = [rough.quantile(0.001), rough.quantile(0.999)] if known else []
    low, high = min([*ends, *finite], default=0.0), max([*ends, *finite], default=1.0)
    if whole and high - low <= bins:
        edges = np.arange(round(low) - 0.5, round(high) + 1)
        return Axis(np.union1d(edges, [cut for cut in finite if cut != int(cut)]), False)
    if high <= low:
        high = low + (abs(low) or 1.0)
    median = rough.quantile(0.5) if known else low
    # A cut-off at zero has no place on a log axis.
    if low >= 0 and high > 3 and high > _LONG_TAIL * median and min(finite, default=1.0) > 0:
        low = max(low, min([*finite, median or high]) / 30, high / 1e8)
        exponents = _steps(math.log(low), math.log(high), [math.log(cut) for cut in finite], bins)
        return Axis(_exactly(np.exp(exponents), finite), True)
    return Axis(_exactly(_steps(low, high, finite, bins), finite), False)


def _steps(low: float, high: float, cuts: Sequence[float], bins: int) -> np.ndarray:
    """Even edges over [low, high], moved so that the first cut is one of them."""
    step = (high - low) / bins
    start = cuts[0] if cuts else low
    first, last = math.floor((low - start) / step - 1e-9), math.ceil((high - start) / step + 1e-9)
    return start + step * np.arange(first, last + 1)


def _exactly(edges: np.ndarray, cuts: Sequence[float]) -> np.ndarray:
    """`edges` with every cut among them, in place of one that differs by a rounding error."""
    for cut in cuts:
        edges = edges[~np.isclose(edges, cut, rtol=1e-9, atol=1e-12)]
    return np.union1d(edges, cuts)
