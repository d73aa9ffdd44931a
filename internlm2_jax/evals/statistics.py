"""What a score is worth: pass@k, votes, intervals, and tests between two checkpoints."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from internlm2_jax.errors import UserError

RESAMPLES = 10_000


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of k samples is right, unbiased, from `right` of `samples` that were.

    1 - C(n - c, k) / C(n, k); source: Codex (arXiv 2107.03374), section 2.1.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise UserError(f"pass@{k} of {samples} samples, {right} right, means nothing")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str], right: Sequence[bool]) -> float:
    """Whether the commonest answer is right; of several, the share of them that are.

    An empty answer has no vote. Equal answers count as right when the first of them was.
    """
    votes = collections.Counter(answer for answer in answers if answer)
    if not votes:
        return 0.0
    best = max(votes.values())
    leaders = [answer for answer, count in votes.items() if count == best]
    verdict = dict(zip(reversed(answers), reversed(right), strict=True))
    return sum(verdict[leader] for leader in leaders) / len(leaders)


def interval(
    scores: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean over items, by percentiles."""
    means = _resampled(np.asarray(scores, float)[:, None], resamples, seed)[:, 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means [resamples, C] of rows drawn with replacement from [N, C], in bounded memory."""
    n = len(columns)
    if n == 0:
        raise UserError("there is no item to measure")
    rng = np.random.default_rng(seed)
    step = max(1, 2**22 // n)
    parts = [
        columns[rng.integers(0, n, (min(step, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Paired:
    """The difference of two runs on the same items, b - a.

    Attributes:
      difference, low, high: of the means, with its 95% bootstrap interval over items.
      p: two-sided; McNemar's exact test where scores are 0 or 1, else a test of random signs.
      better, worse: items on which b scores more, and less, than a.
    """

    items: int
    difference: float
    low: float
    high: float
    p: float
    better: int
    worse: int


def paired(
    a: Sequence[float], b: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Paired:
    """Compares two runs item by item. Errors: UserError when they differ in number."""
    if len(a) != len(b):
        raise UserError(f"a paired test needs the same items; got {len(a)} and {len(b)}")
    from scipy import stats  # here: slow to import, and few commands compare

    difference = np.asarray(b, float) - np.asarray(a, float)
    means = _resampled(difference[:, None], resamples, seed)[:, 0]
    low, high = np.quantile(means, [0.025, 0.975])
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    if set(np.unique(difference)) <= {-1.0, 0.0, 1.0}:
        p = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    else:
        p = _random_signs(difference, resamples, seed)
    return Paired(
        len(difference), float(difference.mean()), float(low), float(high), float(p), better, worse
    )


def _random_signs(difference: np.ndarray, resamples: int, seed: int) -> float:
    """Share of random sign flips whose mean is as far from 0, the one seen included."""
    rng = np.random.default_rng(seed)
    changed = difference[difference != 0]
    seen, extreme = abs(changed.sum()) - 1e-12, 0
    step = max(1, 2**22 // max(1, len(changed)))
    for start in range(0, resamples, step):
        signs = rng.choice([-1.0, 1.0], (min(step, resamples - start), len(changed)))
        extreme += int((np.abs(signs @ changed) >= seen).sum())
    return (extreme + 1) / (resamples + 1)
