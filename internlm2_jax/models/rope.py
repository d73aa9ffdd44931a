"""Rotary positions in the rotate-half order, with InternLM2's dynamic NTK base.

Past `max_position_embeddings` = M the base grows with the length n of the sequence:

    theta(n) = theta * (factor * n / M - (factor - 1)) ** (H / (H - 2))          for n > M

so every length has its own rotation. The public implementation recomputes the base as a sequence
grows but leaves cached keys with the old one, and keeps the grown base for later short inputs. Here
a base is a pure function of a length: a full forward takes it from each row's own longest position,
and a caller that grows a row step by step (the engine) pins it once, from the longest the row may
become, and keeps it for the prompt and every step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from internlm2_jax.models.config import ModelConfig


def theta_for(cfg: ModelConfig, lengths: Int[Array, " B"]) -> Float[Array, " B"]:
    """RoPE base of rows of `lengths` tokens."""
    base = jnp.full(lengths.shape, cfg.rope_theta, jnp.float32)
    if cfg.rope_scaling is None:
        return base
    factor = cfg.rope_scaling.factor
    stretch = factor * lengths.astype(jnp.float32) / cfg.max_position_embeddings - (factor - 1.0)
    exponent = cfg.head_dim / (cfg.head_dim - 2)
    return base * jnp.maximum(stretch, 1.0) ** exponent


def tables(
    positions: Int[Array, "B T"], theta: Float[Array, " B"], head_dim: int
) -> tuple[Float[Array, "B T 1 H/2"], Float[Array, "B T 1 H/2"]]:
    """Cosines and sines of every position and frequency, float32."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / theta[:, None] ** exponents
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[:, None, :]
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 H/2"], sin: Float[Array, "B T 1 H/2"]
) -> Float[Array, "B T N H"]:
    """Turns the pairs (x[i], x[i + H/2]); the products are float32, the result has x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def lengths_of(positions: Int[Array, "B T"]) -> Int[Array, " B"]:
    """Length that each row's positions imply: one more than the largest."""
    return jax.lax.stop_gradient(positions.max(axis=1) + 1)
