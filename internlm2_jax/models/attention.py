"""Grouped-query self-attention: projections, rotary positions, the kernel, the output projection.

q, k and v are separate arrays; the fused `wqkv` of public checkpoints is known to convert.py only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax.kernels import attention as kernel
from internlm2_jax.models import rope
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.layers import Linear

Rotation = tuple[Float[Array, "B T 1 H/2"], Float[Array, "B T 1 H/2"]]


class Attention(nnx.Module):
    """`__call__` attends within whole rows, `step` over a cache that it extends."""

    def __init__(self, cfg: ModelConfig, key: Array, out_std: float | Array) -> None:
        d, h, std = cfg.embed_dim, cfg.head_dim, cfg.initializer_range
        q, k, v, o = jax.random.split(key, 4)
        heads, kv_heads = ("embed", "heads", None), ("embed", "kv_heads", None)
        bias = cfg.bias
        self.q = Linear(q, (d, cfg.num_heads, h), heads, std=std, bias=bias)
        self.k = Linear(k, (d, cfg.num_kv_heads, h), kv_heads, std=std, bias=bias)
        self.v = Linear(v, (d, cfg.num_kv_heads, h), kv_heads, std=std, bias=bias)
        out_axes = ("heads", None, "embed")
        self.o = Linear(o, (cfg.num_heads, h, d), out_axes, std=out_std, inputs=2, bias=bias)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        segment_ids: Int[Array, "B T"] | None,
        impl: str,
    ) -> Float[Array, "B T D"]:
        q, k = rope.rotate(self.q(x), *rotation), rope.rotate(self.k(x), *rotation)
        return self.o(kernel.dispatch(q, k, self.v(x), segment_ids=segment_ids, impl=impl))

    def step(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        keys: Float[Array, "L B K S H"],
        values: Float[Array, "L B K S H"],
        layer: Int[Array, ""],
        start: Int[Array, ""],
        mask: Bool[Array, "B T S"],
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B K S H"], Float[Array, "L B K S H"]]:
        """Writes the T new keys and values of `layer` at slot `start`, then attends by `mask`."""
        q, k = rope.rotate(self.q(x), *rotation), rope.rotate(self.k(x), *rotation)
        at = (layer, 0, 0, start, 0)
        keys = jax.lax.dynamic_update_slice(keys, _slots(k, keys.dtype), at)
        values = jax.lax.dynamic_update_slice(values, _slots(self.v(x), values.dtype), at)
        mine = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False)
        theirs = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)
        return self.o(kernel.cached(q, mine, theirs, mask)), keys, values


def _slots(x: Float[Array, "B T K H"], dtype: jnp.dtype) -> Float[Array, "1 B K T H"]:
    return x.astype(dtype).swapaxes(1, 2)[None]
