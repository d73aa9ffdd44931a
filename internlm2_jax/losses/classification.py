"""One logit per text from a decoder with a scalar head, and its cross-entropy.

A causal decoder has read the whole text only at its last token ("last", as the reward model is
read); the mean over the positions ("mean") asks every prefix instead, which learns faster what is
said locally, such as damaged writing or a word of abuse.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from internlm2_jax.errors import UserError
from internlm2_jax.models.remat import Remat

Pooling = Literal["mean", "last"]


def pooled_logits(
    model: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    pooling: Pooling = "mean",
    *,
    remat: Remat = "none",
) -> Float[Array, " B"]:
    """Logit of each row, float32; what stands after `lengths` tokens has no part in it.

    The head is linear, so the score of the mean hidden state is the mean of the scores.
    """
    if pooling not in get_args(Pooling):
        raise UserError(f"pooling={pooling!r} is unknown; choose one of mean, last")
    # By the row's own length, or the rotation would depend on the padding.
    scores = model.scores(params, tokens, rope_length=lengths, remat=remat)
    at = jnp.arange(tokens.shape[1])
    if pooling == "last":
        picked = at == lengths[:, None] - 1
        return jnp.sum(jnp.where(picked, scores, 0.0), axis=1)
    inside = at < lengths[:, None]
    return jnp.sum(jnp.where(inside, scores, 0.0), axis=1) / lengths


def binary_cross_entropy(
    logits: Float[Array, " B"],
    labels: Float[Array, " B"],
    weights: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted mean of log(1 + e^x) - y x in nats; labels in [0, 1] may be soft.

    Metrics: accuracy (label 1 from 0.5 on, a logit of 0 counts half), positives (share of label 1).
    """
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    weights = jnp.ones_like(logits) if weights is None else weights.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weights), 1e-9)
    losses = jax.nn.softplus(logits) - labels * logits
    signs = jnp.where(labels >= 0.5, 1.0, -1.0)
    right = 0.5 * (1.0 + signs * jnp.sign(logits))
    return jnp.sum(weights * losses) / total, {
        "accuracy": jnp.sum(weights * right) / total,
        "positives": jnp.sum(weights * (labels >= 0.5)) / total,
    }
