"""The one sampling loop of the project: chat, evaluation and PPO rollouts all come here.

A batch is one compiled program: prefill of the right-aligned prompts, then a `while_loop` of
one-token steps that ends when every row has stopped. Shapes are rounded up to a few buckets, and
the length limit, temperature, top-p, seed and stop ids are arguments, so nothing is compiled twice
for them. A row is a function of (seed, its row index, its prompt): batch-mates, padding and the
bucket change nothing.

The log-probabilities are those of the whole distribution at temperature 1, whatever the sampling,
and equal a full forward pass over prompt and response. A row is rotated for the longest it may
become, len(prompt) + max_new_tokens: pass that as `rope_length` to compare.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.infer import cache as kv
from internlm2_jax.infer import sampling as draw
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import Model, Params
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.decoder import Cache


@dataclasses.dataclass
class Generation:
    """Responses, one entry a prompt, without the prompt.

    tokens: ids, the stop id included when it was sampled.
    logprobs: float32, one a token, under the whole distribution at temperature 1.
    finished: whether a stop id was sampled; False means the length limit was met.
    """

    tokens: list[list[int]]
    logprobs: list[np.ndarray]
    finished: list[bool]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Responses:
    """Padded arrays: what lies at or after `lengths` in a row is 0."""

    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    pad_to: int | None = None,
    rows: Sequence[int] | None = None,
) -> Generation:
    """Continues every prompt.

    Args:
      prompts: token ids; none may be empty.
      stop_ids: ids that end a response.
      pad_to: the program is compiled for the bucket that holds this many prompt tokens, default
        the longest prompt's; give one number for many batches and they share a program.
      rows: row index of each prompt, default 0, 1, ...; a prompt with the same seed and row index
        gets the same response in any batch.

    Raises:
      UserError: a prompt is empty, has an id outside the vocabulary, or with its response is longer
        than the model's positions.
    """
    if not prompts:
        return Generation([], [], [])
    _check(model.cfg, prompts, max_new_tokens)
    longest = max(map(len, prompts))
    width = kv.bucket(max(longest, pad_to or 0))
    count = len(prompts)
    batch = 1 << (count - 1).bit_length()
    tokens = np.zeros((batch, width), np.int32)
    lengths = np.zeros(batch, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = prompt
        lengths[i] = len(prompt)
    index = np.zeros(batch, np.int32)
    index[:count] = np.arange(count) if rows is None else rows
    out = generate_arrays(
        model,
        params,
        tokens,
        lengths,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
        rows=index,
    )
    ids, logprobs, ends, finished = sharding.fetch(
        (out.tokens, out.logprobs, out.lengths, out.finished)
    )
    return Generation(
        tokens=[ids[i, : ends[i]].tolist() for i in range(count)],
        logprobs=[logprobs[i, : ends[i]] for i in range(count)],
        finished=finished[:count].tolist(),
    )


def generate_arrays(
    model: Model,
    params: Params,
    tokens: Int[Array | np.ndarray, "B P"],
    lengths: Int[Array | np.ndarray, " B"],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | Int[Array, ""] = 0,
    stop_ids: Sequence[int] = (),
    rows: Int[Array | np.ndarray, " B"] | None = None,
) -> Responses:
    """The padded form of `generate`, on the device, shapes as given.

    Args:
      tokens: prompts aligned at the right: row b is tokens[b, P - lengths[b]:].
      lengths: a row of length 0 is padding of the batch and gets no response.
      rows: [B] row indices for the random numbers, default 0..B-1.

    Returns:
      Responses with M = max_new_tokens columns.
    """
    if rows is None:
        rows = np.arange(len(lengths), dtype=np.int32)
    size = kv.bucket(max_new_tokens)
    stops = np.full(kv.bucket(len(stop_ids), smallest=4), -1, np.int32)
    stops[: len(stop_ids)] = list(stop_ids)
    out = _generate(
        model,
        size,
        "greedy" if sampling.greedy else "nucleus" if sampling.top_p < 1 else "all",
        sampling.top_k,
        params,
        tokens,  # numpy stays numpy: every process of a mesh gives the same
        lengths,
        np.int32(max_new_tokens),
        np.float32(sampling.temperature),
        np.float32(sampling.top_p),
        jnp.asarray(seed, jnp.uint32) if isinstance(seed, jax.Array) else np.uint32(seed),
        rows,
        stops,
    )
    return Responses(
        out.tokens[:, :max_new_tokens], out.logprobs[:, :max_new_tokens], out.lengths, out.finished
    )


def num_compiled() -> int:
    """How many programs the engine holds; a steady state adds none."""
    return _generate._cache_size()  # type: ignore[attr-defined]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: Model,
    size: int,
    kind: str,
    top_k: int,
    params: Params,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    limit: Int[Array, ""],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    seed: Int[Array, ""],
    rows: Int[Array, " B"],
    stops: Int[Array, " stops"],
) -> Responses:
    batch, width = tokens.shape
    tokens = sharding.constrain(tokens, "batch", None)
    lengths, rows = (sharding.constrain(x, "batch") for x in (lengths, rows))
    keys = draw.row_keys(seed, rows)

    def pick(hidden: Array, step: Array) -> tuple[Array, Array]:
        """Token and log-probability of every row from its hidden state [B, 1, D]."""
        logits = model.unembed(params, hidden)[:, 0]
        logits = sharding.constrain(logits, "batch", None)
        if kind == "greedy":
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            nucleus = top_p if kind == "nucleus" else None
            uniform = draw.uniforms(keys, step)
            token = draw.choose(logits, uniform, temperature, nucleus, top_k).astype(jnp.int32)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return token, chosen - jax.nn.logsumexp(logits, axis=-1)

    def record(out: Responses, step: Array, token: Array, logprob: Array) -> Responses:
        live = (out.lengths == step) & ~out.finished & (step < limit) & (lengths > 0)
        at = (0, step)
        write = jax.lax.dynamic_update_slice
        return Responses(
            tokens=write(out.tokens, jnp.where(live, token, 0)[:, None], at),
            logprobs=write(out.logprobs, jnp.where(live, logprob, 0.0)[:, None], at),
            lengths=out.lengths + live,
            finished=out.finished | (live & (token[:, None] == stops).any(axis=1)),
        )

    # ---- prefill
    columns = jnp.arange(width) - (width - lengths[:, None])
    positions = jnp.where(columns >= 0, columns, -1)
    cache = kv.empty(model.cfg, width + size, lengths + limit)
    hidden, cache = model.extend(params, tokens, cache, positions=positions)
    token, logprob = pick(hidden[:, -1:], jnp.int32(0))
    out = Responses(
        tokens=sharding.constrain(jnp.zeros((batch, size), jnp.int32), "batch", None),
        logprobs=sharding.constrain(jnp.zeros((batch, size), jnp.float32), "batch", None),
        lengths=sharding.constrain(jnp.zeros(batch, jnp.int32), "batch"),
        finished=sharding.constrain(jnp.zeros(batch, bool), "batch"),
    )
    out = record(out, jnp.int32(0), token, logprob)

    # ---- one token a step, until every row has stopped
    State = tuple[Array, Array, Cache, Responses]

    def running(state: State) -> Array:
        step, _, _, out = state
        return (step < limit) & ~jnp.all(out.finished | (lengths == 0))

    def advance(state: State) -> State:
        step, token, cache, out = state
        at = (lengths + step - 1)[:, None]
        hidden, cache = model.extend(params, token[:, None], cache, positions=at)
        token, logprob = pick(hidden, step)
        return step + 1, token, cache, record(out, step, token, logprob)

    return jax.lax.while_loop(running, advance, (jnp.int32(1), token, cache, out))[3]


def _check(cfg: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} is empty; begin it with the bos id")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= cfg.vocab_size:
            bad = low if low < 0 else high
            raise UserError(
                f"prompt {i} has id {bad}, outside the vocabulary of {cfg.vocab_size}; "
                "was it made with another tokenizer?"
            )
        total = len(prompt) + max_new_tokens
        if cfg.length_limit is not None and total > cfg.length_limit:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new it passes the "
                f"model's {cfg.length_limit} positions; shorten it or ask for fewer"
            )
