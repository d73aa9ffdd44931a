"""Texts of any length as token rows of a few fixed lengths.

A model is compiled once per shape. A row is therefore padded to the next of a few lengths
(`Buckets`), and the rows of a length always come in batches of one size, so that the number of
programs is the number of lengths, whatever the texts.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from internlm2_jax.errors import UserError

Encode = Callable[[Sequence[str]], list[list[int]]]

# Longer than almost any window of tokens: what is cut out of a very long text to be tokenised.
_CHARACTERS_PER_TOKEN = 6


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Row lengths in tokens, ascending, and about how many tokens a batch holds."""

    lengths: tuple[int, ...]
    tokens_per_batch: int

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise UserError(f"bucket lengths {self.lengths} must be distinct and ascending")
        if self.lengths[0] < 2 or self.tokens_per_batch < 1:
            raise UserError("bucket lengths must be at least 2 and tokens_per_batch at least 1")

    @classmethod
    def up_to(cls, longest: int, tokens_per_batch: int, shortest: int = 64) -> Buckets:
        """Each length twice the one before; the last is `longest`."""
        lengths = [longest]
        while lengths[0] // 2 >= shortest:
            lengths.insert(0, -(-lengths[0] // 2))
        return cls(tuple(lengths), tokens_per_batch)

    def batch_size(self, length: int) -> int:
        return max(1, self.tokens_per_batch // length)

    def of(self, tokens: int) -> int:
        """The length that a row of `tokens` is padded to."""
        return self.lengths[bisect.bisect_left(self.lengths, tokens)]

    def batches(
        self, rows: Sequence[Sequence[int]], pad: int
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """(indices of the rows, tokens [B, T] int32, lengths [B] int32); B and T depend on the
        bucket alone, what is missing is filled with rows of one padding token."""
        for length in self.lengths:
            mine = [i for i, row in enumerate(rows) if self.of(len(row)) == length]
            size = self.batch_size(length)
            for start in range(0, len(mine), size):
                chosen = mine[start : start + size]
                tokens = np.full((size, length), pad, np.int32)
                lengths = np.ones(size, np.int32)
                for at, index in enumerate(chosen):
                    tokens[at, : len(rows[index])] = rows[index]
                    lengths[at] = len(rows[index])
                yield chosen, tokens, lengths


def windows(text: str, encode: Encode, size: int, most: int) -> list[list[int]]:
    """Token windows of at most `size` that cover a text, at most `most` of them.

    They lie end to end; the last one ends with the text and is full whenever the text is longer
    than a window, so that no verdict rests on a few left-over words. A text beyond about
    `most` windows is sampled at even distances rather than read whole. An empty text has one empty
    window.
    """
    reach = size * _CHARACTERS_PER_TOKEN
    if len(text) > most * reach:
        steps = [round(i * (len(text) - reach) / max(most - 1, 1)) for i in range(most)]
        return [ids[:size] for ids in encode([text[at : at + reach] for at in steps])]
    (ids,) = encode([text])
    if len(ids) <= size:
        return [ids]
    starts = [*range(0, len(ids) - size, size), len(ids) - size]
    if len(starts) > most:
        starts = [starts[round(i * (len(starts) - 1) / max(most - 1, 1))] for i in range(most)]
    return [ids[start : start + size] for start in starts]
