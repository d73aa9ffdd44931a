"""AdamW, learning-rate schedules, and how both follow the width of a model.

A schedule is a function of the global step. Phases are joined into one schedule, so the optimizer
state passes from phase to phase untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from internlm2_jax.errors import UserError

Schedule = Callable[[Any], Any]
Decay = Literal["exponential", "linear", "sqrt"]


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


def warmup_stable_decay(
    peak: float,
    steps: int,
    *,
    warmup: int = 0,
    decay_steps: int = 0,
    decay: Decay = "exponential",
    final_ratio: float = 0.1,
) -> Schedule:
    """WSD (MiniCPM, arXiv 2404.06395): linear to `peak`, `peak`, then down to `final_ratio * peak`.

    With t from 0 to 1 over the last `decay_steps` of `steps`, and r the final ratio:

        exponential   r ** t               MiniCPM's 0.5 ** (s / T) has r = 0.5 ** (decay_steps / T)
        linear        1 - (1 - r) t
        sqrt          1 - (1 - r) sqrt(t)  "1-sqrt" of Haegele et al., arXiv 2405.18392

    Errors: UserError when the parts do not fit into `steps`, or the decay is unknown.
    """
    if decay not in get_args(Decay):
        raise UserError(f"decay is {decay!r}; choose one of {', '.join(get_args(Decay))}")
    if not 0 <= warmup + decay_steps <= steps or min(warmup, decay_steps) < 0:
        raise UserError(
            f"{warmup} steps of warm-up and {decay_steps} of decay do not fit into {steps} steps"
        )
    if decay == "exponential" and decay_steps and not final_ratio > 0:
        raise UserError(
            f"final_ratio is {final_ratio}; an exponential decay needs one above 0, "
            "or take decay='linear'"
        )

    def schedule(step: Any) -> Any:
        rate = jnp.float32(peak)
        if warmup:
            rate *= jnp.minimum(step / warmup, 1.0)
        if decay_steps:
            t = jnp.clip((step - (steps - decay_steps)) / decay_steps, 0.0, 1.0)
            if decay == "exponential":
                rate *= final_ratio**t
            else:
                rate *= 1 - (1 - final_ratio) * (jnp.sqrt(t) if decay == "sqrt" else t)
        return rate

    return schedule


def join(schedules: Sequence[Schedule], lengths: Sequence[int]) -> Schedule:
    """Plays `schedules` one after another; `lengths` are their steps."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return optax.join_schedules(list(schedules), ends[:-1])


def _is_matrix(path: tuple) -> bool:
    """False for norm weights and biases (stacking hides their rank)."""
    names = [str(getattr(p, "key", p)) for p in path]
    return not any("norm" in n or "bias" in n for n in names)


def _decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path), params)


def hidden_matrices(params: Any) -> Any:
    """True on the matrices of blocks: what both sides of grow with the width of the model.

    The embedding and the head have one side that does not (Tensor Programs V, arXiv 2203.03466).
    """

    def hidden(path: tuple, _: Any) -> bool:
        return getattr(path[0], "key", None) in ("layers", "mtp") and _is_matrix(path)

    return jax.tree_util.tree_map_with_path(hidden, params)


def scaled_init(init: Callable[[Any], Any], width_ratio: float) -> Callable[[Any], Any]:
    """`init(key)` with the standard deviation of hidden matrices divided by sqrt(width_ratio)."""

    def scaled(key: Any) -> Any:
        params = init(key)
        factor = 1 / math.sqrt(width_ratio)
        return jax.tree.map(
            lambda x, hidden: x * jnp.asarray(factor, x.dtype) if hidden else x,
            params,
            hidden_matrices(params),
        )

    return init if width_ratio == 1 else scaled


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales gradients so that their global norm is at most `limit`.

    One factor for all, where optax chooses between two values of every element: XLA takes a product
    into the update that follows, and a choice it writes to memory first.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = limit / jnp.maximum(optax.global_norm(grads), limit)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adamw(
    learning_rate: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    width_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with the global gradient norm clipped to `clip_norm`; state in float32.

    The report states neither betas nor weight decay for pre-training: these defaults are choices.

    Args:
      width_ratio: muP's, the model's width over that of the model whose learning rate this is.
        Updates of hidden matrices are divided by it, as MiniCPM does (arXiv 2404.06395).
    """
    parts = [
        clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_decays),
    ]
    if width_ratio != 1:
        parts.append(optax.masked(optax.scale(1 / width_ratio), hidden_matrices))
    return optax.chain(*parts)
