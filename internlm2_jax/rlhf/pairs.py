"""Preference pairs as a reward model reads them: packed rows of a constant number of tokens.

A sequence is the domain's system prompt, the conversation, one answer, the reward token. Both of a
pair stand in one row, beside other pairs that they do not see, so a batch of so many rows has a
constant number of tokens (16384 in InternLM2 section 4.2.1), whatever the pairs' lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from internlm2_jax.data import chat
from internlm2_jax.data.packing import best_fit
from internlm2_jax.data.preferences import DOMAINS
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError

Pair = Mapping[str, Any]
Domains = Mapping[str, str]  # domain -> system prompt
TooLong = Literal["drop", "cut"]
SHORTEST = 16  # tokens of a pair; ChatML alone takes more


def reward_ids(
    vocabulary: Tokenizer,
    domain: str,
    messages: Sequence[Mapping],
    response: str,
    domains: Domains = DOMAINS,
) -> list[int]:
    """Ids that end in the reward token: the domain's system prompt, the turns, the response."""
    if domain not in domains:
        raise UserError(
            f"no preference domain {domain!r}; this reward model has {', '.join(domains)}: "
            "give it a system prompt"
        )
    turns = [*messages, {"role": "assistant", "content": response}]
    return chat.reward_input(domains[domain], turns, vocabulary)


def cut(ids: list[int], longest: int) -> list[int]:
    """At most `longest` ids: the end goes, but for the reward token (as xtuner cuts)."""
    return ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]


def sides_of(
    pair: Pair, vocabulary: Tokenizer, domains: Domains, longest: int, too_long: TooLong
) -> tuple[tuple[list[int], list[int]] | None, bool]:
    """Ids of chosen and rejected (None: the pair is left out), and whether both are whole."""
    chosen, rejected = (
        reward_ids(vocabulary, pair["domain"], pair["messages"], pair[side], domains)
        for side in ("chosen", "rejected")
    )
    if max(len(chosen), len(rejected)) <= longest:
        return (chosen, rejected), True
    chosen, rejected = cut(chosen, longest), cut(rejected, longest)
    return (None if too_long == "drop" or chosen == rejected else (chosen, rejected)), False


class PairSource:
    """Pairs packed by best fit into rows of `row_length` tokens.

    `source[row]` -> tokens, segment_ids, positions [T] int32; chosen_at, rejected_at [P] int32,
    where the reward tokens of up to P = T / SHORTEST pairs lie; pairs [P] float32, 1 where there is
    one; margins [P] float32, a pair's own "margin" or 1.

    Args:
        max_length: the most tokens of a sequence; default: half a row.
        too_long: pairs with a longer one are left out ("drop") or lose its end ("cut"); `too_long`
            counts them either way.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        vocabulary: Tokenizer,
        row_length: int,
        *,
        domains: Domains = DOMAINS,
        max_length: int | None = None,
        too_long: TooLong = "drop",
    ):
        longest = row_length // 2 if max_length is None else max_length
        if too_long not in get_args(TooLong):
            raise UserError(
                f"too_long is {too_long!r}; it is one of {', '.join(get_args(TooLong))}"
            )
        if 2 * longest > row_length:
            raise UserError(
                f"row_length is {row_length}, less than two sequences of max_length {longest}; "
                "both of a pair stand in one row: raise it"
            )
        self.row_length, self.too_long = row_length, 0
        self.pairs: list[Pair] = []
        sides: list[tuple[list[int], list[int]]] = []
        for pair in pairs:
            both, whole = sides_of(pair, vocabulary, domains, longest, too_long)
            self.too_long += not whole
            if both is not None:
                sides.append(both)
                self.pairs.append(pair)
        if not sides:
            raise UserError(
                f"no preference pair of {len(pairs)} fits {longest} tokens a side; raise row_length"
            )
        lengths = np.array([len(a) + len(b) for a, b in sides])
        row_of = best_fit(lengths, row_length, len(sides))
        self._rows: list[list[int]] = [[] for _ in range(int(row_of.max()) + 1)]
        for number, row in enumerate(row_of.tolist()):
            self._rows[row].append(number)
        self._sides = sides
        self._most = max(1, row_length // SHORTEST)
        self.fill_rate = float(lengths.sum()) / (len(self) * row_length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row: dict[str, np.ndarray] = {
            name: np.zeros(self.row_length, np.int32)
            for name in ("tokens", "segment_ids", "positions")
        }
        row |= {name: np.zeros(self._most, np.int32) for name in ("chosen_at", "rejected_at")}
        row |= {name: np.zeros(self._most, np.float32) for name in ("pairs", "margins")}
        end = segment = 0
        for place, number in enumerate(self._rows[index]):
            for name, ids in zip(("chosen_at", "rejected_at"), self._sides[number], strict=True):
                start, end, segment = end, end + len(ids), segment + 1
                row["tokens"][start:end] = ids
                row["segment_ids"][start:end] = segment
                row["positions"][start:end] = np.arange(len(ids))
                row[name][place] = end - 1
            row["pairs"][place] = 1
            row["margins"][place] = self.pairs[number].get("margin", 1.0)
        return row
