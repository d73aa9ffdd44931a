"""Advantages of responses that were sampled in groups, one group a prompt, and whose turn it is.

GRPO (DeepSeekMath, arXiv 2402.03300) compares a response with the others of its group and needs no
critic; Dr. GRPO (arXiv 2503.20783) leaves out the division by the group's standard deviation, which
gives easy and hard prompts more weight; DAPO (arXiv 2503.14476) samples again for a group in which
all responses fare alike, leaves out cut responses and makes length cost something near the limit.

All is numpy over [P, G]: P prompts, G responses each. `valid` is False for a response that could
not be judged: it takes no part, neither in the group's mean nor in the loss.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

Scale = Literal["std", "none"]


def group_advantages(
    rewards: Float[np.ndarray, "P G"],
    valid: Bool[np.ndarray, "P G"],
    *,
    scale: Scale = "std",
    epsilon: float = 1e-4,
) -> Float[np.ndarray, "P G"]:
    """r - mean of the group, over its standard deviation plus `epsilon` unless `scale` is "none".

    The deviation is the sample's (n - 1 below). 0 where not valid, and for a group of one.
    """
    rewards = np.where(valid, rewards, 0.0).astype(np.float64)
    count = valid.sum(axis=1, keepdims=True)
    mean = rewards.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(valid, rewards - mean, 0.0)
    if scale == "std":
        variance = np.square(centred).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1)
        deviation = np.sqrt(variance) + epsilon
        centred = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
    return np.where(count > 1, centred, 0.0).astype(np.float32)


def spread(
    rewards: Float[np.ndarray, "P G"], valid: Bool[np.ndarray, "P G"]
) -> Bool[np.ndarray, " P"]:
    """Whether a group has something to say: two of its valid rewards differ."""
    high = np.where(valid, rewards, -np.inf).max(axis=1)
    low = np.where(valid, rewards, np.inf).min(axis=1)
    return high > low


def overlong_penalty(
    lengths: Int[np.ndarray, "P G"], *, longest: int, buffer: int
) -> Float[np.ndarray, "P G"]:
    """DAPO's soft punishment (equation 13), in tokens: 0 up to `longest` - `buffer`, then falling
    in a line to -1 at `longest`. `buffer` 0 punishes nothing."""
    if not buffer:
        return np.zeros(lengths.shape, np.float32)
    over = lengths - (longest - buffer)
    return -np.clip(over / buffer, 0.0, 1.0).astype(np.float32)
