"""How well scores tell two classes apart, what they mean as probabilities, and where to cut.

Label 1 is the class that a classifier is named after and that a rule will drop (toxic, an
advertisement, not fluent): a document is flagged when its score is at or above the cut-off.
Precision is the share of label 1 among the flagged, recall the share of label 1 that is flagged;
both count by weight. Every distinct score is a threshold, so ties never depend on an order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from internlm2_jax.errors import UserError

_ITERATIONS = 100
MAX_TEMPERATURE = 100.0


@dataclasses.dataclass(frozen=True)
class Counts:
    """Weights flagged at each threshold, from the highest threshold down.

    thresholds [K] are the distinct scores; true_positives and false_positives [K] are what lies at
    or above them; positives and negatives are the totals.
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    positives: float
    negatives: float

    @property
    def precision(self) -> np.ndarray:
        return self.true_positives / (self.true_positives + self.false_positives)

    @property
    def recall(self) -> np.ndarray:
        return self.true_positives / self.positives

    @property
    def false_positive_rate(self) -> np.ndarray:
        return self.false_positives / self.negatives

    @property
    def flagged_share(self) -> np.ndarray:
        return (self.true_positives + self.false_positives) / (self.positives + self.negatives)

    def f_score(self, beta: float) -> np.ndarray:
        """(1 + b^2) P R / (b^2 P + R); 0 where nothing is found."""
        weight = beta * beta
        missed = self.positives - self.true_positives
        found = (1 + weight) * self.true_positives
        return found / (found + weight * missed + self.false_positives)


def count(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> Counts:
    """Counts at every distinct score. `labels` are booleans. Raises UserError unless both classes
    are present and all scores are numbers."""
    labels = np.asarray(labels, bool)
    scores = np.asarray(scores, np.float64)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    if not np.isfinite(scores).all():
        raise UserError("a score is not a finite number; the model has diverged, train it again")
    order = np.argsort(-scores, kind="stable")
    scores, labels, weights = scores[order], labels[order], weights[order]
    last = np.flatnonzero(np.diff(scores, append=-np.inf))  # of each run of equal scores
    true = np.cumsum(weights * labels)
    false = np.cumsum(weights * ~labels)
    if not len(scores) or not true[-1] or not false[-1]:
        raise UserError(
            "a curve needs held-out texts of both labels, there is "
            f"{labels.sum()} of label 1 and {len(labels) - labels.sum()} of label 0; give more text"
        )
    return Counts(scores[last], true[last], false[last], float(true[-1]), float(false[-1]))


def auc(counts: Counts) -> float:
    """Area under the ROC curve: the chance that a text of label 1 scores above one of label 0, a
    tie counting half."""
    tpr = np.append(0.0, counts.recall)
    fpr = np.append(0.0, counts.false_positive_rate)
    return float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))


def average_precision(counts: Counts) -> float:
    """The mean of the precision over recall, as a step function."""
    return float(np.sum(np.diff(np.append(0.0, counts.recall)) * counts.precision))


# ---------------------------------------------------------------------------- calibration


@dataclasses.dataclass(frozen=True)
class Calibration:
    """probability = sigmoid(logit / temperature + bias).

    The temperature mends over-confidence (Guo et al. 2017); the bias mends the share of label 1,
    which training may have balanced (Platt 1999).
    """

    temperature: float = 1.0
    bias: float = 0.0

    def probability(self, logits: np.ndarray) -> np.ndarray:
        return sigmoid(np.asarray(logits, np.float64) / self.temperature + self.bias)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Without overflow on either side."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, np.float64)))


def calibrate(
    labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None
) -> Calibration:
    """The calibration of least cross-entropy, temperatures up to 100.

    The targets are Platt's (n1 + 1) / (n1 + 2) and 1 / (n0 + 2) rather than 1 and 0, so that
    separable data has a finite optimum. Logits that tell nothing, or the wrong way round, end at
    the largest temperature: every probability is then about the share of label 1.
    """
    labels = np.asarray(labels, bool)
    logits = np.asarray(logits, np.float64)
    weights = np.ones(len(logits)) if weights is None else np.asarray(weights, np.float64)
    positives, negatives = weights[labels].sum(), weights[~labels].sum()
    targets = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    prior = math.log((positives + 1) / (negatives + 1))
    both = np.stack([logits, np.ones_like(logits)])
    slope, bias = _minimise(both, np.zeros_like(logits), targets, weights, np.array([0.0, prior]))
    if slope < 1 / MAX_TEMPERATURE:
        slope = 1 / MAX_TEMPERATURE
        (bias,) = _minimise(both[1:], slope * logits, targets, weights, np.array([prior]))
    return Calibration(temperature=float(1 / slope), bias=float(bias))


