"""Rollout prompts in a seeded order, as a pure function of the iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from internlm2_jax.data import chat
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError


class Prompts:
    """`prompts(iteration)` -> (rows, ids) of a batch; each prompt stands `samples` times in a row.

    Rows are {"messages", "domain", "task"}; those over `longest` tokens are left out and counted.
    """

    def __init__(
        self,
        rows: Sequence[Mapping],
        vocabulary: Tokenizer,
        *,
        longest: int,
        batch_size: int,
        seed: int,
        samples: int = 1,
    ):
        if samples < 1 or batch_size % samples:
            raise UserError(
                f"samples_per_prompt is {samples}; it must divide the batch of {batch_size}"
            )
        rendered = [
            (row, chat.render(row["messages"], vocabulary, add_generation_prompt=True).ids)
            for row in rows
        ]
        self._rows = [(row, ids) for row, ids in rendered if len(ids) <= longest]
        self.too_long = len(rendered) - len(self._rows)
        self._batch, self._samples, self._seed = batch_size // samples, samples, seed
        if len(self._rows) < self._batch:
            raise UserError(
                f"{len(self._rows)} prompts fit {longest} tokens, fewer than a batch of "
                f"{self._batch}; raise prompt_length or lower batch_size"
            )

    def __call__(self, iteration: int) -> tuple[list[Mapping], list[list[int]]]:
        epoch, i = divmod(iteration, len(self._rows) // self._batch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        chosen = [self._rows[j] for j in order[i * self._batch : (i + 1) * self._batch]]
        chosen = [prompt for prompt in chosen for _ in range(self._samples)]
        return [row for row, _ in chosen], [ids for _, ids in chosen]
