"""Batches as a pure function of the step: mix, shuffle, repeat, batch.

`batches(step)` depends on the sources, weights, batch sizes and seed, never on what was read
before: to resume is to ask for the next step, and there is no iterator state to save. Nor does it
depend on how many processes read: each asks for its own rows of the same batch. Pre-training and
supervised fine-tuning use the same class; only the sources differ.

Rows of one source in a batch are built together, which is why grain does not mix and shuffle here:
its bookkeeping took more time per row than building the row (benchmarks/token_loading.py).
`Batches.dataset` gives the batches to who composes with grain.
"""

from __future__ import annotations

import bisect
import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from internlm2_jax.data.packing import PackedSource
from internlm2_jax.data.windows import Order, WindowedSource
from internlm2_jax.errors import UserError

# Shares as whole numbers, cut off: of so many parts, no source gets more than its share.
_PARTS = 2**40


class RowSource(Protocol):
    """Random access to rows, each a dict of arrays of the same shapes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class Batches:
    """`batches(step) -> {name: [B, ...]}`: a weighted mixture of shuffled, endless sources.

    Each source is gone through in a new order every epoch, each of its rows once; `weights` are
    the shares of the rows of a batch, of any sum, and are met as evenly as whole rows allow in any
    run of rows. A source of weight 0 is left out; with no weights, all have the same. Rows carry
    their source: `source` [B] int32 counts in `names`.

    `ramp` begins with other batch sizes: (steps, batch size) one after another, before
    `batch_size` for good. Not for several threads at once.
    """

    def __init__(
        self,
        sources: Mapping[str, RowSource],
        weights: Mapping[str, float] | None = None,
        *,
        batch_size: int,
        seed: int,
        ramp: Sequence[tuple[int, int]] = (),
    ):
        self.weights = _shares(sources, weights)
        self.names = list(self.weights)
        for steps, size in [*ramp, (1, batch_size)]:
            if size < 1 or steps < 1:
                raise UserError(f"batch_size is {size} for {steps} steps; both must be 1 or more")
        self._sizes = [*(size for _, size in ramp), batch_size]
        # Steps and rows before each size.
        self._steps = [0, *itertools.accumulate(steps for steps, _ in ramp)]
        self._rows = [0, *itertools.accumulate(steps * size for steps, size in ramp)]
        self._parts = [max(1, int(_PARTS * w)) for w in self.weights.values()]
        self._sources = [sources[name] for name in self.names]
        for name, source in zip(self.names, self._sources, strict=True):
            if not len(source):
                raise UserError(f"source {name!r} has no rows; give it text or leave it out")
        # By name, so that adding a source does not reorder the others.
        seeds = [(seed * 0x9E3779B1 + zlib.crc32(n.encode())) % 2**32 for n in self.names]
        self._orders = list(map(Order, self._sources, seeds))

    def size(self, step: int) -> int:
        """Rows in the batch of `step`."""
        return self._sizes[bisect.bisect_right(self._steps, step) - 1]

    def first_row(self, step: int) -> int:
        """How many rows the steps before `step` took."""
        at = bisect.bisect_right(self._steps, step) - 1
        return self._rows[at] + (step - self._steps[at]) * self._sizes[at]

    def __call__(self, step: int, part: slice = slice(None)) -> dict[str, np.ndarray]:
        """The batch of `step`, 0 being the first; or only its rows `part`."""
        first = self.first_row(step)
        chosen = [self._choose(first + i) for i in range(self.size(step))[part]]
        source = np.array([number for number, _ in chosen], np.int32)
        batch: dict[str, np.ndarray] = {}
        for number in dict.fromkeys(source.tolist()):
            here = np.flatnonzero(source == number)
            rows = [self._orders[number](chosen[i][1]) for i in here]
            for name, column in _take(self._sources[number], rows).items():
                if len(here) == len(chosen):
                    batch[name] = column
                    continue
                if name not in batch:
                    batch[name] = np.empty((len(chosen), *column.shape[1:]), column.dtype)
                batch[name][here] = column
        return {**batch, "source": source}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """All batches from step 0 on, without end."""
        return map(self, itertools.count())

    def dataset(self, steps: int) -> Any:
        """The batches of the first `steps` steps as a grain MapDataset."""
        import grain  # imports jax: some seconds

        return grain.MapDataset.range(steps).map(self)

    def _choose(self, row: int) -> tuple[int, int]:
        """(source, place in its order) of a row of the mixture.

        Of the rows before k, the first source has the share of them that is its own, rounded up;
        of those left the second its share of what is left, and so on. A row belongs to the source
        whose count it raises.
        """
        before, after, left = row, row + 1, sum(self._parts)
        for number, part in enumerate(self._parts):
            others_before, others_after = (k * (left - part) // left for k in (before, after))
            if after - others_after > before - others_before:
                return number, before - others_before
            before, after, left = others_before, others_after, left - part
        raise AssertionError("the last source takes what is left")


def _take(source: Any, rows: list[int]) -> dict[str, np.ndarray]:
    """Rows of a source together: {name: [rows, ...]}."""
    if isinstance(source, (PackedSource, WindowedSource)):
        return source.take(rows)
    found = [source[row] for row in rows]
    return {name: np.stack([row[name] for row in found]) for name in found[0]}


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
    source: PackedSource | WindowedSource, tokens: int, batch_size: int = 8
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
