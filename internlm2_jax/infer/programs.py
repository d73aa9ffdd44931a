"""What the engine compiles: one program a shape of prefill, and one loop of one-token steps.

Both read and write the same pages, which they take over from the caller (donation), and draw by
`sampling.Rows`. All lengths, limits, seeds and settings are arguments: only shapes compile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax import sharding
from internlm2_jax.infer import sampling
from internlm2_jax.infer.sampling import Rows
from internlm2_jax.models.attention import Pages
from internlm2_jax.models.build import Model, Params
from internlm2_jax.models.decoder import Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """Where the rows of a batch stand.

    table: the pages of each row, counted from the first of the row's part of the mesh.
    used: tokens in the cache.
    rope_length: tokens that the row is rotated for.
    step: tokens that the response has; fixes the random number of the next.
    """

    table: Int[Array, "B n"]
    used: Int[Array, " B"]
    rope_length: Int[Array, " B"]
    step: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Drawn:
    """Sampled tokens, `counts` of them in each row; the entries after those are 0.

    logprobs: under the whole distribution at temperature 1.
    drawn_logprobs: under the one they were drawn from, truncated and tempered; 0 when greedy.
    top_ids, top_logprobs: the likeliest tokens of the whole distribution.
    """

    tokens: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    drawn_logprobs: Float[Array, "B T"]
    top_ids: Int[Array, "B T top"]
    top_logprobs: Float[Array, "B T top"]
    counts: Int[Array, " B"]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def prefill(
    model: Model,
    top: int,
    params: Params,
    pages: Pages,
    batch: Batch,
    rows: Rows,
    tokens: Int[Array, "B T"],
    counts: Int[Array, " B"],
) -> tuple[Pages, Drawn]:
    """Reads the next counts[b] tokens of each row, and draws the one after them.

    What is drawn in the middle of a prompt means nothing.
    """
    batch, rows, counts = _place(batch), _place(rows), _place(counts)
    cache = Cache(pages, batch.table, batch.used, batch.rope_length)
    hidden, cache = model.extend(params, tokens, cache, counts)
    last = jnp.arange(tokens.shape[1]) == counts[:, None] - 1
    hidden = jnp.where(last[:, :, None], hidden, 0).sum(axis=1, keepdims=True)
    keys = sampling.row_keys(rows.seed, rows.row)
    drawn = _draw(model, top, params, hidden, rows, keys, batch.step)
    out = _nothing(tokens.shape[0], 1, top)
    return cache.pages, _record(out, jnp.int32(0), drawn, counts > 0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    model: Model,
    size: int,
    top: int,
    params: Params,
    pages: Pages,
    batch: Batch,
    rows: Rows,
    token: Int[Array, " B"],
    budget: Int[Array, " B"],
    stops: Int[Array, "B S"],
    limit: Int[Array, ""],
    least: Int[Array, ""],
) -> tuple[Pages, Drawn]:
    """Up to `limit` (at most `size`) tokens for every row; ends when fewer than `least` go on.

    Args:
      token: the last token of each row, not yet in the cache.
      budget: how many tokens the row may still get; 0 for a row that is not decoded.
      stops: ids after which a row stops; -1 where there is none.
    """
    batch, rows = _place(batch), _place(rows)
    token, budget, stops = (_place(x) for x in (token, budget, stops))
    keys = sampling.row_keys(rows.seed, rows.row)
    penalised = (rows.repetition_penalty != 1).any()

    State = tuple[Array, Array, Array, Array, Pages, Drawn]

    def running(state: State) -> Array:
        i, _, live, *_ = state
        return (i < limit) & (live.sum() >= least)

    def advance(state: State) -> State:
        i, token, live, seen, pages, out = state
        cache = Cache(pages, batch.table, batch.used + i, batch.rope_length)
        hidden, cache = model.extend(params, token[:, None], cache, live.astype(jnp.int32))
        now = dataclasses.replace(rows, seen=seen)
        drawn = _draw(model, top, params, hidden, now, keys, batch.step + i)
        new = drawn[0]

        def with_new(seen: Array) -> Array:
            return seen | (jnp.arange(seen.shape[1]) == new[:, None])

        seen = jax.lax.cond(penalised, with_new, lambda seen: seen, seen)
        out = _record(out, i, drawn, live)
        live &= ~(new[:, None] == stops).any(axis=1) & (i + 1 < budget)
        return i + 1, new, live, seen, cache.pages, out

    out = _nothing(token.shape[0], size, top)
    state = (jnp.int32(0), token, budget > 0, rows.seen, pages, out)
    *_, pages, out = jax.lax.while_loop(running, advance, state)
    return pages, out


def num_compiled() -> int:
    """How many programs there are; a steady state adds none."""
    return prefill._cache_size() + decode._cache_size()  # type: ignore[attr-defined]


def _draw(
    model: Model,
    top: int,
    params: Params,
    hidden: Float[Array, "B 1 D"],
    rows: Rows,
    keys: Array,
    step: Int[Array, " B"],
) -> tuple[Array, ...]:
    """Token, the two log-probabilities, and the likeliest tokens with theirs."""
    logits = sharding.constrain(model.unembed(params, hidden)[:, 0], "batch", None)
    cut = sampling.truncated(logits, rows)
    greedy = rows.temperature == 0
    token = sampling.choose(cut, sampling.uniforms(keys, step), greedy)
    total = jax.nn.logsumexp(logits, axis=-1)

    def of(x: Array) -> Array:
        return jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]

    drawn = jnp.where(greedy, 0.0, of(cut) - jax.nn.logsumexp(cut, axis=-1))
    if top:
        likeliest, ids = jax.lax.top_k(logits, top)
        return token, of(logits) - total, drawn, ids, likeliest - total[:, None]
    none = jnp.zeros((len(token), 0))
    return token, of(logits) - total, drawn, none.astype(jnp.int32), none


def _nothing(rows: int, size: int, top: int) -> Drawn:
    def zeros(*shape: int, dtype: Any = jnp.float32) -> Array:
        return _place(jnp.zeros(shape, dtype))

    return Drawn(
        tokens=zeros(rows, size, dtype=jnp.int32),
        logprobs=zeros(rows, size),
        drawn_logprobs=zeros(rows, size),
        top_ids=zeros(rows, size, top, dtype=jnp.int32),
        top_logprobs=zeros(rows, size, top),
        counts=zeros(rows, dtype=jnp.int32),
    )


def _record(
    out: Drawn, at: Int[Array, ""], drawn: tuple[Array, ...], live: Bool[Array, " B"]
) -> Drawn:
    def write(kept: Array, new: Array) -> Array:
        new = jnp.where(live.reshape(-1, *[1] * (new.ndim - 1)), new, 0).astype(kept.dtype)
        return jax.lax.dynamic_update_slice_in_dim(kept, new[:, None], at, axis=1)

    kept = (out.tokens, out.logprobs, out.drawn_logprobs, out.top_ids, out.top_logprobs)
    written: Any = [*map(write, kept, drawn), out.counts + live]
    return Drawn(*written)


def _place(tree: Any) -> Any:
    """Cuts the rows of every array over the mesh in use."""

    def cut(x: Any) -> Array:
        x = jnp.asarray(x)
        return sharding.constrain(x, "batch", *[None] * (x.ndim - 1))

    return jax.tree.map(cut, tree)
