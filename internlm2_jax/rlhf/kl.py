"""Per-token estimates of KL(policy || reference) from samples of the policy (Schulman, 2020).

With d = log p_policy - log p_reference at the sampled token:

    k1 = d                   unbiased, signed, high variance: the one for a penalty in the reward
    k2 = d^2 / 2             biased, never negative
    k3 = exp(-d) - 1 + d     unbiased and never negative: the one to watch or to use as a loss

All take [B, T] (any shape) in nats and return the same shape in float32.

In a loss, k2's gradient is that of the KL itself in expectation, k3's is close to it near the
reference; k1's has the expectation 0 and moves nothing, so `PPOConfig` refuses it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

# k3 grows as exp(-d); beyond e^20 the exact number says no more than "far away".
_MAX_EXPONENT = 20.0


def k1(logprobs: Float[Array, "*B"], reference: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """log p - log q."""
    return logprobs.astype(jnp.float32) - reference.astype(jnp.float32)


def k2(logprobs: Float[Array, "*B"], reference: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Half the squared difference."""
    return 0.5 * jnp.square(k1(logprobs, reference))


def k3(logprobs: Float[Array, "*B"], reference: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """q/p - 1 - log(q/p), through expm1 so that small differences keep their digits."""
    difference = k1(logprobs, reference)
    return jnp.expm1(jnp.minimum(-difference, _MAX_EXPONENT)) + difference


Estimator = Literal["k1", "k2", "k3"]
ESTIMATORS: dict[str, Callable] = {"k1": k1, "k2": k2, "k3": k3}


def adapted(
    coefficient: Float[Array, ""],
    measured: Float[Array, ""],
    *,
    target: float,
    horizon: float,
    count: int,
) -> Float[Array, ""]:
    """The coefficient after `count` responses of KL `measured`, to hold it near `target` (nats a
    response; Ziegler et al. 2019, section 2.2): times 1 + clip(measured / target - 1, 0.2) count /
    horizon."""
    error = jnp.clip(measured / target - 1.0, -0.2, 0.2)
    return coefficient * (1.0 + error * count / horizon)
