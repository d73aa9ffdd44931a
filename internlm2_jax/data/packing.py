"""Whole rows out of documents of any length: best-fit packing, each transition predicted once.

Language modelling predicts transitions: position t of a row holds a token and, as its target, the
token after it. A document of n tokens has n - 1 of them. One that is longer than a row is cut and
the rest reused (InternLM2 report, section 3.3: overlong documents); the cut falls between two
transitions, so the last target of one piece is the first token of the next. Nothing is predicted
twice and nothing is skipped.

Pieces go, longest first, into the fullest row that still has room (best-fit decreasing; "Fewer
Truncations Improve Language Modeling", arXiv 2404.10830): rows are nearly full and a document is
cut only when it cannot fit any row. A row keeps `segment_ids`, so its pieces do not see each other.

`pack` opens rows as it needs them. `pack_full` makes as few rows as the transitions can fill and
cuts the few pieces that find no room: the number of rows then follows from sums alone, which is how
rows of a corpus that nobody has read yet are counted (data/windows.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from internlm2_jax.errors import UserError


class Piece(NamedTuple):
    """`length` transitions of document `doc` from its token `start`: inputs
    doc[start : start + length], targets doc[start + 1 : start + length + 1]."""

    doc: int
    start: int
    length: int


class Packing:
    """Rows of pieces: behaves as a `list[list[Piece]]`, kept in arrays.

    `doc`, `start`, `length` [pieces] int64, row by row; row r has the pieces
    `ends[r - 1] : ends[r]`.
    """

    def __init__(self, doc: np.ndarray, start: np.ndarray, length: np.ndarray, ends: np.ndarray):
        self.doc, self.start, self.length, self.ends = doc, start, length, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> list[Piece]:
        at = self.pieces(row)
        columns = (self.doc[at], self.start[at], self.length[at])
        return list(map(Piece._make, zip(*(c.tolist() for c in columns), strict=True)))

    def __iter__(self) -> Iterator[list[Piece]]:
        return (self[row] for row in range(len(self)))

    def pieces(self, row: int) -> slice:
        """Where row `row` lies in the arrays."""
        row = range(len(self))[row]
        return slice(self.ends[row - 1] if row else 0, self.ends[row])


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> Packing:
    """Packs documents of `lengths` tokens into rows of `capacity` transitions.

    Deterministic. A sort, then per piece one search for the least sufficient room in an integer
    of `capacity` bits: O(n log n) with a constant of about a microsecond.
    """
    if capacity < 1:
        raise UserError(f"row_length is {capacity}; it must be at least 1")
    doc, start, length = cut(np.asarray(lengths, np.int64), capacity)
    return _by_row(best_fit(length, capacity, len(length)), doc, start, length)


def full_rows(transitions: Any, capacity: int) -> Any:
    """How many rows `pack_full` makes of so many transitions; numbers or arrays."""
    return -(-transitions // capacity)


def pack_full(lengths: Sequence[int] | np.ndarray, capacity: int) -> Packing:
    """As `pack`, but into `full_rows(transitions, capacity)` rows: less than a row is left empty.

    When best fit finds no row with room for a piece, and no row may be opened, the piece is cut
    and fills the largest holes.
    """
    if capacity < 1:
        raise UserError(f"row_length is {capacity}; it must be at least 1")
    doc, start, length = cut(np.asarray(lengths, np.int64), capacity)
    rows = int(full_rows(int(length.sum()), capacity))
    row = best_fit(length, capacity, rows)
    homeless = np.flatnonzero(row < 0)
    if len(homeless):
        placed = row >= 0
        used = np.bincount(row[placed], length[placed], rows).astype(np.int64)
        holes = np.argsort(used, kind="stable")
        # Both are laid end to end; a cut falls wherever a piece or a hole ends.
        piece_ends = np.cumsum(length[homeless])
        hole_ends = np.cumsum(capacity - used[holes])
        ends = np.union1d(piece_ends, hole_ends[hole_ends < piece_ends[-1]])
        starts = np.concatenate([[0], ends[:-1]])
        nth = np.searchsorted(piece_ends, starts, side="right")
        piece, offset = homeless[nth], starts - (piece_ends - length[homeless])[nth]
        hole = holes[np.searchsorted(hole_ends, starts, side="right")]
        row = np.concatenate([row[placed], hole])
        doc = np.concatenate([doc[placed], doc[piece]])
        start = np.concatenate([start[placed], start[piece] + offset])
        length = np.concatenate([length[placed], ends - starts])
    return _by_row(row, doc, start, length)


def _by_row(row: np.ndarray, doc: np.ndarray, start: np.ndarray, length: np.ndarray) -> Packing:
    by_row = np.argsort(row, kind="stable")
    ends = np.cumsum(np.bincount(row)) if len(row) else np.zeros(0, np.int64)
    return Packing(doc[by_row], start[by_row], length[by_row], ends)


def cut(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(doc, start, length) of pieces of at most `capacity` transitions, in document order."""
    transitions = np.maximum(lengths - 1, 0)
    pieces = -(-transitions // capacity)
    doc = np.repeat(np.arange(len(lengths)), pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = (np.arange(len(doc)) - first) * capacity
    return doc, start, np.minimum(capacity, transitions[doc] - start)


def best_fit(length: np.ndarray, capacity: int, most: int) -> np.ndarray:
    """The row of each piece, longest first; -1 where all `most` rows are open and none has room.

    `rows_with[r]` lists the rows with room for r more, and bit r of `rooms` says that it is not
    empty, so the least room that is enough is the lowest bit of `rooms >> length`.
    """
    order = np.argsort(-length, kind="stable")
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    rows = 0
    chosen = []
    for size in length[order].tolist():
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        elif rows < most:
            room, row = capacity, rows
            rows += 1
        else:
            chosen.append(-1)
            continue
        chosen.append(row)
        if left := room - size:
            rows_with[left].append(row)
            rooms |= 1 << left
    found = np.empty(len(order), np.int64)
    found[order] = chosen
    return found


class PackableSource(Protocol):
    """What `PackedSource` needs; `manifest.TokenSource` is one."""

    tokens: np.ndarray  # [all tokens], the documents end to end
    lengths: np.ndarray  # [documents]


@dataclasses.dataclass
class TokenDocuments:
    """Documents end to end: tokens [all], lengths [documents]."""

    tokens: np.ndarray
    lengths: np.ndarray


class PackedSource:
    """Random access to packed rows: `source[row] -> {name: [T]}`, T = `row_length`.

    Each row has int32 `tokens`, `targets` (the next token), `segment_ids` (1, 2, ... per piece; 0
    is padding), `positions` (from 0 in each piece) and float32 `loss_mask` (1 where the target
    counts). Building a row is a few vectorised gathers, whatever it holds.
    """

    def __init__(
        self,
        source: PackableSource,
        row_length: int,
        packer: Callable[[np.ndarray, int], Packing] = pack,
    ):
        self._pack(source.tokens, source.lengths, None, row_length, packer)

    def _pack(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        mask: np.ndarray | None,
        row_length: int,
        packer: Callable[[np.ndarray, int], Packing] = pack,
    ) -> None:
        lengths = np.asarray(lengths, np.int64)
        self.row_length = row_length
        self.packing = packer(lengths, row_length)
        self._tokens, self._mask = tokens, mask
        # Where each piece starts among all tokens.
        self._from = (np.cumsum(lengths) - lengths)[self.packing.doc] + self.packing.start

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def fill_rate(self) -> float:
        """The share of all positions that hold a transition, 0 to 1."""
        return int(self.packing.length.sum()) / max(1, len(self) * self.row_length)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        row = range(len(self))[row]
        return {name: column[0] for name, column in self.take([row]).items()}

    def take(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Some rows together, {name: [rows, T]}: a few gathers, however many there are."""
        rows, row_ends = np.asarray(rows, np.int64), self.packing.ends
        first_pieces = np.where(rows > 0, row_ends[rows - 1], 0)
        counts = row_ends[rows] - first_pieces
        pieces = _ranges(first_pieces, counts)
        lengths = self.packing.length[pieces]
        ends = np.cumsum(lengths)  # of the pieces, in the transitions of these rows end to end
        before = ends - lengths
        first_of_row = np.cumsum(counts) - counts
        row_before = before[first_of_row]
        segments = np.arange(1, len(pieces) + 1) - np.repeat(first_of_row, counts)
        starts, total = self._from[pieces], int(lengths.sum())
        order = np.arange(total)
        at = order + np.repeat(starts - before, lengths)
        tokens = self._tokens[at].astype(np.int32)
        targets = np.empty_like(tokens)
        targets[:-1] = tokens[1:]  # the next token, but for the last of a piece
        targets[ends - 1] = self._tokens[starts + lengths]
        columns = {
            "tokens": tokens,
            "targets": targets,
            "segment_ids": np.repeat(segments.astype(np.int32), lengths),
            "positions": (order - np.repeat(before, lengths)).astype(np.int32),
            "loss_mask": np.ones(total, np.float32)
            if self._mask is None
            else self._mask[at + 1].astype(np.float32),
        }
        shape = (len(rows), self.row_length)
        if total < shape[0] * shape[1]:  # some row has padding at its end
            place = order + np.repeat(np.arange(len(rows)) * self.row_length - row_before,
                                      np.diff(row_before, append=total))  # fmt: skip
            for name, column in columns.items():
                padded = np.zeros(shape[0] * shape[1], column.dtype)
                padded[place] = column
                columns[name] = padded
        return {name: column.reshape(shape) for name, column in columns.items()}


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[starts[0], starts[0] + 1, ...] with counts[0] numbers, then of starts[1], and so on."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


class ExampleSource(PackedSource):
    """Packed rows of whole examples: conversations for supervised fine-tuning.

    Each example is (ids, loss_mask): `loss_mask[i]` says that predicting ids[i] counts. No example
    is ever cut in two. One with more than `row_length` transitions is dropped, or, with
    `too_long="truncate"`, loses its end; one in which nothing is left to learn is dropped as well.

    Attributes: `num_dropped`, `num_truncated`.
    """

    def __init__(
        self,
        examples: Sequence[tuple[Sequence[int], Sequence[bool]]],
        row_length: int,
        *,
        too_long: str = "drop",
    ):
        if too_long not in ("drop", "truncate"):
            raise UserError(f"too_long is {too_long!r}; it is 'drop' or 'truncate'")
        self.num_dropped = self.num_truncated = 0
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        for index, (ids, loss_mask) in enumerate(examples):
            if len(ids) != len(loss_mask):
                raise UserError(
                    f"example {index} has {len(ids)} ids but a loss mask of {len(loss_mask)}"
                )
            long = len(ids) > row_length + 1
            mask = np.asarray(loss_mask[: row_length + 1], bool)
            if not mask[1:].any() or (long and too_long == "drop"):
                self.num_dropped += 1
                continue
            self.num_truncated += long
            kept.append((np.asarray(ids[: row_length + 1], np.int32), mask))
        if not kept:
            raise UserError(
                f"none of the {len(examples)} examples fits {row_length} tokens with something to "
                "learn; raise row_length or use too_long='truncate'"
            )
        tokens, masks = (np.concatenate(column) for column in zip(*kept, strict=True))
        self._pack(tokens, np.array([len(ids) for ids, _ in kept]), masks, row_length)
