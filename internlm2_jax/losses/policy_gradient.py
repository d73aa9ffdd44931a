"""PPO's two losses over response tokens (Schulman et al. 2017, equations 7 and 9).

InternLM2 section 4.2.3 trains the critic without value clipping and the actor without normalised
advantages; the clip range is not stated there, so `clip_epsilon` is a field with PPO's 0.2. All
means are over the tokens of the mask, not over sequences first: a long response weighs by its
length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from internlm2_jax.errors import UserError

# exp(20) = 4.9e8: far beyond any clip range, yet its square still fits in float32.
_MAX_LOG_RATIO = 20.0


def masked_mean(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"] | Float[Array, "B T"]
) -> Float[Array, ""]:
    """Mean over the positions where `mask` is set; 0 when none is. Masked NaNs do not leak."""
    weights = mask.astype(jnp.float32)
    total = jnp.sum(jnp.where(weights != 0, values * weights, 0.0))
    return total / jnp.maximum(jnp.sum(weights), 1e-9)


def ppo_policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_epsilon: float = 0.2,
    clip_epsilon_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Clipped surrogate -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), mean over tokens.

    `logprobs` are the actor's (they carry the gradient), `old_logprobs` those of the policy that
    sampled, both in nats over the full distribution. `clip_epsilon_high` widens the upper side
    (DAPO); by default both sides are equal. `dual_clip` c > 1 bounds the loss of a negative
    advantage at -c * A (Ye et al. 2020). Metrics: ratio (mean), ratio_max, clip_fraction (tokens
    whose gradient the clipping removes), approx_kl (k3 of old against new), log_ratio (mean of its
    absolute value: before any update, how far trainer and sampler are apart).
    """
    if dual_clip is not None and dual_clip <= 1:
        raise UserError(f"ppo_policy_loss: dual_clip={dual_clip} must exceed 1, or be None")
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    advantages = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    old_logprobs = jax.lax.stop_gradient(old_logprobs.astype(jnp.float32))
    # A masked position may hold anything, infinities included; 0 keeps it out of the gradient.
    log_ratio = jnp.where(mask, logprobs.astype(jnp.float32) - old_logprobs, 0.0)
    log_ratio = jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)

    unclipped = -ratio * advantages
    clipped = -jnp.clip(ratio, 1.0 - clip_epsilon, 1.0 + high) * advantages
    losses = jnp.maximum(unclipped, clipped)
    removed = clipped > unclipped
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        beyond = (advantages < 0) & (losses > ceiling)
        losses = jnp.where(beyond, ceiling, losses)
        removed = removed | beyond

    return masked_mean(losses, mask), {
        "ratio": masked_mean(ratio, mask),
        "ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
        "clip_fraction": masked_mean(removed.astype(jnp.float32), mask),
        "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "log_ratio": masked_mean(jnp.abs(log_ratio), mask),
    }


def entropy(logits: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    """Entropy of each distribution, in nats; -inf logits count as probability 0."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.where(jnp.isfinite(logprobs), jnp.exp(logprobs) * logprobs, 0.0), axis=-1)


def value_loss(
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    old_values: Float[Array, "B T"] | None = None,
    clip_epsilon: float | None = None,
) -> Float[Array, ""]:
    """Half the squared error of the critic, mean over tokens; returns carry no gradient.

    Unclipped by default, as in InternLM2. With `clip_epsilon`, `old_values` are needed and the
    worse of the plain and the clipped prediction counts (PPO2). Raises UserError if only one of
    the two is given.
    """
    if (clip_epsilon is None) != (old_values is None):
        raise UserError("value_loss: clip_epsilon and old_values go together; give both or neither")
    values = values.astype(jnp.float32)
    returns = jax.lax.stop_gradient(returns.astype(jnp.float32))
    losses = jnp.square(values - returns)
    if clip_epsilon is not None and old_values is not None:
        old = jax.lax.stop_gradient(old_values.astype(jnp.float32))
        near = old + jnp.clip(values - old, -clip_epsilon, clip_epsilon)
        losses = jnp.maximum(losses, jnp.square(near - returns))
    return 0.5 * masked_mean(losses, mask)
