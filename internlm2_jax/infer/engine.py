"""The one engine of the project: chat, the server, evaluation and PPO rollouts all come here.

Requests join, finish and are cancelled at any step (continuous batching). A step is at most one
prefill call, in which waiting prompts advance by a chunk, and one decode call, a compiled loop of a
few one-token steps. Shapes are few and fixed by `EngineConfig`; everything else is an argument, so
nothing compiles after `warm_up`.

A request's tokens are a function of the weights, its prompt, its settings and its seed. The slot,
the batch-mates, how its prompt was cut into chunks and which of its pages were found ready change
nothing: a row's arithmetic is that of a program of fixed shape over its own row alone. Two programs
of different shapes may round differently where the platform's matrix product does, by an ulp or so.

Log-probabilities are those of the whole distribution at temperature 1, and equal a full forward
pass over prompt and response. A row is rotated for the longest it may become, len(prompt) +
max_new_tokens: pass that as `rope_length` to compare.

New weights replace the old ones in place. Requests in flight keep their tokens, each with the
version of the weights that drew it, and are read again under the new weights before they go on.

    engine = Engine(model, params, EngineConfig(slots=8, max_length=2048))
    number = engine.submit(Request(prompt, max_new_tokens=64, sampling=Sampling(0.8, top_p=0.9)))
    while engine.busy:
        for event in engine.step(): ...
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internlm2_jax import sharding
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.infer import cache as kv
from internlm2_jax.infer import programs, sampling
from internlm2_jax.infer.programs import Batch, Drawn
from internlm2_jax.infer.requests import GREEDY, Event, Request, Response, Track, check_prompt
from internlm2_jax.infer.sampling import Rows, Sampling
from internlm2_jax.infer.scheduler import Row, Scheduler
from internlm2_jax.infer.sizes import EngineConfig, config_for
from internlm2_jax.kernels.attention import platform
from internlm2_jax.models.build import Model, Params, unstacked
from internlm2_jax.models.quantise import quantise

# Bytes of all layers above which a CPU's engine keeps them apart; smaller ones stay in its cache.
UNSTACKED = 2**26


class Engine:
    """Continues requests with one model.

    Attributes:
      version: of the weights, raised by `update`.
      steps, decoded, row_steps: decode steps made, tokens they gave, and rows they computed.

    Raises:
      UserError: a request is empty, has ids outside the vocabulary, or can never fit.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.version = 0
        self._set(params)
        self._scheduler = Scheduler(model.cfg, config)
        self._pages = _empty_pages(model, config)
        self._numbers = itertools.count()
        self._tracks: dict[int, Track] = {}
        vocab = model.cfg.vocab_size
        rows = {config.slots, *(rows for rows, _ in config.prefill)}
        self._unseen = {n: jnp.zeros((n, vocab), bool) for n in rows}
        self._all = {n: jnp.full((n, sampling.words(vocab)), -1, jnp.int32) for n in rows}
        self.steps = self.decoded = self.row_steps = 0

    # -------------------------------------------------------------------- requests

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or under way."""
        return bool(self._tracks)

    @property
    def held_pages(self) -> int:
        """Pages that requests hold now."""
        return self._scheduler.held_pages

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        return len(self._tracks) - self.waiting

    def submit(self, request: Request) -> int:
        """Queues a request; gives its number. It joins the batch at a later step."""
        self._check(request)
        track = Track(next(self._numbers), request, self.tokenizer)
        self._tracks[track.number] = track
        self._scheduler.waiting.append(track)
        return track.number

    def response(self, number: int) -> Response:
        """What a request that has not ended has come to."""
        return self._track(number).response

    def cancel(self, number: int) -> Response:
        """Ends a request now and gives what it has come to; its pages are free at once."""
        track = self._track(number)
        self._scheduler.leave(track)
        track.response.finish_reason = "cancelled"
        del self._tracks[number]
        return track.response

    def update(self, params: Params) -> int:
        """Replaces the weights without compiling or allocating anything; gives their version.

        Requests under way go back to the head of the queue and are read again, response and all.
        """
        old, new = (
            jax.tree.map(lambda x: (x.shape, x.dtype, jax.typeof(x).sharding.spec), tree)
            for tree in (self.params, params)
        )
        if old != new:
            raise UserError(
                "new weights are not of the old ones' shapes, types and layout; "
                "make another engine for another model"
            )
        self._set(params)
        self.version += 1
        self._scheduler.begin_again()
        return self.version

    def _set(self, params: Params) -> None:
        self.params = params
        self._weights = for_generation(self.model, params, self.config.weights)

    # -------------------------------------------------------------------- steps

    def step(self) -> list[Event]:
        """Reads a chunk of prompts and makes a few tokens; tells what came of it."""
        self._scheduler.admit()
        events = self._prefill() if self._scheduler.reading else []
        if any(self._scheduler.decoding()):
            events += self._decode()
        return events

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """Continues all requests to their end, and any others that are under way."""
        numbers = [self.submit(request) for request in requests]
        tracks = [self._tracks[number] for number in numbers]
        while not all(track.response.finish_reason for track in tracks):
            self.step()
        return [track.response for track in tracks]

    def warm_up(self) -> int:
        """Compiles every program by running it on nothing; gives how many there are."""
        for shape in self.config.prefill:
            self._run_prefill(shape, [None] * shape[0])
        self._run_decode([None] * self.config.slots, 1)
        return len(self.config.prefill) + 1

    # -------------------------------------------------------------------- prefill

    def _prefill(self) -> list[Event]:
        shape, chosen = self._scheduler.choose_prefill()
        drawn = self._run_prefill(shape, chosen)
        events = []
        for row, track in enumerate(chosen):
            if track is None:
                continue
            track.used += min(shape[1], track.goal - track.used)
            self._scheduler.publish(track)
            if track.used == track.goal:
                track.goal = 0
                events.append(self._take(track, drawn, row))
        return events

    def _run_prefill(self, shape: tuple[int, int], chosen: list[Row]) -> Drawn:
        tokens, counts = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        for row, track in enumerate(chosen):
            if track:
                part = track.ids[track.used : min(track.goal, track.used + shape[1])]
                tokens[row, : len(part)], counts[row] = part, len(part)
        self._pages, drawn = programs.prefill(
            self.model,
            self.config.top_logprobs,
            self._weights,
            self._pages,
            self._batch(chosen),
            self._rows(chosen),
            tokens,
            counts,
        )
        return sharding.fetch(drawn)

    # -------------------------------------------------------------------- decode

    def _decode(self) -> list[Event]:
        rows = self._scheduler.decoding()
        active = [t for t in rows if t]
        limit, least = self.config.steps, 1
        if self.waiting:
            least = max(1, len(active) - self.config.slots // 16)
        if len(active) < self.running:
            limit = min(limit, self.config.steps_shared)
        if any(t.request.constraint for t in active):
            limit = 1  # a grammar must see a token before it can say what may follow
        drawn = self._run_decode(rows, limit, least)
        self.steps += (made := int(drawn.counts.max()))
        self.row_steps += made * self.config.slots
        self.decoded += int(drawn.counts.sum())
        return [self._take(track, drawn, row) for row, track in enumerate(rows) if track]

    def _run_decode(self, rows: list[Row], limit: int, least: int = 1) -> Drawn:
        slots = self.config.slots
        token, budget = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
        stops = np.full((slots, self.config.stop_ids), -1, np.int32)
        for slot, track in enumerate(rows):
            if track:
                token[slot], budget[slot] = track.ids[-1], track.left
                stops[slot, : len(track.request.stop_ids)] = track.request.stop_ids
        self._pages, drawn = programs.decode(
            self.model,
            self.config.steps,
            self.config.top_logprobs,
            self._weights,
            self._pages,
            self._batch(rows),
            self._rows(rows),
            token,
            budget,
            stops,
            np.int32(limit),
            np.int32(least),
        )
        return sharding.fetch(drawn)

    def _take(self, track: Track, drawn: Drawn, row: int) -> Event:
        """Adds a row's tokens to its request, up to what ends it."""
        event = Event(track.number, [], [], [], None)
        response, request = track.response, track.request
        for i in range(int(drawn.counts[row])):
            token, logprob = int(drawn.tokens[row, i]), float(drawn.logprobs[row, i])
            track.ids.append(token)
            response.tokens.append(token)
            response.logprobs.append(logprob)
            response.drawn_logprobs.append(float(drawn.drawn_logprobs[row, i]))
            response.versions.append(self.version)
            event.tokens.append(token)
            event.logprobs.append(logprob)
            ids, likely = drawn.top_ids[row, i].tolist(), drawn.top_logprobs[row, i].tolist()
            event.top.append(list(zip(ids, likely, strict=True)))
            if track.text:
                track.text.push(token)
            if request.constraint:
                request.constraint.accept(token)
            if token in request.stop_ids or (track.text and track.text.stopped):
                response.finish_reason = "stop"
            elif track.left == 0:
                response.finish_reason = "length"
            if response.finish_reason:
                break
        track.used = len(track.ids) - 1  # the last token is read when the next one is drawn
        if response.finish_reason:
            event.finish_reason = response.finish_reason
            self._scheduler.leave(track)
            del self._tracks[track.number]
        return event

    # -------------------------------------------------------------------- arrays

    def _batch(self, rows: list[Row]) -> Batch:
        table = np.zeros((len(rows), self.config.pages_per_request), np.int32)
        used, step = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
        length = np.ones(len(rows), np.int32)
        for row, track in enumerate(rows):
            if track:
                table[row, : len(track.pages)] = track.pages
                used[row], length[row] = track.used, track.length
                step[row] = len(track.response.tokens)
        columns: Any = (table, used, length, step)
        return Batch(*columns)

    def _rows(self, rows: list[Row]) -> Rows:
        asked = [t.request if t else None for t in rows]
        seen: Any = self._unseen[len(rows)]
        mask: Any = self._all[len(rows)]
        if any(r and r.sampling.repetition_penalty != 1 for r in asked):
            host = np.zeros(seen.shape, bool)
            for row, track in enumerate(rows):
                if track:
                    host[row, track.ids] = True
            seen = host
        if any(r and r.constraint for r in asked):
            host = np.full(mask.shape, -1, np.int32)
            for row, request in enumerate(asked):
                if request and request.constraint:
                    host[row] = request.constraint.mask()
            mask = host
        return Rows.of(
            [r.sampling if r else GREEDY for r in asked],
            [r.seed if r else 0 for r in asked],
            [r.row if r else 0 for r in asked],
            seen,
            mask,
        )

    # -------------------------------------------------------------------- helpers

    def _track(self, number: int) -> Track:
        if number not in self._tracks:
            raise UserError(f"request {number} is not under way: it has ended or never was")
        return self._tracks[number]

    def _check(self, request: Request) -> None:
        check_prompt(self.model.cfg, request.prompt, request.max_new_tokens)
        if request.response:
            check_prompt(self.model.cfg, request.response, request.max_new_tokens)
            counts = {len(x) for x in (request.logprobs, request.drawn_logprobs, request.versions)}
            if counts != {len(request.response)}:
                raise UserError(
                    f"a response of {len(request.response)} tokens comes with its logprobs, "
                    "drawn_logprobs and versions, one a token"
                )
            if len(request.response) >= request.max_new_tokens:
                raise UserError(
                    f"the response has {len(request.response)} tokens already; raise "
                    f"max_new_tokens {request.max_new_tokens} to go on with it"
                )
        config = self.config
        total = len(request.prompt) + request.max_new_tokens
        needed, room = -(-total // config.page), config.num_pages // self._scheduler.parts
        if total > config.max_length or needed > room:
            most = min(config.max_length, room * config.page)
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens with {request.max_new_tokens} new ones "
                f"can never fit: a request has at most {most} of this engine's "
                f"{config.num_pages * config.page} tokens of cache; shorten it, or raise "
                f"max_length or pages"
            )
        if len(request.stop_ids) > config.stop_ids:
            raise UserError(
                f"{len(request.stop_ids)} stop ids; the engine takes {config.stop_ids}: raise it"
            )
        if request.stop and self.tokenizer is None:
            raise UserError("stop strings need an engine with a tokenizer; use stop_ids")


