"""Weights of a few bits for generation: int8, and int4 in groups, beside float32 scales.

A weight W [in, out] is kept as integers and the scale of each group of `group` inputs and each
output: W[i, o] is about values[i, o] * scales[i // group, o]. Groups lie along the last axis of the
inputs. What is quantised are the products of the blocks and the head (which stays int8: it draws
the tokens); norms and the embedding, of which a step reads a row, are as they were.

On a TPU or GPU the weight is formed where the product reads it, so that a step reads a quarter or
an eighth of float32's bytes, and activations are as they were. A CPU has no such product: there the
inputs are rounded to int8 too, one scale for each token and group, and integers are multiplied
(int32 sums, exact). That is the fastest of those measured (benchmarks/weights.py) and what
llama.cpp's Q8_0 does; its error is in docs/inference.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from internlm2_jax.errors import UserError
from internlm2_jax.kernels.attention import platform

KINDS = {"int8": 8, "int4": 4}
GROUP = {8: 128, 4: 64}  # the most inputs that share a scale; a choice
LEAST = 16  # fewer for a scale, and the scales weigh as much as the integers
PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("bits", "inputs", "shape"),
)
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A weight in integers, as G groups of g inputs.

    values: int8 [G, g, out]; of 4 bits, words [G, g/2, out/4]: byte j of a word is output 4 w + j,
      its low half input i of the group and its high half input i + g/2, both plus 8.
    scales: float32 [G, out].
    inputs: how many leading axes of the weight are contracted.
    shape: of the weight, inputs first, without the layer axis that the arrays may have in front.
    """

    values: Array
    scales: Float[Array, "*L G out"]
    bits: int
    inputs: int
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Quantised:
        """Itself, for `[...]`, as an array gives itself."""
        if index is not Ellipsis:
            raise TypeError("a quantised weight has no parts; use weight()")
        return self

    def weight(self, dtype: Any) -> Array:
        """What it stands for, in the shape of the weight it was made of."""
        outputs = self.scales.shape[1]
        values = _low_and_high(self.values, outputs) if self.bits == 4 else [self.values]
        whole = jnp.concatenate([x.astype(dtype) for x in values], axis=1)
        if self.bits == 4:
            whole = whole - 8
        return (whole * self.scales[:, None].astype(dtype)).reshape(self.shape)

    def product(self, x: Float[Array, "... in"], dtype: Any) -> Array:
        """x @ weight, x rounded to int8 for each row and group."""
        groups, outputs = self.scales.shape
        lead = x.shape[: x.ndim - self.inputs]
        rows = x.reshape(-1, groups, math.prod(self.shape[: self.inputs]) // groups)
        count = len(rows)
        if count == 1:
            # XLA:CPU has a fast product of integers for matrices only.
            rows = jnp.concatenate([rows, jnp.zeros_like(rows)])
        rows, scale = rounded(rows.astype(jnp.float32).swapaxes(0, 1), 127)  # [G, B, g], [G, B, 1]
        if self.bits == 4:
            low, high = _low_and_high(self.values, outputs)
            half = rows.shape[2] // 2
            sums = _integers(rows[..., :half], low) + _integers(rows[..., half:], high)
            sums = sums - 8 * rows.astype(jnp.int32).sum(axis=2, keepdims=True)
        else:
            sums = _integers(rows, self.values)
        y = (sums * (scale * self.scales[:, None])).sum(axis=0)[:count]
        return y.reshape(*lead, *self.shape[self.inputs :]).astype(dtype)


def rounded(x: Float[Array, "... g"], most: int) -> tuple[Int[Array, "... g"], Array]:
    """int8 numbers from -most to most and the scale [..., 1] of each vector."""
    scale = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), 1e-30) / most
    return jnp.round(x / scale).astype(jnp.int8), scale


def quantise(params: Any, kind: str, group: int | None = None) -> Any:
    """The parameters of a model with `Quantised` weights in their place; "auto" leaves them.

    Args:
      kind: "auto", "int8" or "int4".
      group: inputs that share a scale, or as many as there are; by default the most that divide the
        weight, up to `GROUP`.

    Raises:
      UserError: no such kind, or a weight does not divide into groups.
    """
    if kind == "auto":
        return params
    if kind not in KINDS:
        raise UserError(f"no weight type {kind!r}; there are auto, {', '.join(KINDS)}")
    bits = KINDS[kind]

    def of(path: tuple[Any, ...], x: Array) -> Any:
        names = [getattr(part, "key", None) for part in path]
        if names[-1] != "weight":
            return x
        if names[0] == "head":
            return _quantised(x, 8, 1, 0, group or _group(x.shape[0], 8), "head")
        if names[0] == "layers" and names[-2] in PRODUCTS:
            stacked = 1 if isinstance(params["layers"], dict) else 0
            inputs = 2 if names[-2] == "o" else 1
            chosen = group or _group(x.shape[stacked + inputs - 1], bits)
            return _quantised(x, bits, inputs, stacked, chosen, names[-2])
        return x

    return jax.tree_util.tree_map_with_path(of, params)


def _group(width: int, bits: int) -> int:
    """The most inputs, up to `GROUP`, that divide `width`; `GROUP` itself if only too few do."""
    step = 2 if bits == 4 else 1
    fitting = (g for g in range(GROUP[bits], 0, -1) if width % g == 0 and g % step == 0)
    found = next(fitting, 0)
    return found if found >= min(LEAST, width) else GROUP[bits]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantised(x: Array, bits: int, inputs: int, stacked: int, group: int, name: str) -> Quantised:
    shape = x.shape[stacked:]
    group = min(group, shape[inputs - 1])
    outputs = math.prod(shape[inputs:])
    if shape[inputs - 1] % group or (bits == 4 and (group % 2 or outputs % 4)):
        raise UserError(
            f"weights: {name} of {shape} does not divide into groups of {group} inputs"
            + (", halves of them and fours of outputs" if bits == 4 else "")
            + ("; use int8 or auto" if bits == 4 else "; use auto")
        )
    grouped = x.astype(jnp.float32).reshape(*x.shape[:stacked], -1, group, outputs)
    values, scales = rounded(grouped.swapaxes(-1, -2), 127 if bits == 8 else 7)
    values = values.swapaxes(-1, -2)
    if bits == 4:
        low, high = jnp.split((values + 8).astype(jnp.uint8), 2, axis=-2)
        nibbles = low | (high << 4)
        words = nibbles.reshape(*nibbles.shape[:-1], outputs // 4, 4)
        values = jax.lax.bitcast_convert_type(words, jnp.uint32)
    return Quantised(values, scales[..., 0], bits, inputs, shape)


def _low_and_high(words: Array, outputs: int) -> list[Array]:
    """int8 [G, g/2, out] twice, from 0 to 15."""
    parts = (words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F)
    return [
        jax.lax.bitcast_convert_type(x, jnp.int8).reshape(*words.shape[:2], outputs) for x in parts
    ]


def _integers(x: Int[Array, "G B g"], w: Int[Array, "G g out"]) -> Int[Array, "G B out"]:
    dims = (((2,), (1,)), ((0,), (0,)))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.int32)


def in_integers(x: Array) -> bool:
    """Whether products of these activations round them too (see above)."""
    return platform(x) == "cpu"
