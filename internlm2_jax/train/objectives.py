"""What the stages minimise: a model, a batch and a loss put together.

Layers are recomputed in the backward pass: it saves memory everywhere, and on a CPU, where memory
traffic is the limit, time as well (a fifth to a third of a step of the demo model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from internlm2_jax import sharding
from internlm2_jax.kernels.cross_entropy import linear_cross_entropy
from internlm2_jax.losses.preference import conditional_reward_loss
from internlm2_jax.models.remat import Remat

Metrics = dict[str, jax.Array]


def language_model_loss(
    model: Any, z_loss: float = 0.0, remat: Remat = "full"
) -> Callable[[Any, dict], tuple[jax.Array, Metrics]]:
    """Mean next-token loss in nats over the unmasked targets of packed rows.

    The batch holds tokens, targets, segment_ids, positions, loss_mask, all [B, T].
    """

    def loss_fn(params: Any, batch: dict) -> tuple[jax.Array, Metrics]:
        hidden = model.hidden(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            remat=remat,
        )
        hidden, head = model.logit_factors(params, hidden)
        total, weight = linear_cross_entropy(
            hidden, head, batch["targets"], batch["loss_mask"], z_loss=z_loss
        )
        return total / jnp.maximum(weight, 1.0), {"tokens": weight}

    return loss_fn


def evaluate_loss(model: Any) -> Callable[[Any, Iterable[dict]], float]:
    """A function (params, batches) -> mean loss in nats per token over all of the batches."""

    @jax.jit
    def sums(params: Any, batch: dict) -> jax.Array:
        hidden = model.hidden(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
        )
        hidden, head = model.logit_factors(params, hidden)
        loss = linear_cross_entropy(hidden, head, batch["targets"], batch["loss_mask"])
        return jnp.stack(loss)

    def mean(params: Any, batches: Iterable[dict]) -> float:
        total, weight = sum(sums(params, batch) for batch in batches)
        return float(total / weight)

    return mean


def scores_at(model: Any, params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Reward [B] of each row: the scalar head's output at its last token, the reward token.

    tokens [B, T] are padded on the right; lengths [B] count the reward token.
    """
    scores = sharding.constrain(model.scores(params, tokens, remat="full"), "batch", None)
    return jnp.take_along_axis(scores, lengths[:, None] - 1, axis=1)[:, 0]


def reward_model_loss(
    model: Any, **options: Any
) -> Callable[[Any, dict], tuple[jax.Array, Metrics]]:
    """Focal ranking loss with log-barrier over pairs; `options` go to conditional_reward_loss.

    The batch holds chosen, rejected [B, T] and chosen_length, rejected_length [B].
    """

    def loss_fn(params: Any, batch: dict) -> tuple[jax.Array, Metrics]:
        tokens = jnp.concatenate([batch["chosen"], batch["rejected"]])
        lengths = jnp.concatenate([batch["chosen_length"], batch["rejected_length"]])
        chosen, rejected = jnp.split(scores_at(model, params, tokens, lengths), 2)
        return conditional_reward_loss(chosen, rejected, **options)

    return loss_fn
