"""Has a model seen a test set? Losses on training, test and reference examples (report, 5.4).

The loss of a split is the mean over its examples of the mean loss per token of "question answer":

    delta1 = L_test  - L_reference    well below 0: the test set was trained on
    delta2 = L_test  - L_train        well above 0: the training set was trained on, hard

`reference` are new examples of the same kind that nobody can have seen (the report had GPT-4 write
some). They may be easier or harder by themselves, which shifts delta1; the loss of a `baseline`
known to be clean, taken off example by example, takes that away. A finding needs the whole
interval beyond the margin, at a confidence at which a clean model is hardly ever accused: few
examples accuse nobody.

Nothing here imports jax: losses come from stages/contamination.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from internlm2_jax.errors import UserError
from internlm2_jax.evals.intervals import Interval, welch

SPLITS = ("train", "test", "reference")


@dataclass(frozen=True)
class Finding:
    """What the losses say, in nats per token.

    losses: mean of each split; delta1, delta2: with intervals over examples.
    test_leak, train_fit: whether an interval lies beyond the margin.
    """

    losses: Mapping[str, float]
    delta1: Interval
    delta2: Interval
    test_leak: bool
    train_fit: bool


def judge(
    losses: Mapping[str, Sequence[float]],
    baseline: Mapping[str, Sequence[float]] | None = None,
    *,
    margin: float = 0.05,
    confidence: float = 0.999,
) -> Finding:
    """Deltas and verdicts from the loss of every example of `SPLITS`.

    margin: nats per token that a delta must pass; a choice: the report names none, its clean models
        have delta1 from 0.02 to 0.09, the one that it suspects -0.12.
    confidence: of the intervals (Welch), a choice as well.
    Errors: UserError for an empty split, or a baseline with other examples.
    """
    for name in SPLITS:
        if len(losses.get(name, ())) < 2:
            raise UserError(f"contamination: the {name} set needs two examples or more")
        if baseline is not None and len(baseline[name]) != len(losses[name]):
            raise UserError(f"contamination: the baseline has other examples in the {name} set")
    arrays = {
        name: np.asarray(losses[name], float) - (np.asarray(baseline[name]) if baseline else 0.0)
        for name in SPLITS
    }

    def delta(other: str) -> Interval:
        return welch(arrays["test"], arrays[other], confidence)

    delta1, delta2 = delta("reference"), delta("train")
    return Finding(
        {name: float(np.mean(losses[name])) for name in SPLITS},
        delta1,
        delta2,
        test_leak=delta1.high < -margin,
        train_fit=delta2.low > margin,
    )


@dataclass(frozen=True)
class Overlap:
    """Of one evaluation set: `examples`, how many could be looked for (`indexed`), and how many
    stand in the corpus, `found`; some of them, with the document."""

    examples: int
    indexed: int
    found: int
    samples: Sequence[Mapping[str, Any]]

    @property
    def share(self) -> float:
        return self.found / self.indexed if self.indexed else 0.0


def describe(finding: Finding, overlaps: Mapping[str, Overlap]) -> list[str]:
    """The findings in words, one line each."""

    def delta(name: str, interval: Interval) -> str:
        return f"{name} {interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}] nats/token"

    lines = [
        f"{delta('test - reference', finding.delta1)}: "
        + ("the test set was trained on" if finding.test_leak else "no sign of the test set"),
        f"{delta('test - train', finding.delta2)}: "
        + ("the training set was trained on" if finding.train_fit else "no sign of over-fitting"),
    ]
    lines += [
        f"{name}: {o.found} of {o.indexed} examples stand in the corpus"
        for name, o in overlaps.items()
    ]
    return lines