def _minimise(
    features: np.ndarray,
    offset: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    point: np.ndarray,
) -> np.ndarray:
    """Logistic regression of `targets` on `features` [F, N]: Newton's method, halving a step that
    does not help enough."""
    loss = _cross_entropy(point @ features + offset, targets, weights)
    for _ in range(_ITERATIONS):
        p = sigmoid(point @ features + offset)
        gradient = features @ (weights * (p - targets))
        hessian = (features * (weights * p * (1 - p))) @ features.T
        step = np.linalg.solve(hessian + 1e-9 * np.eye(len(point)), gradient)
        size, slope = 1.0, float(gradient @ step)
        nearer = _cross_entropy((point - step) @ features + offset, targets, weights)
        while nearer > loss - 1e-4 * size * slope and size > 1e-8:
            size /= 2
            there = (point - size * step) @ features + offset
            nearer = _cross_entropy(there, targets, weights)
        if nearer >= loss:
            break
        point, loss = point - size * step, nearer
    return point


def _cross_entropy(x: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    return float(np.sum(weights * (np.logaddexp(0.0, x) - targets * x)))


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Mean distance between what is predicted and what happens, over bins of equal count."""
    order = np.argsort(probabilities, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    gaps = [len(p) * abs(probabilities[p].mean() - labels[p].mean()) for p in parts]
    return float(sum(gaps) / len(order))


# -------------------------------------------------------------------------------- cut-off


@dataclasses.dataclass(frozen=True)
class CutoffRule:
    """Where to cut: the most recall at `precision` or better, or else the largest F-beta.

    A high precision keeps good text; beta > 1 would rather lose good text than keep bad.
    """

    precision: float | None = None
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.precision is not None and not 0 < self.precision <= 1:
            raise UserError(f"the target precision is {self.precision}; it must lie in (0, 1]")
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be positive")

    def choose(self, counts: Counts) -> float | None:
        """The threshold; None when no threshold reaches the wanted precision."""
        if self.precision is None:
            return float(counts.thresholds[int(np.argmax(counts.f_score(self.beta)))])
        enough = np.flatnonzero(counts.precision >= self.precision)
        # Recall grows with the index, so the last one has the most.
        return float(counts.thresholds[enough[-1]]) if len(enough) else None

    def describe(self) -> str:
        if self.precision is None:
            return f"largest F{self.beta:g}"
        return f"most recall at precision {self.precision:g}"


def at(counts: Counts, threshold: float) -> dict[str, float]:
    """Precision (1 where nothing is flagged), recall, false positive rate, flagged share and F1."""
    index = int(np.searchsorted(-counts.thresholds, -threshold, side="right")) - 1
    if index < 0:
        empty = {"recall": 0.0, "false_positive_rate": 0.0, "flagged_share": 0.0, "f1": 0.0}
        return {"precision": 1.0, **empty}
    return {
        "precision": float(counts.precision[index]),
        "recall": float(counts.recall[index]),
        "false_positive_rate": float(counts.false_positive_rate[index]),
        "flagged_share": float(counts.flagged_share[index]),
        "f1": float(counts.f_score(1.0)[index]),
    }


def curve(counts: Counts, points: int = 200) -> dict[str, list[float]]:
    """At most `points` thresholds, evenly spread over the ranks and both ends among them."""
    index = np.unique(np.linspace(0, len(counts.thresholds) - 1, points).round().astype(int))
    return {
        "threshold": counts.thresholds[index].tolist(),
        "precision": counts.precision[index].tolist(),
        "recall": counts.recall[index].tolist(),
        "false_positive_rate": counts.false_positive_rate[index].tolist(),
        "flagged_share": counts.flagged_share[index].tolist(),
    }


def report(
    rule: CutoffRule,
    validation: tuple[np.ndarray, np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> tuple[Calibration, dict[str, Any]]:
    """Calibrates and cuts on `validation`, measures on `test`; each is (labels, logits, weights).

    Returns the calibration and what goes to classifier.json and result.json: both curves over
    calibrated probabilities, the cut-off, and what it does to texts that chose nothing.
    """
    calibration = calibrate(*validation)
    measured: dict[str, Any] = {}
    counted: dict[str, Counts] = {}
    for name, (labels, logits, weights) in (("validation", validation), ("test", test)):
        probabilities = calibration.probability(logits)
        counts = counted[name] = count(labels, probabilities, weights)
        measured[name] = {
            "texts": len(labels),
            "positives": int(np.sum(labels)),
            "auc": auc(counts),
            "average_precision": average_precision(counts),
            "calibration_error": calibration_error(labels, probabilities),
            "calibration_error_before": calibration_error(labels, sigmoid(logits)),
            "curve": curve(counts),
        }
    threshold = rule.choose(counted["validation"])
    cutoff: dict[str, Any] = {"rule": rule.describe(), "threshold": threshold}
    if threshold is not None:
        cutoff |= {name: at(counts, threshold) for name, counts in counted.items()}
    return calibration, {
        "calibration": dataclasses.asdict(calibration),
        "cutoff": cutoff,
        **measured,
    }
