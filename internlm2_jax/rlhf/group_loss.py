"""The loss of GRPO and its kin: PPO's clipped surrogate, one advantage a response, no critic."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from internlm2_jax.errors import UserError
from internlm2_jax.losses.policy_gradient import masked_mean, ppo_policy_loss
from internlm2_jax.rlhf import kl

Aggregate = Literal["token", "sequence", "fixed"]


def token_weights(
    mask: Bool[Array, "B T"], aggregate: Aggregate, longest: int
) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """(weights, scale): the loss is scale * sum(weights * losses) / sum(weights).

    token       every token alike (DAPO, arXiv 2503.14476): a long response weighs by its length
    sequence    every response alike, the mean of its tokens (GRPO, arXiv 2402.03300)
    fixed       the sum over tokens by responses times `longest` (Dr. GRPO, arXiv 2503.20783): what
                a token weighs depends on no other's length

    A response without tokens, masked as a whole, counts as none.
    """
    weights = mask.astype(jnp.float32)
    lengths = jnp.sum(weights, axis=1, keepdims=True)
    responses = jnp.maximum(jnp.sum(lengths > 0), 1)
    if aggregate == "token":
        return weights, jnp.float32(1)
    if aggregate == "sequence":
        return weights / jnp.maximum(lengths, 1.0), jnp.float32(1)
    if aggregate == "fixed":
        return weights, jnp.sum(weights) / (responses * longest)
    raise UserError(f"aggregate is {aggregate!r}; choose 'token', 'sequence' or 'fixed'")


def grpo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregate: Aggregate = "token",
    longest: int = 1,
    reference_logprobs: Float[Array, "B T"] | None = None,
    kl_coefficient: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Clipped surrogate plus `kl_coefficient` times k3 of the policy against the reference.

    `logprobs` carry the gradient; `old_logprobs` are those of the policy that sampled. With a
    `clip_high` above `clip_low` rare tokens may grow (DAPO's clip-higher). Metrics: policy_loss,
    ratio, ratio_max, clip_share, approx_kl (against the old policy), and kl_loss where there is a
    reference. Errors: UserError on a KL without a reference.
    """
    if kl_coefficient and reference_logprobs is None:
        raise UserError(f"grpo_loss: kl_coefficient is {kl_coefficient} but there is no reference")
    weights, scale = token_weights(mask, aggregate, longest)
    policy, found = ppo_policy_loss(
        logprobs,
        old_logprobs,
        jnp.broadcast_to(advantages[:, None], mask.shape),
        weights,
        clip_epsilon=clip_low,
        clip_epsilon_high=clip_high,
    )
    loss = scale * policy
    metrics = {
        "policy_loss": loss,
        "ratio": found["ratio"],
        "ratio_max": found["ratio_max"],
        "clip_share": found["clip_fraction"],
        "approx_kl": found["approx_kl"],
    }
    if reference_logprobs is not None:
        # Off the mask anything may stand, and what is infinite there must not reach the gradient.
        ours = jnp.where(mask, logprobs, 0.0)
        away = kl.k3(ours, jnp.where(mask, reference_logprobs, 0.0))
        metrics["kl_loss"] = scale * masked_mean(away, weights)
        loss = loss + kl_coefficient * metrics["kl_loss"]
    return loss, metrics
