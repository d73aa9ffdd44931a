"""Grouped-query self-attention: projections, rotary positions, the kernel, the output projection.

q, k and v are separate arrays; the fused `wqkv` of public checkpoints is known to convert.py only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax import sharding
from internlm2_jax.kernels import attention as kernel
from internlm2_jax.kernels.ring_attention import ring_attention
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
        bias = cfg.bias or cfg.qkv_bias
        self.q = Linear(q, (d, cfg.num_heads, h), heads, std=std, bias=bias)
        self.k = Linear(k, (d, cfg.num_kv_heads, h), kv_heads, std=std, bias=bias)
        self.v = Linear(v, (d, cfg.num_kv_heads, h), kv_heads, std=std, bias=bias)
        out_axes = ("heads", None, "embed")
        self.o = Linear(o, (cfg.num_heads, h, d), out_axes, std=out_std, inputs=2, bias=cfg.bias)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        segment_ids: Int[Array, "B T"] | None,
        impl: str,
        window: int | None,
    ) -> Float[Array, "B T D"]:
        x = sharding.constrain(x, "batch", "length", None)
        q = checkpoint_name(rope.rotate(self.q(x), *rotation), "q")
        k = checkpoint_name(rope.rotate(self.k(x), *rotation), "k")
        v = checkpoint_name(self.v(x), "v")
        if sharding.size_of("context") > 1:
            out = ring_attention(q, k, v, segment_ids=segment_ids, window=window)
        else:

            def attend(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
                return kernel.dispatch(q, k, v, segment_ids=segment_ids, window=window, impl=impl)

            heads, kv = (("batch", "length", name, None) for name in ("heads", "kv_heads"))
            each = sharding.per_device(attend, (heads, kv, kv, ("batch", "length")), heads)
            out = each(q, k, v, segment_ids)
        return checkpoint_name(self.o(out), "o")

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
        x = sharding.constrain(x, "batch", "length", None)
        # The slots of a cache are not cut: every device holds all tokens of its rows and heads.
        q = sharding.constrain(self.q(x), "batch", None, "heads", None)
        k, v = (sharding.constrain(f(x), "batch", None, "kv_heads", None) for f in (self.k, self.v))
        q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        at = (layer, 0, 0, start, 0)
        keys = jax.lax.dynamic_update_slice(keys, _slots(k, keys.dtype), at)
        values = jax.lax.dynamic_update_slice(values, _slots(v, values.dtype), at)
        mine = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False)
        theirs = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)
        return self.o(kernel.appended(q, mine, theirs, mask)), keys, values


def _slots(x: Float[Array, "B T K H"], dtype: jnp.dtype) -> Float[Array, "1 B K T H"]:
    return x.astype(dtype).swapaxes(1, 2)[None]
