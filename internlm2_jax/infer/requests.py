"""What an engine is asked and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.infer.text import TextStream
from internlm2_jax.models.config import ModelConfig

GREEDY = Sampling(temperature=0.0)


class Constraint(Protocol):
    """What a grammar lets a response become (constrain.py)."""

    def mask(self) -> np.ndarray:
        """Which tokens may come next: int32 words, see `sampling.Rows.mask`."""
        ...

    def accept(self, token: int) -> None:
        """Goes on past `token`."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue, and how.

    prompt: token ids; not empty.
    max_new_tokens: the most that the response may have, `response` included.
    seed, row: fix the random numbers; samples of one prompt differ in `row`.
    stop_ids: ids that end the response; they are part of it.
    stop: texts that end the response; they are not part of its text. Needs the engine's tokenizer.
    response: the beginning of a response, to be gone on with, for instance under new weights.
    logprobs, drawn_logprobs, versions: of the tokens in `response`, handed on.
    constraint: a grammar, used by this request alone.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    row: int = 0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    response: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    drawn_logprobs: Sequence[float] = ()
    versions: Sequence[int] = ()
    constraint: Constraint | None = None


@dataclasses.dataclass
class Response:
    """What a request has come to.

    tokens: ids, a stop id included.
    logprobs: natural logarithms under the whole distribution at temperature 1.
    drawn_logprobs: the same under the distribution drawn from; 0 for a greedy choice.
    versions: which weights drew each token.
    finish_reason: None while it grows; "stop" (id or text), "length" or "cancelled".
    """

    tokens: list[int]
    logprobs: list[float]
    drawn_logprobs: list[float]
    versions: list[int]
    finish_reason: str | None = None


@dataclasses.dataclass
class Event:
    """News of a request: its new tokens and whether it has ended.

    top: for each token the likeliest (id, logprob) pairs, where the engine reports them.
    """

    request: int
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish_reason: str | None


class Track:
    """A request under way."""

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer | None) -> None:
        self.number, self.request = number, request
        self.ids = [*map(int, request.prompt), *map(int, request.response)]
        self.response = Response(
            list(map(int, request.response)),
            list(request.logprobs),
            list(request.drawn_logprobs),
            list(request.versions),
        )
        self.length = len(request.prompt) + request.max_new_tokens
        self.text: TextStream | None = None
        if tokenizer and request.stop:
            self.text = TextStream(tokenizer, request.stop)
            for token in self.response.tokens:
                self.text.push(token)
        self.slot = -1
        self.pages: list[int] = []
        self.names: list[bytes] = []
        self.published = 0
        self.used = 0  # tokens in the cache
        self.goal = 0  # tokens that are read before the next is drawn; 0 once it decodes

    @property
    def left(self) -> int:
        return self.request.max_new_tokens - len(self.response.tokens)


def check_prompt(
    cfg: ModelConfig, prompt: Sequence[int], max_new_tokens: int, name: str = ""
) -> None:
    """UserError unless the model can read these ids and that many new ones."""
    name = name or "prompt"
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if not len(prompt):
        raise UserError(f"{name} is empty; begin it with the bos id")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= cfg.vocab_size:
        bad = low if low < 0 else high
        raise UserError(
            f"{name} has id {bad}, outside the vocabulary of {cfg.vocab_size}; "
            "was it made with another tokenizer?"
        )
    total = len(prompt) + max_new_tokens
    if cfg.length_limit is not None and total > cfg.length_limit:
        raise UserError(
            f"{name} has {len(prompt)} tokens; with {max_new_tokens} new it passes the "
            f"model's {cfg.length_limit} positions; shorten it or ask for fewer"
        )
