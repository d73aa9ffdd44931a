"""Three grades of code from scores: high quality is repeated, moderate used once, low dropped; with
cut-offs per language that give the report's shares of bytes (InternLM2, section 3.1.2: 16.8 %
high, 69.9 % moderate, 13.3 % low), and a model's score in place of the rules' in the languages in
which it agrees with people, or with the rules where nobody labelled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from internlm2_jax.errors import UserError

HIGH, MODERATE, LOW = "high", "moderate", "low"
# Times a file is used; the report says "multiple times" for high. Two is our choice.
EPOCHS = {HIGH: 2, MODERATE: 1, LOW: 0}
REPORT_SHARES = (0.168, 0.699, 0.133)

BY_RULES, BY_MODEL = "rules", "model"  # whose score a language is graded by
BINS = 1000  # of a histogram of scores in [0, 1]


def histogram(scores: Sequence[float], num_bytes: Sequence[int]) -> np.ndarray:
    """[BINS] int64: bytes by score. Histograms of shards add up. Files without a score (NaN) are
    left out."""
    values = np.asarray(scores, np.float64)
    known = ~np.isnan(values)
    places = np.clip((values[known] * BINS).astype(np.int64), 0, BINS - 1)
    weights = np.asarray(num_bytes, np.int64)[known]
    counts = np.zeros(BINS, np.int64)
    np.add.at(counts, places, weights)
    return counts


@dataclasses.dataclass(frozen=True)
class Cut:
    """Scores below `low` are of low quality, from `high` on of high quality."""

    low: float
    high: float
    scorer: str = BY_RULES


def _cut(counts: np.ndarray, shares: tuple[float, float, float]) -> tuple[float, float]:
    """Borders of bins with the byte shares nearest to those asked for."""
    below = np.append(0, np.cumsum(counts)) / max(counts.sum(), 1)
    low = int(np.argmin(np.abs(below - shares[2])))
    high = int(np.argmin(np.abs(below - (shares[1] + shares[2]))))
    return low / BINS, max(low, high) / BINS


def calibrate(
    histograms: Mapping[str, np.ndarray],
    shares: tuple[float, float, float] = REPORT_SHARES,
    keep_below: float = 0.001,
    models: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Cut]:
    """Cut-offs per language from the histograms of its rule scores, or of its model scores for the
    languages in `models`; `shares` are of bytes: high, moderate, low.

    A language with less than `keep_below` of all bytes loses nothing to low quality: the report
    keeps low-resource languages.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"shares of the grades are {shares}; give three numbers that add up to 1")
    total = sum(int(counts.sum()) for counts in histograms.values())
    cuts = {}
    for lang in sorted(histograms):
        modelled = models is not None and lang in models
        counts = models[lang] if models is not None and modelled else histograms[lang]
        low, high = _cut(counts, shares)
        if histograms[lang].sum() < keep_below * total:
            low = 0.0
        cuts[lang] = Cut(low, high, BY_MODEL if modelled else BY_RULES)
    return cuts


def grade(cuts: Mapping[str, Cut], lang: str, rule: float, model: float = math.nan) -> str:
    """Moderate for a language without cut-offs, and for a file without a score."""
    cut = cuts.get(lang)
    if cut is None:
        return MODERATE
    value = model if cut.scorer == BY_MODEL else rule
    if value is None or math.isnan(value):
        return MODERATE
    return LOW if value < cut.low else HIGH if value >= cut.high else MODERATE


def to_json(cuts: Mapping[str, Cut]) -> dict[str, Any]:
    return {lang: dataclasses.asdict(cut) for lang, cut in sorted(cuts.items())}


def from_json(value: Any) -> dict[str, Cut]:
    try:
        return {
            str(lang): Cut(float(cut["low"]), float(cut["high"]), str(cut.get("scorer", BY_RULES)))
            for lang, cut in value.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the cut-offs of the grades cannot be read ({error!r}); they are an object"
            ' {language: {"low": 0.4, "high": 0.8, "scorer": "rules"}}'
        ) from error


# --- Does a model agree? ---


def separation(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative (the area under the ROC curve), ties by
    half. NaN when either is empty."""
    up, down = np.sort(np.asarray(positive, float)), np.sort(np.asarray(negative, float))
    if not len(up) or not len(down):
        return math.nan
    below = np.searchsorted(down, up, "left").sum() + np.searchsorted(down, up, "right").sum()
    return float(below / (2 * len(up) * len(down)))


@dataclasses.dataclass(frozen=True)
class Scored:
    """One file: `label` 1 good, 0 bad, as a person said, or None."""

    lang: str
    rule: float
    model: float
    label: int | None = None


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of a language: measured against people's `labels` or the "rules"."""

    separation: float
    reference: str
    pairs: int
    accepted: bool


def agreement(
    scored: Iterable[Scored],
    minimum: float = 0.8,
    min_labels: int = 50,
    extremes: float = 0.2,
) -> dict[str, Agreement]:
    """Where the model may replace the rules.

    Against labels when a language has `min_labels` of them, at least a tenth of each kind; else
    against the rules' surest cases, the share `extremes` at either end. Accepted when the model
    separates the two sides with probability `minimum`.
    """
    by_lang: dict[str, list[Scored]] = {}
    for item in scored:
        if not math.isnan(item.model):
            by_lang.setdefault(item.lang, []).append(item)
    result = {}
    for lang, items in sorted(by_lang.items()):
        good = [item.model for item in items if item.label == 1]
        bad = [item.model for item in items if item.label == 0]
        labels = len(good) + len(bad)
        reference = "labels"
        if labels < min_labels or min(len(good), len(bad)) < 0.1 * labels:
            reference = "rules"
            ranked = sorted((i for i in items if not math.isnan(i.rule)), key=lambda i: i.rule)
            count = int(len(ranked) * extremes)
            bad = [item.model for item in ranked[:count]]
            good = [item.model for item in ranked[len(ranked) - count :]] if count else []
        value = separation(good, bad)
        enough = len(good) + len(bad) >= min_labels or reference == "labels"
        accepted = enough and not math.isnan(value) and value >= minimum
        result[lang] = Agreement(value, reference, len(good) + len(bad), accepted)
    return result


def overturned(labels: Mapping[str, int], grades: Mapping[str, str]) -> list[str]:
    """Ids whose label a new scorer contradicts (good but low, bad but high): the report checks
    after each round of annotation that old labels stay right."""
    return sorted(
        id
        for id, label in labels.items()
        if (label == 1 and grades.get(id) == LOW) or (label == 0 and grades.get(id) == HIGH)
    )
