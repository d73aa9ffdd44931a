"""Batches as a pure function of the step: mix, shuffle, repeat, batch, on grain.

`batches(step)` depends on the sources, weights, batch size and seed, never on what was read
before: to resume is to ask for the next step, and there is no iterator state to save. Pre-training
and supervised fine-tuning use the same class; only the sources differ.

Order costs 4 us a row, but grain's shuffle walks a space of 65,536 places, so a source of n rows
below some thousands costs about 25 ms / n a row: 0.3 ms at 90 rows, 3 ms at 7.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from internlm2_jax.data.packing import PackedSource
from internlm2_jax.errors import UserError

# grain turns weights into integers, the smallest into this many parts, cutting the rest off;
# whole parts given to it pass unchanged, so a share is right within half a part: 0.5%.
_PARTS_OF_THE_SMALLEST = 100


class RowSource(Protocol):
    """Random access to rows, each a dict of arrays of the same shapes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class Batches:
    """`batches(step) -> {name: [B, ...]}`: a weighted mixture of shuffled, endless sources.

    Each source is gone through in a new order every epoch, each of its rows once; `weights` are
    the shares of the rows of a batch, of any sum, and are met as evenly as whole rows allow in any
    run of rows. A source of weight 0 is left out; with no weights, all have the same.

    On a pod, process p of n passes `shard=(p, n)` and gets the p-th part [B/n, ...] of the batch;
    the parts joined are the batch that one process would see.
    """

    def __init__(
        self,
        sources: Mapping[str, RowSource],
        weights: Mapping[str, float] | None = None,
        *,
        batch_size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
    ):
        import grain  # imports jax: some seconds

        self.weights = _shares(sources, weights)
        self.batch_size = batch_size
        self._shard, self._num_shards = shard
        if batch_size < 1 or batch_size % self._num_shards:
            raise UserError(
                f"batch_size is {batch_size}; it must be a positive multiple of the "
                f"{self._num_shards} processes that share a batch"
            )
        smallest = min(self.weights.values())
        mixture = grain.MapDataset.mix(
            [self._endless(grain, name, sources[name], seed) for name in self.weights],
            weights=[round(_PARTS_OF_THE_SMALLEST * w / smallest) for w in self.weights.values()],
        )
        self._batches = mixture.batch(batch_size // self._num_shards)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of `step`, 0 being the first."""
        return self._batches[step * self._num_shards + self._shard]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """All batches from step 0 on, without end."""
        step = 0
        while True:
            yield self(step)
            step += 1

    @staticmethod
    def _endless(grain: Any, name: str, source: RowSource, seed: int) -> Any:
        if not len(source):
            raise UserError(f"source {name!r} has no rows; give it text or leave it out")
        # By name, so that adding a source does not reorder the others.
        own_seed = (seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**32
        return grain.MapDataset.source(source).seed(own_seed).shuffle().repeat()


def _shares(
    sources: Mapping[str, RowSource], weights: Mapping[str, float] | None
) -> dict[str, float]:
    """Share of each source that takes part, by name in order; they add up to 1."""
    weights = dict.fromkeys(sources, 1.0) if weights is None else weights
    if wrong := sorted(weights.keys() ^ sources.keys()):
        raise UserError(
            f"weights are for {', '.join(sorted(weights))} but the sources are "
            f"{', '.join(sorted(sources))}; {wrong[0]!r} is in only one of them"
        )
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"the weight of source {name!r} is {weight}; it must be 0 or more")
    total = sum(weights.values())
    if not total:
        raise UserError("no source has a weight above 0; give at least one")
    return {name: weights[name] / total for name in sorted(weights) if weights[name]}


def first_batches(
    source: PackedSource, tokens: int, batch_size: int = 8
) -> list[dict[str, np.ndarray]]:
    """The first rows of `source`, about `tokens` tokens, as batches [B, T] for validation.

    All have one shape: the last is filled up with empty rows, whose loss mask is 0.
    """
    wanted = max(1, min(len(source), tokens // source.row_length))
    rows = [source[i] for i in range(wanted)]
    empty = {name: np.zeros_like(array) for name, array in rows[0].items()}
    rows += [empty] * (-len(rows) % batch_size)
    return [
        {name: np.stack([row[name] for row in rows[i : i + batch_size]]) for name in empty}
        for i in range(0, len(rows), batch_size)
    ]
