"""AdamW and the learning-rate schedules of the three-phase run.

A schedule is a function of the global step. Phases are joined into one schedule, so the optimizer
state passes from phase to phase untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

Schedule = Callable[[Any], Any]


def warmup_cosine(
    peak: float, steps: int, *, warmup: int = 0, final_ratio: float = 0.1
) -> Schedule:
    """Linear from 0 to `peak` over `warmup` steps, then a cosine to `final_ratio * peak`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=peak * final_ratio,
    )


def join(schedules: Sequence[Schedule], lengths: Sequence[int]) -> Schedule:
    """Plays `schedules` one after another; `lengths` are their steps."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return optax.join_schedules(list(schedules), ends[:-1])


def _decays(params: Any) -> Any:
    """True on matrices; norm weights and biases are not decayed (stacking hides their rank)."""

    def matrix(path: tuple, _: Any) -> bool:
        names = [str(getattr(p, "key", p)) for p in path]
        return not any("norm" in n or "bias" in n for n in names)

    return jax.tree_util.tree_map_with_path(matrix, params)


def adamw(
    learning_rate: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with the global gradient norm clipped to `clip_norm`; state in float32.

    The report states neither betas nor weight decay for pre-training: these defaults are choices.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_decays),
    )
