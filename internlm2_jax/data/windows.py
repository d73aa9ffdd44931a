"""Packed rows of a corpus that does not fit into memory.

A source is cut into windows of whole records; each is packed by itself (`packing.pack_full`), and
how many rows it gives follows from the counts in the shards' indices: tokens - documents are its
transitions. So any row of a corpus of any size is found by one search, after reading one window,
and nothing is packed in advance. A long document stays within its window, since it stays within
its record.

An epoch takes the windows in a new order, a few at once, and the rows of those in a new order: so
many windows are in memory, and a batch still draws on places far apart. Which row comes when
depends on the seed and the place alone.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internlm2_jax import files
from internlm2_jax.data.manifest import TokenReader
from internlm2_jax.data.packing import (
    PackableSource,
    PackedSource,
    TokenDocuments,
    full_rows,
    pack_full,
)
from internlm2_jax.errors import UserError
from internlm2_jax.progress import Progress

WINDOW_TOKENS = 2**22
View = Callable[[PackableSource], PackableSource]


class WindowedSource:
    """Random access to the packed rows of a `TokenReader`, with bounded memory.

    `source[row]` is as in `PackedSource`. Not for several threads at once.

    Attributes: `first_row` [windows + 1] int64, the rows before each window.
    """

    def __init__(
        self,
        reader: TokenReader,
        row_length: int,
        *,
        window_tokens: int = WINDOW_TOKENS,
        kept: int = 16,
        view: View | None = None,
        counts: np.ndarray | None = None,
    ):
        """
        Args:
          window_tokens: about so many tokens are packed together.
          kept: how many windows stay in memory, each two or four bytes a token.
          view: changes the documents of a window before they are packed.
          counts: [records, 2], documents and tokens of each record as `view` leaves them, where it
            changes the number of their transitions.
        """
        if window_tokens < 1 or kept < 1:
            raise UserError(
                f"window_tokens is {window_tokens} and {kept} windows are kept; both must be 1 or "
                "more"
            )
        self.row_length, self.kept = row_length, kept
        self._reader, self._view = reader, view
        counts = np.diff(reader.before, axis=0) if counts is None else counts
        tokens_before = np.concatenate([[0], np.cumsum(counts[:, 1])])
        # Window of each record, by its last token.
        window = np.maximum(tokens_before[1:] - 1, 0) // window_tokens
        # First record of each window, and the number of records.
        starts = np.flatnonzero(np.diff(window, prepend=-1))
        self._records = np.append(starts, len(window))
        transitions = np.concatenate([[0], np.cumsum(counts[:, 1] - counts[:, 0])])
        self._transitions = np.diff(transitions[self._records])
        self.first_row = np.concatenate(
            [[0], np.cumsum(full_rows(self._transitions, row_length), dtype=np.int64)]
        )
        self._windows: collections.OrderedDict[int, PackedSource] = collections.OrderedDict()

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        row = range(len(self))[row]
        return {name: column[0] for name, column in self.take([row]).items()}

    def take(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Some rows together, {name: [rows, T]}."""
        rows = np.asarray(rows, np.int64)
        windows = np.searchsorted(self.first_row, rows, side="right") - 1
        found: dict[str, np.ndarray] = {}
        for window in np.unique(windows):
            here = np.flatnonzero(windows == window)
            part = self._window(int(window)).take(rows[here] - self.first_row[window])
            for name, column in part.items():
                if name not in found:
                    found[name] = np.empty((len(rows), *column.shape[1:]), column.dtype)
                found[name][here] = column
        return found

    def _window(self, number: int) -> PackedSource:
        if number in self._windows:
            self._windows.move_to_end(number)
            return self._windows[number]
        while len(self._windows) >= self.kept:
            self._windows.popitem(last=False)
        first, last = self._records[number : number + 2]
        parts = list(self._reader.records(int(first), int(last)))
        lengths, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
        if self._reader.vocab_size <= 2**16:
            tokens = tokens.astype(np.uint16)
        documents: PackableSource = TokenDocuments(tokens, lengths)
        if self._view is not None:
            documents = self._view(documents)
        packed = PackedSource(documents, self.row_length, pack_full)
        if packed.packing.length.sum() != self._transitions[number]:
            raise UserError(
                f"{self._reader.name}: records {first} to {last} do not hold the transitions that "
                "their index says (an empty document?); tokenize the corpus again"
            )
        self._windows[number] = packed
        return packed


class Order:
    """The rows of a source in the order of one epoch after another, without end.

    `order(place)` is the row at `place`, 0 being the first of all: every row once in each epoch.
    A `WindowedSource` is gone through `kept` windows at a time; any other source is one window.
    """

    def __init__(self, source: Any, seed: int):
        windowed = isinstance(source, WindowedSource)
        self._first = source.first_row if windowed else np.array([0, len(source)])
        self._kept = source.kept if windowed else 1
        self._rows, self._seed = len(source), seed
        # A batch may lie on both sides of a border.
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch_order)
        self._group = functools.lru_cache(maxsize=2)(self._group_order)

    def __call__(self, place: int) -> int:
        epoch, place = divmod(place, self._rows)
        before = self._epoch(epoch)[1]
        group = int(np.searchsorted(before[:: self._kept], place, side="right")) - 1
        return int(self._group(epoch, group)[place - before[group * self._kept]])

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows in the epoch's order, and the rows before each of them."""
        windows = np.random.default_rng([self._seed, epoch]).permutation(len(self._first) - 1)
        return windows, np.concatenate([[0], np.cumsum(np.diff(self._first)[windows])])

    def _group_order(self, epoch: int, group: int) -> np.ndarray:
        """Rows of the epoch's `group`-th few windows, in the epoch's order."""
        windows = self._epoch(epoch)[0][group * self._kept : (group + 1) * self._kept]
        rows = np.concatenate([np.arange(self._first[w], self._first[w + 1]) for w in windows])
        return np.random.default_rng([self._seed, epoch, group]).permutation(rows)


def count_long(reader: TokenReader, length: int, path: Path, *, writes: bool = True) -> np.ndarray:
    """[records, 2] int64: documents of at least `length` tokens, and their tokens, in each record.

    Reads the source once; the result is kept in the file `path`, by the process that `writes`.
    """
    if path.is_file():
        with contextlib.suppress(ValueError, EOFError):  # damaged: count again
            found = np.load(path)
            if found.shape == (len(reader.before) - 1, 2):
                return found
    rows = []
    records = len(reader.before) - 1
    with Progress(f"long documents of {reader.name}", records, "record") as progress:
        for lengths, _ in reader.records():
            long = lengths[lengths >= length]
            rows.append((len(long), int(long.sum())))
            progress.update()
    counts = np.array(rows, np.int64).reshape(-1, 2)
    if writes:
        with files.whole_file(path) as temporary, open(temporary, "wb") as handle:
            np.save(handle, counts)
    return counts
