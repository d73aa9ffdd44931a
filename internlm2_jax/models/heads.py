"""What reads the trunk's last hidden state: next-token logits, or one score per position.

The scalar head serves the reward model (`v_head` in public checkpoints, read at the reward token)
and the PPO critic (read at every position). Either is one matrix; scores and logits are float32.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.layers import Linear


def lm(cfg: ModelConfig, key: Array) -> Linear:
    shape, axes = (cfg.embed_dim, cfg.vocab_size), ("embed", "vocab")
    return Linear(key, shape, axes, std=cfg.initializer_range)


def scalar(cfg: ModelConfig, key: Array) -> Linear:
    return Linear(key, (cfg.embed_dim, 1), ("embed", None), std=cfg.initializer_range)


def logits(head: Linear, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Products in the compute dtype, summed in float32."""
    return head(hidden, jnp.float32)


def scores(head: Linear, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Float32 throughout: one number per position costs nothing."""
    return head(hidden.astype(jnp.float32))[..., 0]
