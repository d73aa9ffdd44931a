"""Rotary positions in the rotate-half order, with the scalings of rope_scaling.py.

A row's frequencies are a pure function of one number, the length that the row is rotated for. A
full forward takes each row's own length (its largest position plus one); a caller that grows a row
step by step (the engine) fixes it once, at the longest the row may become, and keeps it for the
prompt and every step. The public implementations recompute frequencies as a sequence grows, leave
cached keys with the old ones, and some keep the grown ones for later short inputs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.rope_scaling import DynamicNTK, LongRoPE, PositionInterpolation, YaRN


def frequencies(cfg: ModelConfig, lengths: Int[Array, " B"]) -> Float[Array, "B H/2"]:
    """Radians per position of every pair, float32, in rows rotated for `lengths` tokens."""
    scaling = cfg.rope_scaling
    theta = jnp.full(lengths.shape, cfg.rope_theta, jnp.float32)
    if isinstance(scaling, DynamicNTK):
        reach = lengths.astype(jnp.float32) / cfg.max_position_embeddings
        stretch = jnp.maximum(scaling.factor * reach - (scaling.factor - 1.0), 1.0)
        theta = theta * stretch ** (cfg.head_dim / (cfg.head_dim - 2))
    exponents = jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim
    plain = 1.0 / theta[:, None] ** exponents
    if isinstance(scaling, PositionInterpolation):
        return plain / scaling.factor
    if isinstance(scaling, YaRN):
        kept = _yarn_ramp(scaling, cfg)
        return plain * jnp.asarray((1.0 - kept) / scaling.factor + kept, jnp.float32)
    if isinstance(scaling, LongRoPE):
        long = lengths[:, None] > scaling.original_max_position_embeddings
        longer = jnp.asarray(scaling.long_factor, jnp.float32)
        return plain / jnp.where(long, longer, jnp.asarray(scaling.short_factor, jnp.float32))
    return plain


def attention_factor(cfg: ModelConfig) -> float:
    """What cosines and sines are multiplied by; scores grow by its square."""
    scaling = cfg.rope_scaling
    if isinstance(scaling, YaRN | LongRoPE):
        return scaling.attention(cfg.max_position_embeddings)
    return 1.0


def tables(
    cfg: ModelConfig, positions: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B T 1 H/2"], Float[Array, "B T 1 H/2"]]:
    """Cosines and sines of every position and pair, float32, attention factor included."""
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies(cfg, lengths)[:, None, :]
    factor = attention_factor(cfg)
    return factor * jnp.cos(angles)[:, :, None, :], factor * jnp.sin(angles)[:, :, None, :]


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


def _yarn_ramp(scaling: YaRN, cfg: ModelConfig) -> np.ndarray:
    """[H/2] share of each pair's own frequency that is kept: 1 for fast pairs, 0 for slow ones."""

    def pair_of(turns: float) -> float:
        span = scaling.original_max_position_embeddings / (2 * math.pi * turns)
        return cfg.head_dim * math.log(span) / (2 * math.log(cfg.rope_theta))

    low = float(max(math.floor(pair_of(scaling.beta_fast)), 0))
    high = float(min(math.ceil(pair_of(scaling.beta_slow)), cfg.head_dim - 1))
    if low == high:
        high += 0.001  # a step, as the public code has it
    return 1.0 - np.clip((np.arange(cfg.head_dim // 2) - low) / (high - low), 0.0, 1.0)
