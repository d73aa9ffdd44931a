"""The model under test: what texts it is shown as ids, likelihoods, and answers.

Every result is a function of its own row: batches are padded to a shape that follows from a row's
length alone, so an evaluation that was killed ends in the numbers of one that was not. On a mesh
every process ends with all results.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax import sharding
from internlm2_jax.data import chat as chatml
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.infer.cache import bucket
from internlm2_jax.infer.engine import Engine
from internlm2_jax.infer.requests import Request
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.infer.sizes import config_for
from internlm2_jax.infer.text import TextStream
from internlm2_jax.models.build import Model

SMALLEST = (
    64  # tokens of a row of likelihoods; longer ones are in buckets of 64 * 2**n and 96 * 2**n
)
BLOCK = 32  # positions whose logits exist at a time


Ids = Sequence[int] | np.ndarray


class Likely(NamedTuple):
    """A continuation's log-probability in nats, and whether greedy decoding would say it."""

    logprob: float
    greedy: bool


class Said(NamedTuple):
    """`finished`: by itself, not by the length."""

    text: str
    tokens: list[int]
    finished: bool


@functools.partial(jax.jit, static_argnums=(0, 5))
def _continued(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    start: Int[Array, " B"],
    length: Int[Array, " B"],
    width: int,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Summed log-probability of tokens[start:length] of each row, and whether all are greedy."""
    hidden = sharding.constrain(model.hidden(params, tokens, rope_length=length), *(None,) * 3)
    at = start[:, None] + jnp.arange(width)
    inside = at < length[:, None]
    at = jnp.minimum(at, tokens.shape[1] - 1)
    hidden = jnp.take_along_axis(hidden, at[..., None] - 1, axis=1)
    targets = jnp.take_along_axis(tokens, at, axis=1)

    def block(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = sharding.constrain(model.unembed(params, part[0]), *(None,) * 3)
        said = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
        return said - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == part[1]

    def cut(x: Array) -> Array:
        parts = x.reshape(x.shape[0], -1, min(width, BLOCK), *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    logprobs, greedy = jax.lax.map(block, (cut(hidden), cut(targets)))
    logprobs, greedy = (jnp.moveaxis(x, 0, 1).reshape(inside.shape) for x in (logprobs, greedy))
    return jnp.sum(jnp.where(inside, logprobs, 0.0), axis=1), jnp.all(greedy | ~inside, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _next(
    model: Model,
    params: Any,
    tokens: Int[Array, "B T"],
    length: Int[Array, " B"],
    candidates: Int[Array, "B C"],
) -> tuple[Float[Array, "B C"], Int[Array, " B"]]:
    """Log-probability of each candidate after each row, and the likeliest token of all."""
    hidden = model.hidden(params, tokens, rope_length=length + 1)
    hidden = sharding.constrain(hidden, *(None,) * 3)
    last = jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)
    logits = sharding.constrain(model.unembed(params, last), *(None,) * 3)[:, 0]
    said = jnp.take_along_axis(logits, candidates, axis=-1)
    return said - jax.nn.logsumexp(logits, axis=-1, keepdims=True), jnp.argmax(logits, axis=-1)


def left_of(max_length: int, room: int) -> int:
    """Tokens for a question beside an answer of `room`. Errors: UserError when there are none."""
    if max_length - room < 2:
        raise UserError(
            f"{room} tokens of an answer leave no room for a question in the model's "
            f"{max_length}; lower max_new_tokens"
        )
    return max_length - room


class Subject:
    """A language model with its tokenizer.

    max_length: the most tokens of a row; default: the model's positions.
    row_tokens: tokens of a batch of likelihoods. slots: the most requests decoded together; fewer
      where they are so long that their cache would hold more than `cache_tokens`.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        row_tokens: int = 2**13,
        slots: int = 32,
        cache_tokens: int = 2**17,
        weights: str = "auto",
    ) -> None:
        limit = model.cfg.length_limit
        self.max_length = max_length or limit or model.cfg.max_position_embeddings
        if limit is not None and self.max_length > limit:
            raise UserError(f"max_length {max_length} passes the model's {limit} positions")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self._row_tokens, self._weights = row_tokens, weights
        self._slots, self._cache_tokens = slots, cache_tokens

    # -------------------------------------------------------------------- ids
    def encode(self, text: str) -> list[int]:
        """Ids of a text that is to be gone on with."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def encode_chat(self, turns: Sequence[dict[str, Any]]) -> list[int]:
        return chatml.render(turns, self.tokenizer, add_generation_prompt=True).ids

    def cut(
        self, ids: list[int], room: int, side: Literal["left", "middle"]
    ) -> tuple[list[int], bool]:
        """At most max_length - room ids, the first kept; and whether some were left out."""
        most = left_of(self.max_length, room)
        if len(ids) <= most:
            return ids, False
        head = 1 if side == "left" else most // 2
        return [*ids[:head], *ids[len(ids) - (most - head) :]], True

    # -------------------------------------------------------------------- likelihood
    def likelihoods(
        self, asked: Sequence[tuple[Ids, Sequence[Sequence[int]]]]
    ) -> Iterator[tuple[int, list[Likely]]]:
        """For each (ids, continuations) its number and a Likely a continuation, as they come.

        Where all continuations are one token, their row is read once.
        """
        single = [i for i, (_, tails) in enumerate(asked) if all(len(t) == 1 for t in tails)]
        yield from self._singles(asked, single)
        chosen = set(single)
        rows = [
            (i, j)
            for i, (_, tails) in enumerate(asked)
            if i not in chosen
            for j in range(len(tails))
        ]
        waiting: dict[int, dict[int, Likely]] = {i: {} for i, _ in rows}

        def shape(row: tuple[int, int]) -> tuple[int, int]:
            head, tail = len(asked[row[0]][0]), len(asked[row[0]][1][row[1]])
            return self._width(head + tail), 1 << (tail - 1).bit_length()

        for batch, (width, span) in _batches(rows, shape, self._row_tokens):
            tokens = np.zeros((self._rows(width), width), np.int32)
            start, length = (np.ones(len(tokens), np.int32) for _ in range(2))
            for n, (i, j) in enumerate(batch):
                head, tail = asked[i][0], asked[i][1][j]
                start[n], length[n] = len(head), len(head) + len(tail)
                tokens[n, : start[n]], tokens[n, start[n] : length[n]] = head, tail
            found = _continued(self.model, self.params, tokens, start, length, span)
            logprobs, greedy = map(np.asarray, found)
            for n, (i, j) in enumerate(batch):
                waiting[i][j] = Likely(float(logprobs[n]), bool(greedy[n]))
                if len(waiting[i]) == len(asked[i][1]):
                    done = waiting.pop(i)
                    yield i, [done[j] for j in range(len(done))]

    def logprobs(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Log-probability of each continuation of each text, in nats."""
        encode = self.tokenizer.encode
        rows = [(self.encode(text), [encode(tail) for tail in tails]) for text, tails in asked]
        found = dict(self.likelihoods(rows))
        return [[likely.logprob for likely in found[i]] for i in range(len(rows))]

    def _singles(self, asked: Any, chosen: list[int]) -> Iterator[tuple[int, list[Likely]]]:
        def shape(i: int) -> tuple[int]:
            return (self._width(len(asked[i][0])),)

        for batch, (width,) in _batches(chosen, shape, self._row_tokens):
            most = max(len(asked[i][1]) for i in batch)
            tokens = np.zeros((self._rows(width), width), np.int32)
            length = np.ones(len(tokens), np.int32)
            candidates = np.zeros((len(tokens), max(8, most)), np.int32)
            for n, i in enumerate(batch):
                ids, tails = asked[i]
                tokens[n, : len(ids)], length[n] = ids, len(ids)
                candidates[n, : len(tails)] = [tail[0] for tail in tails]
            found = _next(self.model, self.params, tokens, length, candidates)
            logprobs, best = map(np.asarray, found)
            for n, i in enumerate(batch):
                said = [tail[0] for tail in asked[i][1]]
                likely = zip(logprobs[n].tolist(), said, strict=False)
                yield i, [Likely(logprob, bool(best[n] == token)) for logprob, token in likely]

    def _width(self, length: int) -> int:
        return min(bucket(length, SMALLEST), self.max_length)

    def _rows(self, width: int) -> int:
        return max(1, self._row_tokens // width)

    # -------------------------------------------------------------------- generation
    def answers(
        self,
        prompts: Sequence[Ids],
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling,
        seeds: Sequence[tuple[int, int]] | None = None,
        stop: Sequence[Sequence[str]] = (),
        sizes: tuple[int, int, int] | None = None,
    ) -> Iterator[tuple[int, Said]]:
        """Continues every prompt; gives each one's number and answer when it has ended.

        Args:
          seeds: (seed, row) of each prompt, which fix its random numbers; default (0, its number).
          stop: texts that end the answer of each prompt and are no part of it.
          sizes: (prompts, tokens of the longest, most new tokens) of a whole evaluation of which
            these are a part, so that the engine's programs are the same for any part.
        """
        if not prompts:
            return
        new = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        count, longest, most = sizes or (len(prompts), max(map(len, prompts)), max(new))
        slots = max(1, min(self._slots, self._cache_tokens // (longest + most)))
        config = config_for(count, longest, most, slots)
        config = dataclasses.replace(config, weights=self._weights)
        engine = Engine(self.model, self.params, config, self.tokenizer)
        ends = (self.tokenizer.eos_id, self.tokenizer.im_end_id)
        spoken: dict[int, tuple[int, list[int]]] = {}
        left = iter(range(len(prompts)))
        while True:
            for i in itertools.islice(left, max(0, 2 * slots - len(spoken))):
                seed, row = seeds[i] if seeds else (0, i)
                stops = tuple(stop[i]) if stop else ()
                request = Request(
                    list(map(int, prompts[i])), new[i], sampling, seed, row, ends, stops
                )
                spoken[engine.submit(request)] = (i, [])
            if not engine.busy:
                return
            for event in engine.step():
                i, tokens = spoken[event.request]
                tokens += event.tokens
                if event.finish_reason:
                    del spoken[event.request]
                    text = self._text(tokens, ends, tuple(stop[i]) if stop else ())
                    yield i, Said(text, tokens, event.finish_reason == "stop")

    def _text(self, tokens: Sequence[int], ends: tuple[int, ...], stops: tuple[str, ...]) -> str:
        stream = TextStream(self.tokenizer, stops)
        pieces = [stream.push(token) for token in tokens if token not in ends]
        return "".join([*pieces, stream.finish()])


def _batches(rows: Sequence[Any], shape: Any, budget: int) -> Iterator[tuple[list[Any], Any]]:
    """Rows in batches of one shape, which follows from each row alone; its first part is the width,
    and all batches of a width have the same number of rows."""
    by_shape: dict[Any, list[Any]] = {}
    for row in rows:
        by_shape.setdefault(shape(row), []).append(row)
    for key, members in sorted(by_shape.items()):
        step = max(1, budget // key[0])
        for at in range(0, len(members), step):
            yield members[at : at + step], key