def for_generation(model: Model, params: Params, kind: str) -> Params:
    """The weights as the programs take them.

    Of `kind`; where that is "auto", in the type of the products, in which a step casts them anyhow:
    on an accelerator, which decodes as fast as it reads, float32 would be read at half the speed.
    On a CPU large layers are kept apart (`unstacked`).

    Raises:
      UserError: there is no such kind, or it is not for a mesh of several devices.
    """
    on = platform(jax.tree.leaves(params)[0])
    if kind != "auto" and jax.sharding.get_abstract_mesh().size > 1:
        raise UserError(f"weights: {kind} is for one device; use auto on a mesh")
    params = quantise(params, kind)
    if kind == "auto" and on != "cpu":
        params = in_type(params, model.cfg.dtype)
    size = sum(x.nbytes for x in jax.tree.leaves(params["layers"]))
    return unstacked(params) if on == "cpu" and size >= UNSTACKED else params


@functools.partial(jax.jit, static_argnums=1)
def in_type(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _empty_pages(model: Model, config: EngineConfig) -> Any:
    return jax.jit(kv.pages, static_argnums=(0, 1, 2, 3))(
        model.cfg, config.num_pages, config.page, config.cache
    )


# ---------------------------------------------------------------- many prompts at once


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
    batch_size: int = 64,
    weights: str = "auto",
) -> Generation:
    """Continues every prompt; up to `batch_size` of them are in the engine at a time.

    Args:
      prompts: token ids; none may be empty.
      stop_ids: ids that end a response.
      pad_to: programs are compiled for the bucket that holds this many prompt tokens, default
        the longest prompt's; give one number for many calls and they share programs.
      rows: row index of each prompt, default 0, 1, ...; a prompt with the same seed and row index
        gets the same response in any batch.
      weights: see `EngineConfig`.

    Raises:
      UserError: a prompt is empty, has an id outside the vocabulary, or with its response is longer
        than the model's positions.
    """
    if not prompts:
        return Generation([], [], [])
    for i, prompt in enumerate(prompts):
        check_prompt(model.cfg, prompt, max_new_tokens, f"prompt {i}")
    longest = max(max(map(len, prompts)), pad_to or 0)
    config = config_for(len(prompts), longest, max_new_tokens, batch_size)
    config = dataclasses.replace(config, weights=weights)
    numbers = range(len(prompts)) if rows is None else rows
    engine = Engine(model, params, config)
    responses = engine.run(
        [
            Request(prompt, max_new_tokens, sampling, seed, row, tuple(stop_ids))
            for prompt, row in zip(prompts, numbers, strict=True)
        ]
    )
    return Generation(
        tokens=[r.tokens for r in responses],
        logprobs=[np.asarray(r.logprobs, np.float32) for r in responses],
        finished=[r.finish_reason == "stop" for r in responses],
    )
