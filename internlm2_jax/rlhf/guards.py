"""Reasons to stop PPO at once: what it would go on to learn from numbers that cannot be right.

    negative KL     the mean of log p - log p_reference over samples of p is a KL: negative beyond
                    its own noise, iteration after iteration, it means that the tokens were not
                    drawn from the distribution they are weighed with (top-k, top-p, a mask, a
                    wrong temperature)
    mismatch        before any update the trainer's log-probabilities must be the sampler's
    collapse        scores that no longer differ teach nothing: the policy gives one answer, or
                    the reward model says one number

Each looks at the last few iterations, so one odd batch ends nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from internlm2_jax.errors import UserError


class Diverged(UserError):
    """The run was ended: it names the iterations, the numbers and what to look at."""


@dataclasses.dataclass(frozen=True)
class Guards:
    """Limits; one of 0 is off.

    Attributes:
        patience: so many iterations in a row must be bad.
        negative_kl: standard errors by which the mean KL lies below 0.
        mismatch: mean absolute difference of log-probabilities, nats a token, before an update.
        min_reward_std: of the scores of a batch.
    """

    patience: int = 3
    negative_kl: float = 3.0
    mismatch: float = 0.1
    min_reward_std: float = 1e-3

    def check(self, rows: Collection[Mapping[str, Any]], label: str) -> None:
        """Looks at the newest metrics rows. Errors: Diverged."""
        last = list(rows)[-self.patience :]
        if len(last) < self.patience:
            return
        steps = f"{label}: iterations {last[0]['step']} to {last[-1]['step']}"
        if self.negative_kl and all(
            row["kl_signed"] < -self.negative_kl * row["kl_error"] for row in last
        ):
            raise Diverged(
                f"{steps} have a negative KL to the reference ({_shown(last, 'kl_signed')} nats a "
                "response), which no sample of the policy has: sample at top_p 1 and temperature 1"
            )
        if self.mismatch and all(row.get("mismatch", 0.0) > self.mismatch for row in last):
            raise Diverged(
                f"{steps}: sampler and trainer disagree by {_shown(last, 'mismatch')} nats a token "
                f"before any update, more than {self.mismatch}: the rollouts are of other weights, "
                "another mask or another precision"
            )
        if self.min_reward_std and all(row["reward_std"] < self.min_reward_std for row in last):
            raise Diverged(
                f"{steps}: the scores of a batch no longer differ (standard deviation "
                f"{_shown(last, 'reward_std')}): look at samples.html; lower the learning rate or "
                "raise kl_coefficient, or train the reward model again"
            )


def _shown(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    return ", ".join(f"{row[name]:.2g}" for row in rows)
