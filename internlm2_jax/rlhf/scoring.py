"""Preference pairs as a reward model reads them, its scores, and how well they order the pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from internlm2_jax.data import chat
from internlm2_jax.data.preferences import DOMAINS
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.train.objectives import scores_at

Pair = Mapping[str, Any]


def reward_ids(
    vocabulary: Tokenizer, domain: str, messages: Sequence[dict], response: str
) -> list[int]:
    """Ids that end in the reward token: the domain's system prompt, the turns, the response."""
    turns = [*messages, {"role": "assistant", "content": response}]
    return chat.reward_input(DOMAINS[domain], turns, vocabulary)


class PairSource:
    """Preference pairs as padded rows of `row_length` tokens; too long ones are counted, dropped.

    `source[i]` -> chosen, rejected [T] int32 and chosen_length, rejected_length.
    """

    def __init__(self, pairs: Sequence[Pair], vocabulary: Tokenizer, row_length: int):
        self._rows: list[tuple[list[int], list[int]]] = []
        self.pairs: list[Pair] = []
        self._length, self._pad = row_length, vocabulary.pad_id
        for pair in pairs:
            both = [
                reward_ids(vocabulary, pair["domain"], pair["messages"], pair[side])
                for side in ("chosen", "rejected")
            ]
            if max(map(len, both)) <= row_length:
                self._rows.append((both[0], both[1]))
                self.pairs.append(pair)
        self.too_long = len(pairs) - len(self._rows)
        if not self._rows:
            raise UserError(
                f"no preference pair of {len(pairs)} fits {row_length} tokens; raise row_length"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        chosen, rejected = self._rows[index]
        return {
            "chosen": self._padded(chosen),
            "rejected": self._padded(rejected),
            "chosen_length": np.asarray(len(chosen), np.int32),
            "rejected_length": np.asarray(len(rejected), np.int32),
        }

    def _padded(self, ids: list[int]) -> np.ndarray:
        row = np.full(self._length, self._pad, np.int32)
        row[: len(ids)] = ids
        return row


class Scorer:
    """Scores conversations with a reward model, in compiled batches of one shape."""

    def __init__(self, model: Any, vocabulary: Tokenizer, row_length: int, batch_size: int = 64):
        self._vocabulary, self._length, self._batch = vocabulary, row_length, batch_size
        self._scores = jax.jit(lambda p, tokens, lengths: scores_at(model, p, tokens, lengths))

    def __call__(
        self, params: Any, conversations: Sequence[tuple[str, Sequence[dict], str]]
    ) -> np.ndarray:
        """Scores [n] of (domain, messages, response) triples; cut at the end before the token."""
        tail = self._vocabulary.reward_id
        rows = np.full((len(conversations), self._length), self._vocabulary.pad_id, np.int32)
        lengths = np.ones(len(conversations), np.int32)
        for i, (domain, messages, response) in enumerate(conversations):
            ids = reward_ids(self._vocabulary, domain, messages, response)
            ids = ids if len(ids) <= self._length else [*ids[: self._length - 1], tail]
            rows[i, : len(ids)], lengths[i] = ids, len(ids)
        out = []
        for i in range(0, len(rows), self._batch):
            short = self._batch - len(rows[i : i + self._batch])
            tokens = np.pad(rows[i : i + self._batch], ((0, short), (0, 0)))
            ends = np.pad(lengths[i : i + self._batch], (0, short), constant_values=1)
            out.append(np.asarray(self._scores(params, tokens, ends))[: self._batch - short])
        return np.concatenate(out) if out else np.zeros(0, np.float32)

    def pairs(self, params: Any, pairs: Sequence[Pair], domain: str | None = None) -> np.ndarray:
        """Scores [n, 2] of chosen and rejected, under `domain` or each pair's own."""
        both = [
            (domain or pair["domain"], pair["messages"], pair[side])
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
        return self(params, both).reshape(-1, 2)


def accuracy(scores: np.ndarray) -> float:
    """Share of pairs [n, 2] whose chosen side scores higher; ties count half."""
    return float(np.mean((np.sign(scores[:, 0] - scores[:, 1]) + 1) / 2))


def measure_domains(scorer: Scorer, params: Any, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Accuracy and scores per domain, and what flipping the system prompt does to conflicts.

    A conflict is a pair of responses that two domains order in opposite ways; it is "flipped" when
    the model, too, prefers one under the first prompt and the other under the second.
    """
    by_domain = {d: [p for p in pairs if p["domain"] == d] for d in DOMAINS}
    scores = {d: scorer.pairs(params, rows) for d, rows in by_domain.items() if rows}
    sides = {d: {(p["pair_id"]): i for i, p in enumerate(rows)} for d, rows in by_domain.items()}
    shared = sorted(sides["helpful"].keys() & sides["harmless"].keys())
    conflicts = [
        (sides["helpful"][i], sides["harmless"][i])
        for i in shared
        if by_domain["helpful"][sides["helpful"][i]]["chosen"]
        == by_domain["harmless"][sides["harmless"][i]]["rejected"]
    ]
    right = {
        d: np.array([scores[d][pair[k], 0] > scores[d][pair[k], 1] for pair in conflicts])
        for k, d in enumerate(("helpful", "harmless"))
        if conflicts
    }
    flip: dict[str, float] = {"pairs": len(conflicts)}
    if conflicts:
        flip |= {
            "flipped_share": float(np.mean(right["helpful"] & right["harmless"])),
            "accuracy_helpful": float(np.mean(right["helpful"])),
            "accuracy_harmless": float(np.mean(right["harmless"])),
        }
    return {
        "accuracy": {d: accuracy(s) for d, s in scores.items()},
        "flip": flip,
        "scores": {
            d: {"chosen": s[:, 0].tolist(), "rejected": s[:, 1].tolist()} for d, s in scores.items()
        },
    }
