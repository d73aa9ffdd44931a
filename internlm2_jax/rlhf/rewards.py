"""Where the reward of a response lands on its tokens.

InternLM2 section 4.2.3 gives a KL coefficient of 0.01 and does not say where it is applied; here,
as in InstructGPT, every token pays -beta * (log p_actor - log p_reference) and the reward model's
score is added at the last token. Everything is float32: a peer framework built this array from
integer zeros and so cut every fractional score to an integer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from internlm2_jax.rlhf.kl import k1


def shape(
    scores: Float[Array, " B"],
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    finished: Bool[Array, " B"],
    *,
    kl_coefficient: float | Float[Array, ""] = 0.01,
    missing_eos_penalty: float = 0.0,
    estimator: Callable[[Array, Array], Array] = k1,
) -> Float[Array, "B T"]:
    """Per-token rewards of a batch of responses, 0 off the mask, without gradient.

    `mask` marks response tokens; `finished[b]` says that row b ended by itself, with its stop
    token, and was not cut. A row that did not loses `missing_eos_penalty` from its score: without
    it, a policy paid for long answers learns never to stop. A row with an empty mask gets nothing.
    """
    mask = mask.astype(bool)
    penalty = kl_coefficient * estimator(logprobs, reference_logprobs)
    rewards = jnp.where(mask, -penalty.astype(jnp.float32), 0.0)
    totals = scores.astype(jnp.float32) - missing_eos_penalty * (~finished.astype(bool))
    rewards = rewards + jnp.where(last_token(mask), totals[:, None], 0.0)
    return jax.lax.stop_gradient(rewards)


def last_token(mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the last position of each row's mask, nowhere in an empty row."""
    mask = mask.astype(bool)
    left = jnp.cumsum(mask[:, ::-1].astype(jnp.int32), axis=1)[:, ::-1]  # mask positions from t on
    return mask & (left == 1)


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of all numbers seen so far (Welford)."""

    seen: Float[Array, ""]
    mean: Float[Array, ""]
    deviations: Float[Array, ""]

    @classmethod
    def empty(cls) -> Moments:
        return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))

    def after(self, values: Float[Array, " B"]) -> Moments:
        """With more numbers seen (Chan et al.'s pairwise update)."""
        values = values.astype(jnp.float32)
        count, mean = jnp.float32(values.size), jnp.mean(values)
        total, shift = self.seen + count, mean - self.mean
        return Moments(
            total,
            self.mean + shift * count / total,
            self.deviations
            + jnp.sum(jnp.square(values - mean))
            + jnp.square(shift) * self.seen * count / total,
        )

    @property
    def std(self) -> Float[Array, ""]:
        """Biased standard deviation."""
        return jnp.sqrt(self.deviations / jnp.maximum(self.seen, 1.0))


def normalised(
    scores: Float[Array, " B"], moments: Moments, epsilon: float = 1e-6
) -> Float[Array, " B"]:
    """Scores less the running mean, over the running standard deviation."""
    return (scores.astype(jnp.float32) - moments.mean) / (moments.std + epsilon)
