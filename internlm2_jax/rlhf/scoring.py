"""Scores of a reward model, how well they order pairs, and how far they can be trusted."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internlm2_jax import files, sharding
from internlm2_jax.data.preferences import DOMAINS
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.rlhf.pairs import Domains, Pair, cut, reward_ids
from internlm2_jax.train.objectives import scores_at

_FILE = "domains.json"
BINS = 5  # of the calibration, equally wide from 1/2 to 1


def save_domains(stage: Path, domains: Domains) -> None:
    """Keeps the system prompts beside the reward model that was trained with them."""
    files.write_json(stage / _FILE, dict(domains))


def load_domains(stage: Path) -> Domains:
    """The system prompts of a reward model; ours where its stage keeps none."""
    return files.read_json(stage / _FILE) if (stage / _FILE).is_file() else DOMAINS


class Scorer:
    """Scores conversations with a reward model, in compiled batches of one shape."""

    def __init__(
        self,
        model: Any,
        vocabulary: Tokenizer,
        row_length: int,
        batch_size: int = 64,
        domains: Domains = DOMAINS,
    ):
        self._vocabulary, self._length, self._batch = vocabulary, row_length, batch_size
        self.domains = domains
        self._scores = jax.jit(lambda p, tokens, lengths: scores_at(model, p, tokens, lengths))

    def __call__(
        self, params: Any, conversations: Sequence[tuple[str, Sequence[dict], str]]
    ) -> np.ndarray:
        """Scores [n] of (domain, messages, response) triples; cut at the end before the token."""
        rows = np.full((len(conversations), self._length), self._vocabulary.pad_id, np.int32)
        lengths = np.ones(len(conversations), np.int32)
        for i, (domain, messages, response) in enumerate(conversations):
            ids = reward_ids(self._vocabulary, domain, messages, response, self.domains)
            ids = cut(ids, self._length)
            rows[i, : len(ids)], lengths[i] = ids, len(ids)
        out = []
        for i in range(0, len(rows), self._batch):
            short = self._batch - len(rows[i : i + self._batch])
            tokens = np.pad(rows[i : i + self._batch], ((0, short), (0, 0)))
            ends = np.pad(lengths[i : i + self._batch], (0, short), constant_values=1)
            scores = self._scores(params, *sharding.place_rows((tokens, ends)))
            out.append(sharding.fetch(scores)[: self._batch - short])
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


def calibration(scores: np.ndarray) -> dict[str, Any]:
    """Whether confidence is earned: Bradley-Terry's sigmoid(|margin|) against the share right.

    {"error": expected calibration error (Guo et al. 2017), "bins": [{"confidence", "accuracy",
    "pairs"}]}, of pairs [n, 2]; empty bins are left out.
    """
    margin = scores[:, 0].astype(np.float64) - scores[:, 1]
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (np.sign(margin) + 1) / 2
    which = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [
        {
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(right[which == b].mean()),
            "pairs": int((which == b).sum()),
        }
        for b in range(BINS)
        if (which == b).any()
    ]
    gaps = [b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in bins]
    return {"error": sum(gaps) / max(len(scores), 1), "bins": bins}


def measure_domains(scorer: Scorer, params: Any, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Accuracy, scores and calibration per domain, and what the system prompt does to conflicts.

    A conflict is a pair of responses that two domains order in opposite ways; it is "flipped" when
    the model, too, prefers one under the first prompt and the other under the second.
    """
    by_domain = {d: [p for p in pairs if p["domain"] == d] for d in scorer.domains}
    scores = {d: scorer.pairs(params, rows) for d, rows in by_domain.items() if rows}
    return {
        "accuracy": {d: accuracy(s) for d, s in scores.items()},
        "flip": _flips({d: by_domain[d] for d in scores}, scores),
        "calibration": calibration(np.concatenate(list(scores.values()))),
        "scores": {
            d: {"chosen": s[:, 0].tolist(), "rejected": s[:, 1].tolist()} for d, s in scores.items()
        },
    }


def _flips(by_domain: dict[str, list[Pair]], scores: dict[str, np.ndarray]) -> dict[str, float]:
    """{"pairs", "flipped_share", "accuracy_DOMAIN"} of the conflicts."""
    faces: dict[str, list[tuple[str, Pair, bool]]] = collections.defaultdict(list)
    for domain, rows in by_domain.items():
        for pair, (chosen, rejected) in zip(rows, scores[domain], strict=True):
            if "pair_id" in pair:
                faces[pair["pair_id"]].append((domain, pair, bool(chosen > rejected)))
    right: dict[str, list[bool]] = collections.defaultdict(list)
    flipped = []
    for found in faces.values():
        if len(found) == 2 and found[0][1]["chosen"] == found[1][1]["rejected"]:
            flipped.append(found[0][2] and found[1][2])
            for domain, _, is_right in found:
                right[domain].append(is_right)
    if not flipped:
        return {"pairs": 0}
    shares = {f"accuracy_{domain}": float(np.mean(r)) for domain, r in right.items()}
    return {"pairs": len(flipped), "flipped_share": float(np.mean(flipped)), **shares}
