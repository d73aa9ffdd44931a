"""Who is in the batch: the queue, the slots, and the pages of each part of the mesh.

Requests get slots in the order in which they came. One reserves all pages that it may need when it
gets its slot: from then on it finishes or is cancelled, and is never thrown out half done.
"""

from __future__ import annotations

import collections

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.infer import cache as kv
from internlm2_jax.infer.requests import Track
from internlm2_jax.infer.sizes import EngineConfig
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.rope_scaling import DynamicNTK, LongRoPE

Row = Track | None


class Scheduler:
    """Books of an engine's slots and pages.

    Attributes:
      parts: of the mesh that rows and pages are cut into.
      slots: the request in each slot of the decode program.
      waiting: requests without a slot, the next one first.

    Raises:
      UserError: sizes do not divide over the parts.
    """

    def __init__(self, cfg: ModelConfig, config: EngineConfig) -> None:
        self._cfg, self._config = cfg, config
        self.parts = sharding.size_of("data") * sharding.size_of("fsdp")
        for name, size in [
            ("slots", config.slots),
            ("pages", config.num_pages),
            *(("rows of prefill", rows) for rows, _ in config.prefill),
        ]:
            if size % self.parts:
                raise UserError(
                    f"engine: {size} {name} do not divide over {self.parts} parts of the mesh; "
                    f"use a multiple of {self.parts}"
                )
        self._pools = [kv.Pool(config.num_pages // self.parts) for _ in range(self.parts)]
        self.slots: list[Row] = [None] * config.slots
        self.waiting: collections.deque[Track] = collections.deque()

    @property
    def held_pages(self) -> int:
        return sum(pool.held for pool in self._pools)

    @property
    def reading(self) -> list[Track]:
        """Requests whose prompts are not read to the end, the oldest first."""
        return sorted((t for t in self.slots if t and t.goal), key=lambda track: track.number)

    def decoding(self) -> list[Row]:
        """The slots, without requests that are still read."""
        return [t if t and not t.goal else None for t in self.slots]

    def admit(self) -> None:
        """Gives slots and pages to requests, first come first served.

        A request waits for the pages of another that is being read when its prompt begins so for
        at least half of its length.
        """
        page = self._config.page
        coming = {n for t in self.slots if t and t.goal for n in t.names[t.published :]}
        late = []
        while self.waiting and None in self.slots:
            track = self.waiting.popleft()
            track.names = kv.names(track.ids, page, self._rotation(track))
            wanted = track.names[: (len(track.ids) - 1) // page]
            ready = max(len(pool.find(wanted)) for pool in self._pools)
            soon = sum(name in coming for name in wanted[ready:])
            if soon and 2 * (ready + soon) * page >= len(track.ids):
                late.append(track)
            elif self._enter(track, wanted):
                coming |= set(track.names[track.published :])
            else:
                self.waiting.appendleft(track)
                break
        self.waiting.extendleft(reversed(late))

    def _enter(self, track: Track, wanted: list[bytes]) -> bool:
        """Finds a slot whose part of the mesh has room, with the most pages that are ready."""
        needed = -(-track.length // self._config.page)
        per_part = self._config.slots // self.parts
        best: tuple[int, int, int] | None = None
        for part, pool in enumerate(self._pools):
            slots = range(part * per_part, (part + 1) * per_part)
            free = [s for s in slots if self.slots[s] is None]
            shared = pool.find(wanted)
            if free and pool.fits(shared, needed - len(shared)):
                offer = (len(shared), pool.available, -free[0])
                best = offer if best is None else max(best, offer)
        if best is None:
            return False
        track.slot = -best[2]
        pool = self._pool(track)
        shared = pool.find(wanted)
        track.pages = pool.take(shared, needed - len(shared))
        track.published = len(shared)
        track.used, track.goal = len(shared) * self._config.page, len(track.ids)
        self.slots[track.slot] = track
        return True

    def leave(self, track: Track) -> None:
        """Takes a request out of its slot, or out of the queue."""
        if track.slot < 0:
            self.waiting.remove(track)
            return
        self._pool(track).release(track.pages)
        self.slots[track.slot] = None
        track.slot, track.pages, track.used, track.goal = -1, [], 0, 0

    def begin_again(self) -> None:
        """Sends all requests back to the head of the queue: no page holds what it should."""
        under_way = [track for track in self.slots if track]
        for track in sorted(under_way, key=lambda track: -track.number):
            self.leave(track)
            self.waiting.appendleft(track)
        for pool in self._pools:
            pool.forget()

    def publish(self, track: Track) -> None:
        """Names the pages that a request's reading has filled, for others to share."""
        full = min(track.used // self._config.page, len(track.names))
        for i in range(track.published, full):
            self._pool(track).publish(track.pages[i], track.names[i])
        track.published = max(track.published, full)

    def choose_prefill(self) -> tuple[tuple[int, int], list[Row]]:
        """A shape of prefill (rows, tokens) and the request in each row of it.

        The most tokens, unless that wastes over twice the work that they could take.
        """
        reading = self.reading
        useful, tight, choices = [], [], []
        for rows, width in self._config.prefill:
            chosen = self._rows_for(rows, reading)
            useful.append(sum(min(width, t.goal - t.used) for t in chosen if t))
            tight.append(useful[-1] / (rows * width))
            choices.append(((rows, width), chosen))
        fair = [i for i in range(len(choices)) if 2 * tight[i] >= max(tight)]
        return choices[max(fair, key=lambda i: (useful[i], tight[i]))]

    def _rows_for(self, count: int, reading: list[Track]) -> list[Row]:
        """The first requests of each part of the mesh, in the rows of that part."""
        per_part = count // self.parts
        rows: list[Row] = []
        for pool in self._pools:
            mine = [t for t in reading if self._pool(t) is pool][:per_part]
            rows += [*mine, *[None] * (per_part - len(mine))]
        return rows

    def _rotation(self, track: Track) -> bytes:
        """What of a request's rotation its keys depend on."""
        scaling, cfg = self._cfg.rope_scaling, self._cfg
        if isinstance(scaling, DynamicNTK):
            return b"%d" % max(track.length, cfg.max_position_embeddings)
        if isinstance(scaling, LongRoPE):
            return b"%d" % (track.length > scaling.original_max_position_embeddings)
        return b""

    def _pool(self, track: Track) -> kv.Pool:
        return self._pools[track.slot * self.parts // self._config.slots]
