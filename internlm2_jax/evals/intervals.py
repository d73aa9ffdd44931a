"""Means and their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

CONFIDENCE = 0.95
Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    count: int


def student(values: Values, least: float = -math.inf, most: float = math.inf) -> Interval:
    """Mean with Student's t interval; of one value alone, low and high are the mean.

    least, most: what a value can be; the interval ends there.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, mean, mean, count)
    error = float(np.std(values, ddof=1)) / count**0.5
    half = float(special.stdtrit(count - 1, 0.5 + CONFIDENCE / 2)) * error
    return Interval(mean, max(mean - half, least), min(mean + half, most), count)


def welch(a: Values, b: Values, confidence: float = CONFIDENCE) -> Interval:
    """mean(a) - mean(b) of two independent samples with Welch's interval, variances unequal."""
    from scipy import stats  # here: slow to import, and few commands compare

    found = stats.ttest_ind(a, b, equal_var=False)
    low, high = found.confidence_interval(confidence)
    return Interval(float(np.mean(a) - np.mean(b)), float(low), float(high), min(len(a), len(b)))
