"""Grouped-query self-attention: projections, rotary positions, the kernel, the output projection.

q, k and v are separate arrays; the fused `wqkv` of public checkpoints is known to convert.py only.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from internlm2_jax import sharding
from internlm2_jax.kernels import attention as kernel
from internlm2_jax.kernels import decode_gqa, paged
from internlm2_jax.kernels.ring_attention import ring_attention
from internlm2_jax.models import rope
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.layers import Linear

Rotation = tuple[Float[Array, "B T 1 H/2"], Float[Array, "B T 1 H/2"]]
# Keys and values [L, P, K, page, H]; of int8, their float32 scales [L, P, K, page] too.
Pages = tuple[Array, ...]


class Attention(nnx.Module):
    """`__call__` attends within whole rows, `step` over a paged cache that it extends."""

    def __init__(self, cfg: ModelConfig, key: Array, out_std: float | Array) -> None:
        d, h, std = cfg.embed_dim, cfg.head_dim, cfg.initializer_range
        q, k, v, o = jax.random.split(key, 4)
        heads, kv_heads = ("embed", "heads", None), ("embed", "kv_heads", None)
        bias = cfg.bias or cfg.qkv_bias
        self.q = Linear(q, (d, cfg.num_heads, h), heads, std=std, bias=bias, lora=cfg.adapter("q"))
        self.k = Linear(
            k, (d, cfg.num_kv_heads, h), kv_heads, std=std, bias=bias, lora=cfg.adapter("k")
        )
        self.v = Linear(
            v, (d, cfg.num_kv_heads, h), kv_heads, std=std, bias=bias, lora=cfg.adapter("v")
        )
        out_axes = ("heads", None, "embed")
        shape, lora = (cfg.num_heads, h, d), cfg.adapter("o")
        self.o = Linear(o, shape, out_axes, std=out_std, inputs=2, bias=cfg.bias, lora=lora)

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
        pages: Pages,
        layer: Int[Array, ""],
        table: Int[Array, "B n"],
        used: Int[Array, " B"],
        counts: Int[Array, " B"],
        window: int | None,
    ) -> tuple[Float[Array, "B T D"], Pages]:
        """Appends the new keys and values to the pages of `layer`, then attends over its rows.

        Row b has counts[b] new tokens after the used[b] that it holds.
        """
        x = sharding.constrain(x, "batch", "length", None)
        # Positions of a cache are not cut: every device holds all tokens of its rows and heads.
        q = sharding.constrain(self.q(x), "batch", None, "heads", None)
        k, v = (sharding.constrain(f(x), "batch", None, "kv_heads", None) for f in (self.k, self.v))
        q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)

        def attend(q, k, v, layer, table, used, counts, *pages):
            keys, values, k_scales, v_scales = pages
            keys, k_scales = paged.append(keys, k_scales, k, layer, table, used, counts)
            values, v_scales = paged.append(values, v_scales, v, layer, table, used, counts)
            out = decode_gqa.dispatch(
                q,
                keys,
                values,
                layer,
                table,
                used + q.shape[1],
                k_scales=k_scales,
                v_scales=v_scales,
                window=window,
            )
            return [out, *(x for x in (keys, values, k_scales, v_scales) if x is not None)]

        heads, kv = (("batch", None, name, None) for name in ("heads", "kv_heads"))
        cut = ("layer", "batch", "kv_heads", None, None)
        kept = [cut, cut, cut[:4], cut[:4]][: len(pages)]
        each = sharding.per_device(
            attend,
            (
                heads,
                kv,
                kv,
                (),
                ("batch", None),
                ("batch",),
                ("batch",),
                cut,
                cut,
                cut[:4],
                cut[:4],
            ),
            [heads, *kept],
        )
        given = (*pages, None, None)[:4]
        out, *pages = each(q, k, v, layer, table, used, counts, *given)
        return self.o(out), tuple(pages)
