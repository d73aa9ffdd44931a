"""Losses on a scale of bytes, and what a model without context would score.

Losses are in nats per token (natural logarithm; perplexity is their exponential).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from internlm2_jax.errors import UserError


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """The loss on a scale that does not depend on the tokenizer: bits per UTF-8 byte of text."""
    return nats_per_token * num_tokens / (num_bytes * math.log(2))


@dataclass(frozen=True)
class UnigramBaseline:
    """Two yardsticks in nats per token, both blind to context.

    cross_entropy: validation tokens under the *training* frequencies (add-one smoothing). It is
        what a model scores that has learnt how common each token is and nothing more: the line to
        beat, and the one that the run report draws as `unigram_entropy`.
    validation_entropy: the plain entropy of the validation tokens' own frequencies, which knows the
        answer sheet: no context-blind model can score lower on them, so it never exceeds
        `cross_entropy`. Small validation sets make it look lower than it is.
    """

    cross_entropy: float
    validation_entropy: float


def unigram_baseline(
    train: Iterable[np.ndarray], validation: Iterable[np.ndarray], vocab_size: int
) -> UnigramBaseline:
    """Baselines of a corpus given as integer arrays of token ids, any shape, any number of them.

    cross_entropy = -sum_v q(v) log((n(v) + 1) / (N + V)), where n counts the N training tokens,
    V is `vocab_size` and q is the share of token v among the validation tokens.
    """
    train_counts = _counts(train, vocab_size, "training")
    validation_counts = _counts(validation, vocab_size, "validation")
    share = validation_counts / validation_counts.sum()
    log_prob = np.log(train_counts + 1) - np.log(train_counts.sum() + vocab_size)
    seen = share > 0
    return UnigramBaseline(
        cross_entropy=float(-np.sum(share * log_prob)),
        validation_entropy=float(-np.sum(share[seen] * np.log(share[seen]))),
    )


def _counts(arrays: Iterable[np.ndarray], vocab_size: int, name: str) -> np.ndarray:
    """Occurrences of each id, float64 [vocab_size]."""
    counts = np.zeros(vocab_size)
    for array in arrays:
        ids = np.asarray(array).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise UserError(
                f"{name} tokens run from {ids.min()} to {ids.max()}, outside a vocabulary of "
                f"{vocab_size}; the tokens were made by another tokenizer"
            )
        counts += np.bincount(ids, minlength=vocab_size)
    if not counts.any():
        raise UserError(f"there are no {name} tokens; check the token cache")
    return counts
