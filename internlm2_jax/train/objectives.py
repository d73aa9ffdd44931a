"""What the stages minimise: a model, a batch and a loss put together.

Layers are recomputed in the backward pass: it saves memory everywhere, and on a CPU, where memory
traffic is the limit, time as well (a fifth to a third of a step of the demo model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from internlm2_jax import sharding
from internlm2_jax.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_by_row
from internlm2_jax.losses.preference import RewardLoss
from internlm2_jax.models.remat import Remat

Metrics = dict[str, jax.Array]


def language_model_loss(
    model: Any, z_loss: float = 0.0, remat: Remat = "full", num_sources: int = 0
) -> Callable[[Any, dict], tuple[jax.Array, Metrics]]:
    """Mean next-token loss in nats over the unmasked targets of packed rows.

    The batch holds tokens, targets, segment_ids, positions, loss_mask, all [B, T]; with
    `num_sources` = S also source [B], 0 to S - 1. The metrics then hold what `by_source` reads:
    source_loss and source_share [S], each source's part of the loss and of its tokens.
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
        (total, losses), weights = linear_cross_entropy_by_row(
            hidden, head, batch["targets"], batch["loss_mask"], z_loss=z_loss
        )
        weight = jnp.sum(weights)
        metrics = {"tokens": weight}
        if num_sources:
            sums = _sums_by_source(batch["source"], num_sources, losses, weights)
            parts = sums / jnp.maximum(weight, 1.0)
            metrics |= {"source_loss": parts[0], "source_share": parts[1]}
        return total / jnp.maximum(weight, 1.0), metrics

    return loss_fn


def _sums_by_source(source: jax.Array, num_sources: int, *rows: jax.Array) -> jax.Array:
    """[len(rows), S]: sums of each of `rows` [B] over the rows of a source."""
    stacked = sharding.constrain(jnp.stack(rows), None, "batch")
    which = sharding.constrain(source, "batch")[:, None] == jnp.arange(num_sources)
    # Float sums in one order: a matrix product may lose bits on an accelerator.
    return jnp.sum(jnp.where(which, stacked[:, :, None], 0.0), axis=1)


def by_source(metrics: Metrics, names: Sequence[str]) -> Metrics:
    """The metrics of a step with loss/NAME, a source's mean loss, for what `by_source` reads.

    Means of parts of a batch, weighted by tokens, give the mean of the batch; NaN stands for a
    source that the batch does not have.
    """
    metrics = dict(metrics)
    loss, share = metrics.pop("source_loss"), metrics.pop("source_share")
    means = _ratio(loss, share)
    return metrics | {f"loss/{name}": means[i] for i, name in enumerate(names)}


@jax.jit
def _ratio(loss: jax.Array, share: jax.Array) -> jax.Array:
    return jnp.where(share > 0, loss / share, jnp.nan)


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


_OF_PAIRS = ("chosen_at", "rejected_at", "pairs", "margins")


def reward_model_loss(
    model: Any, loss: RewardLoss, remat: Remat = "full"
) -> Callable[[Any, dict], tuple[jax.Array, Metrics]]:
    """Loss over the pairs in packed rows.

    The batch holds tokens, segment_ids, positions [B, T]; and of up to P pairs a row [B, P]
    chosen_at, rejected_at (where their reward tokens lie), pairs (1, or 0 for none) and margins.
    """

    def loss_fn(params: Any, batch: dict) -> tuple[jax.Array, Metrics]:
        scores = model.scores(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            remat=remat,
        )
        scores = sharding.constrain(scores, "batch", None)
        pairs = {name: sharding.constrain(batch[name], "batch", None) for name in _OF_PAIRS}
        chosen, rejected = (
            jnp.take_along_axis(scores, pairs[name], axis=1)
            for name in ("chosen_at", "rejected_at")
        )
        return loss(chosen, rejected, weights=pairs["pairs"], margins=pairs["margins"])

    return loss_fn
