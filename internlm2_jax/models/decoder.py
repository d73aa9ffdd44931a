"""The InternLM2 decoder: embedding, L equal blocks, final norm, head.

Blocks are stacked along a leading layer axis and applied with `jax.lax.scan`, so that compile time
does not grow with depth. Each block is

    x += Wo attention(norm(x));    x += W2 (silu(W1 h) * W3 h),  h = norm(x)

The KV cache is an argument and a result: nothing here has state.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from internlm2_jax import sharding
from internlm2_jax.models import heads, rope
from internlm2_jax.models.attention import Attention, Rotation
from internlm2_jax.models.config import Head, ModelConfig
from internlm2_jax.models.layers import MLP, Embedding, RMSNorm, depth_std


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """Keys and values of the tokens already seen; every row has the same number of slots in use.

    Rows of unequal length are aligned at the right: the slots before a row's first token hold
    position -1, which no query sees. `theta` is the RoPE base pinned for each row (rope.py).
    """

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]
    positions: Int[Array, "B S"]
    used: Int[Array, ""]
    theta: Float[Array, " B"]


class Block(nnx.Module):
    """One layer."""

    def __init__(self, cfg: ModelConfig, key: Array, layer: Int[Array, ""]) -> None:
        attention, mlp = jax.random.split(key)
        std = cfg.initializer_range
        out_std = depth_std(std, layer) if cfg.residual_init == "depth" else std
        self.attention_norm = RMSNorm(cfg.embed_dim, cfg.norm_eps)
        self.attention = Attention(cfg, attention, out_std)
        self.mlp_norm = RMSNorm(cfg.embed_dim, cfg.norm_eps)
        self.mlp = MLP(mlp, cfg.embed_dim, cfg.mlp_dim, std, out_std)

    def __call__(
        self, x: Array, rotation: Rotation, segment_ids: Array | None, impl: str
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), rotation, segment_ids, impl)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """The whole model. `head` is "lm" (logits) or "scalar" (one score per position)."""

    def __init__(self, cfg: ModelConfig, head: Head, key: Array) -> None:
        embed, layers, out = jax.random.split(key, 3)
        self.cfg = cfg
        self.embed = Embedding(embed, cfg.vocab_size, cfg.embed_dim, cfg.initializer_range)
        self.layers = nnx.vmap(partial(Block, cfg))(
            jax.random.split(layers, cfg.num_layers), jnp.arange(cfg.num_layers)
        )
        self.norm = RMSNorm(cfg.embed_dim, cfg.norm_eps)
        if head == "scalar":
            self.head = heads.scalar(cfg, out)
        elif not cfg.tie_embeddings:
            self.head = heads.lm(cfg, out)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        theta: Float[Array, " B"] | None,
        *,
        remat: bool,
        impl: str,
    ) -> Float[Array, "B T D"]:
        """Final-norm hidden states of whole rows; see `build.Model.hidden`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if theta is None:
            theta = rope.theta_for(self.cfg, rope.lengths_of(positions))
        rotation = rope.tables(positions, theta, self.cfg.head_dim)

        def body(x: Array, block: Block) -> tuple[Array, None]:
            return block(x, rotation, segment_ids, impl), None

        x = self.embed(tokens, jnp.dtype(self.cfg.dtype))
        x, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x, self.layers)
        return self.norm(x)

    def extend(
        self, tokens: Int[Array, "B T"], cache: Cache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final-norm hidden states of T new tokens and the cache with them in it."""
        cfg, start = self.cfg, cache.used
        positions = sharding.constrain(positions, "batch", None)
        seen = jax.lax.dynamic_update_slice(cache.positions, positions, (0, start))
        mask = (seen[:, None, :] >= 0) & (seen[:, None, :] <= positions[:, :, None])
        rotation = rope.tables(positions, cache.theta, cfg.head_dim)

        def body(carry: tuple[Array, Array, Array], xs: tuple[Block, Array]):
            (x, keys, values), (block, layer) = carry, xs
            y, keys, values = block.attention.step(
                block.attention_norm(x), rotation, keys, values, layer, start, mask
            )
            x = x + y
            return (x + block.mlp(block.mlp_norm(x)), keys, values), None

        x = self.embed(tokens, jnp.dtype(cfg.dtype))
        carry = (x, cache.keys, cache.values)
        (x, keys, values), _ = jax.lax.scan(body, carry, (self.layers, jnp.arange(cfg.num_layers)))
        used = start + tokens.shape[1]
        return self.norm(x), Cache(keys, values, seen, used, cache.theta)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        if self.cfg.tie_embeddings:
            return self.embed.attend(hidden)
        return heads.logits(self.head, hidden)

    def scores(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        return heads.scores(self.head, hidden)
