"""LoRA: trains small factors beside frozen matrices (Hu et al., arXiv 2106.09685).

The factors live in `Linear` (layers.py), as leaves `lora_a` and `lora_b` of the parameters, so the
model runs the same with them; what is trained is the tree of these leaves alone. Merged, they are
gone: W + alpha / rank * A B is an ordinary matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.models.build import Model, Params, build
from internlm2_jax.models.config import LoRA, ModelConfig

LEAVES = ("lora_a", "lora_b")


def adapted(model: Model, lora: LoRA) -> Model:
    """The same model with adapters, which it must not have yet."""
    if model.cfg.lora:
        raise UserError("the model has LoRA adapters already; merge them first")
    return build(dataclasses.replace(model.cfg, lora=lora), model.head, model.attention)


def init(model: Model, key: jax.Array) -> Params:
    """Fresh adapters of a model that `adapted` made: they change nothing yet."""

    def make(key: jax.Array) -> Params:
        return split(model.init(key))[1]  # the rest is not computed: nothing reads it

    return sharding.create(make, split(model.axes)[1], key)


def split(tree: Params) -> tuple[Params, Params]:
    """(all but the adapters, the adapters) of a tree like the parameters."""
    rest: Params = {}
    adapters: Params = {}
    for name, part in tree.items():
        if name in LEAVES:
            adapters[name] = part
        elif isinstance(part, dict):
            inner, found = split(part)
            rest[name] = inner
            if found:
                adapters[name] = found
        else:
            rest[name] = part
    return rest, adapters


def join(rest: Params, adapters: Params) -> Params:
    """The inverse of `split`."""
    joined = dict(rest)
    for name, part in adapters.items():
        joined[name] = join(rest.get(name, {}), part) if isinstance(part, dict) else part
    return joined


def frozen(params: Params, cfg: ModelConfig) -> Params:
    """Parameters in the dtype of the products, as every use of them casts anyway: half the bytes.

    `merge` wants the ones in float32.
    """
    return jax.tree.map(lambda x: x.astype(cfg.dtype), params)


def loss_of_adapters(
    loss: Callable[[Params, Any], Any],
) -> Callable[[Params, Any], Any]:
    """`loss(params, rows)` as a function of the adapters and {"frozen": params, "rows": rows}."""
    return lambda adapters, batch: loss(join(batch["frozen"], adapters), batch["rows"])


def merge(params: Params, adapters: Params, lora: LoRA) -> Params:
    """Parameters with the adapters in the matrices; leaves without any are shared, not copied."""

    def walk(part: Params, found: Params) -> Params:
        if "lora_a" in found:
            return {
                **part,
                "weight": _merged(part["weight"], found["lora_a"], found["lora_b"], scale),
            }
        return {
            name: walk(value, found[name]) if name in found else value
            for name, value in part.items()
        }

    scale = lora.alpha / lora.rank
    return walk(params, adapters)


@jax.jit
def _merged(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """weight [L, *in, *out] + scale * a [L, *in, r] b [L, r, *out]."""
    inside, outside = "ij"[: a.ndim - 2], "op"[: b.ndim - 2]
    product = jnp.einsum(
        f"l{inside}r,lr{outside}->l{inside}{outside}", a, b, precision=jax.lax.Precision.HIGHEST
    )
    return weight + scale * product
