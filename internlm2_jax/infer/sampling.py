"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty, masks.

Every setting is an array with an entry a row, so requests of all kinds share one program; what no
row asks for is skipped when the program runs. The order is Hugging Face's: mask, repetition
penalty, temperature, top-k, top-p, min-p.

One uniform number a row and step is turned into a token by inverting the cumulative distribution,
where a Gumbel variate for every entry would take as many numbers as the vocabulary. A row's numbers
come from (seed, row index, step) and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax.errors import UserError

_BLOCK = 128
WORD = 32  # tokens of a mask's word


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    temperature: 0 is greedy, 1 the model's own distribution.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens whose probabilities, after the temperature, first add up to p.
    min_p: keep tokens at least min_p times as likely as the likeliest; 0 keeps all.
    repetition_penalty: logits of tokens that the prompt or the response has are divided by it where
      positive and multiplied where negative (CTRL, arXiv 1909.05858); 1 changes nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf")):
            raise UserError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or 1e-6 and more"
            )
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (keep all) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be over 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it must be from 0 (keep all) to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; it must be positive, 1 for none"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """Sampling of a batch: the fields of `Sampling`, the source of random numbers, and masks.

    seen: which tokens the repetition penalty speaks of.
    mask: bit t % 32 of word t // 32 is 1 where token t may be chosen.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    seed: Int[Array, " B"]
    row: Int[Array, " B"]
    seen: Bool[Array, "B V"]
    mask: Int[Array, "B V/32"]

    @classmethod
    def of(
        cls, samplings: list[Sampling], seeds: list[int], rows: list[int], seen: Any, mask: Any
    ) -> Rows:
        """Host arrays of a batch; `seen` and `mask` are taken as they are."""
        columns: dict[str, Any] = {
            name: np.asarray([getattr(s, name) for s in samplings], dtype)
            for name, dtype in _FIELDS.items()
        }
        for name, numbers in (("seed", seeds), ("row", rows)):
            columns[name] = np.asarray(numbers, np.int64).astype(np.uint32)
        return cls(**columns, seen=seen, mask=mask)


_FIELDS = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
}


def words(vocab: int) -> int:
    """Words of a mask over `vocab` tokens."""
    return -(-vocab // WORD)


def row_keys(seeds: Int[Array, " B"], rows: Int[Array, " B"]) -> Array:
    """One key a row, a function of its seed and its index only."""
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds, rows)


def uniforms(keys: Array, steps: Int[Array, " B"]) -> Float[Array, " B"]:
    """One number in [0, 1) for each row at its step."""
    return jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n)))(keys, steps)


def truncated(logits: Float[Array, "B V"], rows: Rows) -> Float[Array, "B V"]:
    """Logits of the distribution that each row is drawn from; -inf where a token is excluded.

    In a greedy row the temperature is left out.
    """

    def masked(x: Array) -> Array:
        bits = (rows.mask[:, :, None] >> jnp.arange(WORD)) & 1
        return jnp.where(bits.reshape(len(x), -1)[:, : x.shape[1]] == 1, x, -jnp.inf)

    def penalised(x: Array) -> Array:
        penalty = rows.repetition_penalty[:, None]
        return jnp.where(rows.seen, jnp.where(x > 0, x / penalty, x * penalty), x)

    def cut(x: Array) -> Array:
        return jnp.where(x >= _threshold(x, rows), x, -jnp.inf)

    x = _where_any((rows.mask != -1).any(), masked, logits)
    x = _where_any((rows.repetition_penalty != 1).any(), penalised, x)
    # Against the highest, so that the smallest temperature cannot overflow.
    x = x - x.max(axis=-1, keepdims=True)
    x = x / jnp.where(rows.temperature == 0, 1.0, rows.temperature)[:, None]
    some = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    return _where_any(some.any(), cut, x)


def choose(
    logits: Float[Array, "B V"], uniform: Float[Array, " B"], greedy: Bool[Array, " B"]
) -> Int[Array, " B"]:
    """Draws a token a row from the distribution of `logits`; the likeliest in a greedy row."""
    highest = logits.max(axis=-1, keepdims=True)
    drawn = _invert(jnp.exp(logits - highest), uniform)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


def _where_any(needed: Array, function: Callable[[Array], Array], x: Array) -> Array:
    return jax.lax.cond(needed, function, lambda x: x, x)


def _threshold(x: Float[Array, "B V"], rows: Rows) -> Float[Array, "B 1"]:
    """The smallest logit that top-k, top-p and min-p all keep."""
    vocab = x.shape[-1]
    ordered = -jnp.sort(-x, axis=-1)
    place = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab) - 1
    kth = jnp.take_along_axis(ordered, place[:, None], axis=-1)
    kept = jnp.where(ordered >= kth, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    inside = (before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
    nucleus = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    likely = ordered[:, :1] + jnp.log(rows.min_p)[:, None]
    return jnp.maximum(jnp.maximum(kth, nucleus), likely)


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
