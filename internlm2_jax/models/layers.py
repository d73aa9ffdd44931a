"""Linear, RMSNorm and Embedding: `nnx.Module`s that hold arrays and are used as plain pytrees.

`logical_axes` is metadata of ours that flax neither reads nor changes; sharding.py maps it to a
mesh. Parameters are float32 and cast where they are used.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from internlm2_jax import sharding
from internlm2_jax.models.config import LoRA, ModelConfig
from internlm2_jax.models.quantise import Quantised, in_integers

Axes = tuple[str | None, ...]
Weights = tuple[Array | Quantised, Array | Quantised, Array | Quantised]


def parameter(value: Array, axes: Axes) -> nnx.Param:
    return nnx.Param(value, logical_axes=axes)


class Linear(nnx.Module):
    """Contracts the last axes of x with the first axes of `weight`, and adds `bias` when present.

    Args:
      shape: weight shape, inputs first.
      axes: logical name of each weight axis.
      inputs: how many leading axes of the weight are contracted.
      std: standard deviation of the initial weight; the initial bias is zero.
      lora: adds (x A) B, scaled; B is zero at first, A has the variance 1 / inputs.
    """

    def __init__(
        self,
        key: Array,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        std: float | Array,
        inputs: int = 1,
        bias: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        self.weight = parameter(std * jax.random.normal(key, shape, jnp.float32), axes)
        self.bias = parameter(jnp.zeros(shape[inputs:]), axes[inputs:]) if bias else None
        a = b = None
        if lora:
            drawn = jax.random.normal(jax.random.fold_in(key, 1), (*shape[:inputs], lora.rank))
            std = 1 / math.sqrt(math.prod(shape[:inputs]))
            a = parameter(std * drawn, (*axes[:inputs], None))
            b = parameter(jnp.zeros((lora.rank, *shape[inputs:])), (None, *axes[inputs:]))
        self.lora_a, self.lora_b = a, b
        self.lora_scale = lora.alpha / lora.rank if lora else 0.0
        self.axes = axes
        self.inputs = inputs

    def in_use(self, dtype: Any) -> Array | Quantised:
        """The weight as products take it: in their dtype, gathered; or one of few bits."""
        weight = self.weight[...]
        if isinstance(weight, Quantised):
            return weight
        return sharding.constrain(weight.astype(dtype), *self.axes)

    def __call__(
        self, x: Array, out_dtype: Any = None, weight: Array | Quantised | None = None
    ) -> Array:
        """x [B, T, *in] -> [B, T, *out], in x's dtype or in `out_dtype`.

        `weight`: what `in_use` gave, where one weight serves several calls.
        """
        to_residual = self.axes[self.inputs :] in (("embed",), ("residual",))
        length = "residual_length" if to_residual else "length"
        out_axes = ("batch", length, *self.axes[self.inputs :])
        weight = self.in_use(x.dtype) if weight is None else weight
        if isinstance(weight, Quantised) and in_integers(x):
            y = weight.product(x, out_dtype or x.dtype)
        else:
            if isinstance(weight, Quantised):
                weight = weight.weight(x.dtype)
            y = sharding.contract(x, weight, self.inputs, out_axes, out_dtype)
        if self.lora_a is not None and self.lora_b is not None:
            a = sharding.constrain(
                self.lora_a[...].astype(x.dtype), *self.axes[: self.inputs], None
            )
            b = sharding.constrain(
                self.lora_b[...].astype(x.dtype), None, *self.axes[self.inputs :]
            )
            low = sharding.contract(x, a, self.inputs, ("batch", "length", None))
            y = y + self.lora_scale * sharding.contract(low, b, 1, out_axes, out_dtype)
        if self.bias is not None:
            y = y + sharding.constrain(self.bias[...].astype(y.dtype), *self.axes[self.inputs :])
        return y


class RMSNorm(nnx.Module):
    """weight * x / rms(x): the statistic in float32, the weight applied after the down-cast."""

    def __init__(self, dim: int, eps: float) -> None:
        self.weight = parameter(jnp.ones(dim), ("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * (wide * scale).astype(x.dtype)


class Embedding(nnx.Module):
    """Token vectors; `attend` is the transposed product used when the head is tied to them."""

    def __init__(self, key: Array, vocab_size: int, dim: int, std: float) -> None:
        table = std * jax.random.normal(key, (vocab_size, dim), jnp.float32)
        self.weight = parameter(table, ("vocab", "embed"))

    def __call__(self, tokens: Array, dtype: Any) -> Float[Array, "B T D"]:
        return sharding.take_rows(self.weight[...].astype(dtype), tokens)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        table = sharding.constrain(self.weight[...].astype(x.dtype), "vocab", None)
        return sharding.contract(x, table.T, 1, ("batch", "length", "vocab"), jnp.float32)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x). In checkpoints gate, up, down are w1, w3, w2."""

    def __init__(self, cfg: ModelConfig, key: Array, down_std: float | Array) -> None:
        gate, up, down = jax.random.split(key, 3)
        inside, outside = (cfg.embed_dim, cfg.mlp_dim), (cfg.mlp_dim, cfg.embed_dim)
        std, axes = cfg.initializer_range, ("embed", "mlp")
        self.gate = Linear(gate, inside, axes, std=std, lora=cfg.adapter("gate"))
        self.up = Linear(up, inside, axes, std=std, lora=cfg.adapter("up"))
        self.down = Linear(
            down, outside, ("mlp_in", "residual"), std=down_std, lora=cfg.adapter("down")
        )

    def in_use(self, dtype: Any) -> Weights:
        """The three weights as products take them (see `Linear.in_use`)."""
        return self.gate.in_use(dtype), self.up.in_use(dtype), self.down.in_use(dtype)

    def __call__(
        self, x: Float[Array, "B T D"], weights: Weights | None = None
    ) -> Float[Array, "B T D"]:
        x = sharding.constrain(x, "batch", "length", None)
        of_gate, of_up, of_down = weights or self.in_use(x.dtype)
        gate = checkpoint_name(self.gate(x, weight=of_gate), "gate")
        up = checkpoint_name(self.up(x, weight=of_up), "up")
        return self.down(jax.nn.silu(gate) * up, weight=of_down)


def depth_std(std: float, layer: Array) -> Array:
    """Standard deviation of the residual writers of `layer` (from 0): std / sqrt(2 (layer + 1))."""
    return std / jnp.sqrt(2.0 * (layer + 1))
