"""Generalised advantage estimation (Schulman et al. 2016, equation 16) over response tokens.

InternLM2 section 4.2.3: lambda 0.99, no advantage normalisation. The discount is not stated; 1 is
usual for a score that comes once, at the end of a response.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.99,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`(advantages, returns)`, both float32, without gradient, and 0 where the mask is off.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t,
    where t+1 is the row's next position *in the mask* and the value past its last one is 0. So
    padding on either side changes nothing, and neither do masked tokens in the middle of a row
    (another speaker's turn), which are stepped over. Rewards off the mask are ignored.
    """
    rewards = rewards.astype(jnp.float32)
    values = values.astype(jnp.float32)
    mask = mask.astype(bool)

    def step(carry, column):
        next_value, next_advantage = carry
        reward, value, here = column
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (
            jnp.where(here, value, next_value),
            jnp.where(here, advantage, next_advantage),
        )
        return carry, jnp.where(here, advantage, 0.0)

    # zeros_like a column, not zeros(): the carry must have the columns' sharding.
    nothing = jnp.zeros_like(rewards[:, 0])
    columns = (rewards.T, values.T, mask.T)
    _, advantages = jax.lax.scan(step, (nothing, nothing), columns, reverse=True)
    advantages = advantages.T
    returns = jnp.where(mask, advantages + values, 0.0)
    return jax.lax.stop_gradient(advantages), jax.lax.stop_gradient(returns)


def whiten(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], epsilon: float = 1e-8
) -> Float[Array, "B T"]:
    """Mean 0 and variance 1 over the mask (biased variance), 0 off it. InternLM2 does without."""
    weights = mask.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weights), 1.0)
    values = jnp.where(weights != 0, values.astype(jnp.float32), 0.0)
    centred = (values - jnp.sum(values) / count) * weights
    variance = jnp.sum(jnp.square(centred)) / count
    return centred * jax.lax.rsqrt(variance + epsilon)
