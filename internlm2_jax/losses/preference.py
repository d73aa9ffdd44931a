"""Losses of the conditional reward model (InternLM2 section 4.2.1), over pairs of scores.

With P = sigmoid(chosen - rejected):

    ranking  L = -(1 - 2 max(0, P - 1/2))^gamma * log P        gamma = 2
    barrier  L = -(log(x + 5) + log(5 - x))                    weight lambda = 0.02

The report leaves two things open, which are therefore arguments:

* `focal_gradient`: "through" differentiates the focal weight too (as xtuner's public code does);
  "stop" takes the weight as a constant, the usual reading of a difficulty *weight*.
* `outside`: the barrier has no value beyond its bound, and a freshly drawn head can start there.
  "clamp" (xtuner) evaluates it at the border: finite, but a score that got out feels no pull back.
  "linear", our default, goes on along the tangent at the border, so that the pull stays. The
  border lies `edge` inside the bound; at 0.01 the tangent's slope is about 100, so lambda * slope
  = 2 exceeds the largest pull of the ranking loss on one score (about 1.2) and a stray score always
  comes home, yet no single score can swamp a batch as 1/edge = 1000 (xtuner's border) would.

Baselines: Bradley-Terry, the same with a margin per pair (Llama 2, arXiv 2307.09288), and the mean
square of the scores in place of the barrier.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from internlm2_jax.errors import UserError

FocalGradient = Literal["through", "stop"]
Outside = Literal["linear", "clamp"]
Ranking = Literal["focal", "bradley_terry", "margin"]
Penalty = Literal["log_barrier", "l2", "none"]


def focal_ranking(
    chosen: Float[Array, "*B"],
    rejected: Float[Array, "*B"],
    *,
    gamma: float = 2.0,
    focal_gradient: FocalGradient = "through",
) -> Float[Array, "*B"]:
    """Focal ranking loss of each pair. Pairs already ranked well weigh less; gamma 0 is plain BT.

    1 - 2 max(0, P - 1/2) equals 2 sigmoid(rejected - chosen) where the pair is ranked rightly and
    1 elsewhere; this form keeps its digits where 1 - 2 (P - 1/2) would round to zero.
    """
    _one_of("focal_gradient", focal_gradient, FocalGradient)
    margin = chosen.astype(jnp.float32) - rejected.astype(jnp.float32)
    # Written with where, so that at a margin of exactly 0 the slope of max(0, .) counts as 0.
    weight = jnp.where(margin > 0, 2.0 * jax.nn.sigmoid(-margin), 1.0) ** gamma
    if focal_gradient == "stop":
        weight = jax.lax.stop_gradient(weight)
    return -weight * jax.nn.log_sigmoid(margin)


def bradley_terry(
    chosen: Float[Array, "*B"],
    rejected: Float[Array, "*B"],
    *,
    margin: float | Float[Array, "*B"] = 0.0,
) -> Float[Array, "*B"]:
    """The baseline, -log sigmoid(chosen - rejected - margin), of each pair."""
    difference = chosen.astype(jnp.float32) - rejected.astype(jnp.float32)
    return -jax.nn.log_sigmoid(difference - margin)


def log_barrier(
    scores: Float[Array, "*B"],
    *,
    bound: float = 5.0,
    outside: Outside = "linear",
    edge: float = 0.01,
) -> Float[Array, "*B"]:
    """-(log(x + bound) + log(bound - x)) of each score, made finite beyond bound - edge.

    The minimum, -2 log(bound), lies at 0: only its gradient matters. Raises UserError unless
    0 < edge < bound.
    """
    _one_of("outside", outside, Outside)
    if not 0 < edge < bound:
        raise UserError(f"log_barrier: edge={edge} must lie between 0 and bound={bound}")
    scores = scores.astype(jnp.float32)
    border = bound - edge
    inside = jnp.clip(scores, -border, border)
    barrier = -(jnp.log(bound + inside) + jnp.log(bound - inside))
    if outside == "linear":
        slope = 1.0 / edge - 1.0 / (bound + border)  # derivative of the barrier at +border
        barrier = barrier + slope * jax.nn.relu(jnp.abs(scores) - border)
    return barrier


@dataclasses.dataclass(frozen=True)
class RewardLoss:
    """Ranking loss + penalty_weight * penalty, a function of the scores of pairs.

    The defaults are the report's loss. Its penalty is summed over both scores of a pair and divided
    by the number of *pairs* (xtuner), so the effective weight of each score is lambda, not
    lambda / 2.

    Attributes:
        ranking: "focal", "bradley_terry", or "margin": Bradley-Terry in which the chosen score has
            to lead by `margin` times the pair's own.
        penalty: "log_barrier", "l2" (the square of each score) or "none".
        gamma, focal_gradient: of the focal loss.
        bound, outside, edge: of the barrier.
    """

    ranking: Ranking = "focal"
    penalty: Penalty = "log_barrier"
    gamma: float = 2.0
    focal_gradient: FocalGradient = "through"
    margin: float = 1.0
    penalty_weight: float = 0.02
    bound: float = 5.0
    outside: Outside = "linear"
    edge: float = 0.01

    def __post_init__(self) -> None:
        _one_of("ranking", self.ranking, Ranking)
        _one_of("penalty", self.penalty, Penalty)

    def __call__(
        self,
        chosen: Float[Array, "*B"],
        rejected: Float[Array, "*B"],
        *,
        weights: Float[Array, "*B"] | None = None,
        margins: Float[Array, "*B"] | float = 1.0,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """(loss, metrics), averaged over pairs.

        `weights` are 1 for pairs and 0 for padding. Metrics are weighted means over pairs: ranking,
        penalty, accuracy (ties count half), margin, chosen, rejected, and outside (share of scores
        beyond the bound); and pairs, their number.
        """
        chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
        weights = jnp.ones_like(chosen) if weights is None else weights.astype(jnp.float32)
        count = jnp.sum(weights)

        def mean(values: Float[Array, "*B"]) -> Float[Array, ""]:
            kept = jnp.where(weights != 0, values * weights, 0.0)
            return jnp.sum(kept) / jnp.maximum(count, 1e-9)

        ranking = mean(self._ranking(chosen, rejected, margins))
        penalty = mean(self._penalty(chosen) + self._penalty(rejected))
        beyond = [(jnp.abs(s) > self.bound).astype(jnp.float32) for s in (chosen, rejected)]
        return ranking + self.penalty_weight * penalty, {
            "ranking": ranking,
            "penalty": penalty,
            "accuracy": mean(0.5 * (1.0 + jnp.sign(chosen - rejected))),
            "margin": mean(chosen - rejected),
            "chosen": mean(chosen),
            "rejected": mean(rejected),
            "outside": mean(0.5 * (beyond[0] + beyond[1])),
            "pairs": count,
        }

    def _ranking(self, chosen: Array, rejected: Array, margins: Array | float) -> Array:
        if self.ranking == "focal":
            return focal_ranking(
                chosen, rejected, gamma=self.gamma, focal_gradient=self.focal_gradient
            )
        margin = self.margin * margins if self.ranking == "margin" else 0.0
        return bradley_terry(chosen, rejected, margin=margin)

    def _penalty(self, scores: Array) -> Array:
        if self.penalty == "log_barrier":
            return log_barrier(scores, bound=self.bound, outside=self.outside, edge=self.edge)
        return jnp.square(scores) if self.penalty == "l2" else jnp.zeros_like(scores)


def _one_of(field: str, value: str, choices: object) -> None:
    known = get_args(choices)
    if value not in known:
        raise UserError(f"{field}={value!r} is unknown; choose one of {', '.join(known)}")
