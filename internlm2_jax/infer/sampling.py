"""Choosing the next token: greedy, temperature, top-k, top-p.

One uniform number a row and step is turned into a token by inverting the cumulative distribution,
where a Gumbel variate for every entry would take as many numbers as the vocabulary. A row's numbers
come from (seed, row index, step) and nothing else.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from internlm2_jax.errors import UserError

_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    temperature: 0 is greedy, 1 the model's own distribution.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens whose probabilities, after the temperature, first add up to p.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (keep all) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be over 0 and at most 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def uniforms(keys: Array, step: Int[Array, ""]) -> Float[Array, " B"]:
    """One number in [0, 1) for each row key at this step."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(keys)


def row_keys(seed: Int[Array, ""], rows: Int[Array, " B"]) -> Array:
    """One key a row, a function of the seed and the row's index only."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows)


def choose(
    logits: Float[Array, "B V"],
    uniform: Float[Array, " B"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""] | None,
    top_k: int,
) -> Int[Array, " B"]:
    """Draws a token a row. `top_p` None and `top_k` 0 leave out the sorting that they need."""
    logits = logits / temperature
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if top_p is not None:
        logits = jnp.where(logits >= _nucleus_floor(logits, top_p), logits, -jnp.inf)
    return _invert(jnp.exp(logits - logits.max(axis=-1, keepdims=True)), uniform)


def _nucleus_floor(logits: Float[Array, "B V"], top_p: Array) -> Float[Array, "B 1"]:
    """Smallest logit in the shortest prefix, likeliest first, that holds probability top_p."""
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)


def _invert(weights: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """The token at which the cumulated weights pass uniform * total: first its block, then it."""
    batch, vocab = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(batch, -1, _BLOCK)
    sums = padded.sum(axis=-1)
    block, rest = _pass_point(sums, uniform * sums.sum(axis=-1))
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _pass_point(inside, rest)[0]


def _pass_point(
    weights: Float[Array, "B W"], target: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """First index whose cumulated weight exceeds `target`, and what of `target` it must cover.

    Rounding can leave no such index; then the last one of any weight is meant.
    """
    total = jnp.cumsum(weights, axis=-1)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    index = jnp.minimum((total <= target[:, None]).sum(axis=-1), last)
    before = jnp.take_along_axis(total - weights, index[:, None], axis=-1)[:, 0]
    return index, jnp.maximum(target - before, 0.0)
