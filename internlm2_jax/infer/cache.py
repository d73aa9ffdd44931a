"""KV cache of fixed size, and the few sizes that programs are compiled for.

The cache itself (`models.decoder.Cache`) is [L, B, K, S, H]: one entry per key/value head, not per
query head, and slots next to the head so that a step reads each head's keys in one stretch.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Int

from internlm2_jax import sharding
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.decoder import Cache


def empty(cfg: ModelConfig, slots: int, lengths: Int[Array, " B"]) -> Cache:
    """A cache with no tokens.

    Args:
      slots: how many tokens fit in a row, padding included.
      lengths: the most tokens each row may come to hold; fixes its rotation (rope.py).
    """
    batch = lengths.shape[0]
    shape = (cfg.num_layers, batch, cfg.num_kv_heads, slots, cfg.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(cfg.dtype))
    zeros = sharding.constrain(zeros, "layer", "batch", "kv_heads", None, None)
    return Cache(
        keys=zeros,
        values=zeros,
        positions=sharding.constrain(jnp.full((batch, slots), -1, jnp.int32), "batch", None),
        used=jnp.zeros((), jnp.int32),
        rope_length=lengths,
    )


def bytes_per_token(cfg: ModelConfig) -> int:
    """Bytes that one token of one row takes."""
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize


def bucket(size: int, smallest: int = 16) -> int:
    """The compiled size that holds `size`: smallest * 2**n or 1.5 * smallest * 2**n."""
    if size <= smallest:
        return smallest
    power = smallest * 2 ** math.ceil(math.log2(size / smallest))
    return power * 3 // 4 if size <= power * 3 // 4 else power
