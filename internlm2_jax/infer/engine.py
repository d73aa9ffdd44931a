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

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from internlm2_jax import sharding
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.infer import cache as kv
from internlm2_jax.infer import programs, sampling
from internlm2_jax.infer.programs import Batch, Drawn
from internlm2_jax.infer.sampling import Rows, Sampling
from internlm2_jax.infer.text import TextStream
from internlm2_jax.kernels.attention import platform
from internlm2_jax.models.build import Model, Params, unstacked
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.rope_scaling import DynamicNTK, LongRoPE

GREEDY = Sampling(temperature=0.0)
# Bytes of all layers above which a CPU's engine keeps them apart; smaller ones stay in its cache.
UNSTACKED = 2**26


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes that programs are compiled for, and how steps are cut.

    slots: requests that are decoded together.
    max_length: the most tokens of a request, prompt and response.
    page: tokens of a page; prompts share whole pages.
    pages: pages of the cache; default: every slot can be full. Fewer make requests wait.
    prefill: (rows, tokens) of the prefill programs; a step takes the one that wastes least.
    steps: the most tokens a decode call makes of a request before the host looks.
    steps_shared: the same while another request waits or is being read, so that it waits less.
    top_logprobs: how many of the likeliest tokens are reported with each one.
    stop_ids: the most stop ids of a request.
    cache: type of the keys and values, "auto" (of the model's products), "float32", "bfloat16" or
      "int8" (with a float32 scale per token and head).
    """

    slots: int = 8
    max_length: int = 2048
    page: int = kv.PAGE
    pages: int | None = None
    prefill: tuple[tuple[int, int], ...] = ((1, 32), (1, 256), (8, 32))
    steps: int = 16
    steps_shared: int = 4
    top_logprobs: int = 0
    stop_ids: int = 8
    cache: str = "auto"

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "page", "pages", "steps", "steps_shared"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"engine: {name} is {value}; it must be 1 or more")
        if not self.prefill or min(itertools.chain(*self.prefill)) < 1:
            raise UserError(f"engine: prefill is {self.prefill}; it lists (rows, tokens), not zero")

    @property
    def pages_per_request(self) -> int:
        return -(-self.max_length // self.page)

    @property
    def num_pages(self) -> int:
        return self.pages or self.slots * self.pages_per_request

    def cache_bytes(self, cfg: ModelConfig) -> int:
        """Bytes of the whole cache on all devices."""
        return self.num_pages * self.page * kv.bytes_per_token(cfg, self.cache)


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


class _Track:
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
        self._parts = sharding.size_of("data") * sharding.size_of("fsdp")
        for name, size in [
            ("slots", config.slots),
            ("pages", config.num_pages),
            *(("rows of prefill", rows) for rows, _ in config.prefill),
        ]:
            if size % self._parts:
                raise UserError(
                    f"engine: {size} {name} do not divide over {self._parts} parts of the mesh; "
                    f"use a multiple of {self._parts}"
                )
        self._pages = _empty_pages(model.cfg, config)
        self._pools = [kv.Pool(config.num_pages // self._parts) for _ in range(self._parts)]
        self._slots: list[_Track | None] = [None] * config.slots
        self._waiting: collections.deque[_Track] = collections.deque()
        self._numbers = itertools.count()
        self._tracks: dict[int, _Track] = {}
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
        return sum(pool.held for pool in self._pools)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._tracks) - len(self._waiting)

    def submit(self, request: Request) -> int:
        """Queues a request; gives its number. It joins the batch at a later step."""
        self._check(request)
        track = _Track(next(self._numbers), request, self.tokenizer)
        self._tracks[track.number] = track
        self._waiting.append(track)
        return track.number

    def response(self, number: int) -> Response:
        """What a request that has not ended has come to."""
        return self._track(number).response

    def cancel(self, number: int) -> Response:
        """Ends a request now and gives what it has come to; its pages are free at once."""
        track = self._track(number)
        self._leave(track)
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
        under_way = [track for track in self._slots if track]
        for track in sorted(under_way, key=lambda track: -track.number):
            self._leave(track)
            self._waiting.appendleft(track)
        for pool in self._pools:
            pool.forget()
        return self.version

    def _set(self, params: Params) -> None:
        self.params = params
        size = sum(x.nbytes for x in jax.tree.leaves(params["layers"]))
        apart = size >= UNSTACKED and platform(jax.tree.leaves(params)[0]) == "cpu"
        self._weights = unstacked(params) if apart else params

    # -------------------------------------------------------------------- steps

    def step(self) -> list[Event]:
        """Reads a chunk of prompts and makes a few tokens; tells what came of it."""
        self._admit()
        events = self._prefill() if any(t and t.goal for t in self._slots) else []
        if any(t and not t.goal for t in self._slots):
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

    # -------------------------------------------------------------------- admission

    def _admit(self) -> None:
        """Gives slots and pages to requests, first come first served.

        A request waits for the pages of another that is being read when its prompt begins so for
        at least half of its length.
        """
        coming = {n for t in self._slots if t and t.goal for n in t.names[t.published :]}
        late = []
        while self._waiting and None in self._slots:
            track = self._waiting.popleft()
            track.names = kv.names(track.ids, self.config.page, self._rotation(track))
            reading = track.names[: (len(track.ids) - 1) // self.config.page]
            ready = max(len(pool.find(reading)) for pool in self._pools)
            soon = sum(name in coming for name in reading[ready:])
            if soon and 2 * (ready + soon) * self.config.page >= len(track.ids):
                late.append(track)
            elif self._enter(track, reading):
                coming |= set(track.names[track.published :])
            else:
                self._waiting.appendleft(track)
                break
        self._waiting.extendleft(reversed(late))

    def _enter(self, track: _Track, reading: list[bytes]) -> bool:
        """Finds a slot whose part of the mesh has room, with the most pages that are ready."""
        needed = -(-track.length // self.config.page)
        per_part = self.config.slots // self._parts
        best: tuple[int, int, int] | None = None
        for part, pool in enumerate(self._pools):
            free = [s for s in self._of_part(part, per_part) if self._slots[s] is None]
            shared = pool.find(reading)
            if free and pool.fits(shared, needed - len(shared)):
                offer = (len(shared), pool.available, -free[0])
                best = offer if best is None else max(best, offer)
        if best is None:
            return False
        track.slot = -best[2]
        pool = self._pool(track)
        shared = pool.find(reading)
        track.pages = pool.take(shared, needed - len(shared))
        track.published = len(shared)
        track.used, track.goal = len(shared) * self.config.page, len(track.ids)
        self._slots[track.slot] = track
        return True

    def _leave(self, track: _Track) -> None:
        """Takes a request out of its slot, or out of the queue."""
        if track.slot < 0:
            self._waiting.remove(track)
            return
        self._pool(track).release(track.pages)
        self._slots[track.slot] = None
        track.slot, track.pages, track.used, track.goal = -1, [], 0, 0

    def _rotation(self, track: _Track) -> bytes:
        """What of a request's rotation its keys depend on."""
        scaling, cfg = self.model.cfg.rope_scaling, self.model.cfg
        if isinstance(scaling, DynamicNTK):
            return b"%d" % max(track.length, cfg.max_position_embeddings)
        if isinstance(scaling, LongRoPE):
            return b"%d" % (track.length > scaling.original_max_position_embeddings)
        return b""

    # -------------------------------------------------------------------- prefill

    def _prefill(self) -> list[Event]:
        reading = sorted((t for t in self._slots if t and t.goal), key=lambda track: track.number)
        useful, tight, choices = [], [], []
        for rows, width in self.config.prefill:
            chosen = self._rows_for(rows, reading)
            useful.append(sum(min(width, t.goal - t.used) for t in chosen if t))
            tight.append(useful[-1] / (rows * width))
            choices.append(((rows, width), chosen))
        # The most tokens, unless that wastes over twice the work that they could take.
        fair = [i for i in range(len(choices)) if 2 * tight[i] >= max(tight)]
        shape, chosen = choices[max(fair, key=lambda i: (useful[i], tight[i]))]
        drawn = self._run_prefill(shape, chosen)
        events = []
        for row, track in enumerate(chosen):
            if track is None:
                continue
            track.used += min(shape[1], track.goal - track.used)
            full = min(track.used // self.config.page, len(track.names))
            for i in range(track.published, full):
                self._pool(track).publish(track.pages[i], track.names[i])
            track.published = max(track.published, full)
            if track.used == track.goal:
                track.goal = 0
                events.append(self._take(track, drawn, row))
        return events

    def _rows_for(self, count: int, reading: list[_Track]) -> list[_Track | None]:
        """The first requests of each part of the mesh, in the rows of that part."""
        per_part = count // self._parts
        rows: list[_Track | None] = []
        for pool in self._pools:
            mine = [t for t in reading if self._pool(t) is pool][:per_part]
            rows += [*mine, *[None] * (per_part - len(mine))]
        return rows

    def _run_prefill(self, shape: tuple[int, int], chosen: list[_Track | None]) -> Drawn:
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
        rows = [t if t and not t.goal else None for t in self._slots]
        active = [t for t in rows if t]
        limit = self.config.steps
        if self._waiting or len(active) < self.running:
            limit = min(limit, self.config.steps_shared)
        if any(t.request.constraint for t in active):
            limit = 1  # a grammar must see a token before it can say what may follow
        drawn = self._run_decode(rows, limit)
        self.steps += (made := int(drawn.counts.max()))
        self.row_steps += made * self.config.slots
        self.decoded += int(drawn.counts.sum())
        return [self._take(track, drawn, row) for row, track in enumerate(rows) if track]

    def _run_decode(self, rows: list[_Track | None], limit: int) -> Drawn:
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
        )
        return sharding.fetch(drawn)

    def _take(self, track: _Track, drawn: Drawn, row: int) -> Event:
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
            self._leave(track)
            del self._tracks[track.number]
        return event

    # -------------------------------------------------------------------- arrays

    def _batch(self, rows: list[_Track | None]) -> Batch:
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

    def _rows(self, rows: list[_Track | None]) -> Rows:
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

    def _of_part(self, part: int, per_part: int) -> range:
        return range(part * per_part, (part + 1) * per_part)

    def _pool(self, track: _Track) -> kv.Pool:
        return self._pools[track.slot * self._parts // self.config.slots]

    def _track(self, number: int) -> _Track:
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
        needed, room = -(-total // config.page), config.num_pages // self._parts
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


def _empty_pages(cfg: ModelConfig, config: EngineConfig) -> Any:
    return jax.jit(kv.pages, static_argnums=(0, 1, 2, 3))(
        cfg, config.num_pages, config.page, config.cache
    )


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


MAX_PREFILL = 2**14  # tokens of a prefill call
MAX_STEPS = 64  # tokens of a decode call


def config_for(count: int, longest: int, max_new_tokens: int, batch_size: int = 64) -> EngineConfig:
    """Sizes for `count` prompts of up to `longest` tokens, rounded up so that few are compiled."""
    parts = sharding.size_of("data") * sharding.size_of("fsdp")
    slots = 1 << (min(count, batch_size) - 1).bit_length()
    slots = math.ceil(slots / parts) * parts
    width, new = kv.bucket(longest), kv.bucket(max_new_tokens)
    page = 32 if width + new <= 512 else 64
    return EngineConfig(
        slots=slots,
        max_length=width + new,
        page=page,
        prefill=tuple(dict.fromkeys([(slots, min(width, max(16, MAX_PREFILL // slots))),
                                     (parts, min(width, 512))])),
        steps=min(new, MAX_STEPS),
        steps_shared=min(new, 8),
    )  # fmt: skip


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
) -> Generation:
    """Continues every prompt; up to `batch_size` of them are in the engine at a time.

    Args:
      prompts: token ids; none may be empty.
      stop_ids: ids that end a response.
      pad_to: programs are compiled for the bucket that holds this many prompt tokens, default
        the longest prompt's; give one number for many calls and they share programs.
      rows: row index of each prompt, default 0, 1, ...; a prompt with the same seed and row index
        gets the same response in any batch.

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
