"""Next-token loss of the language model: masked cross-entropy in float32, with an optional z-loss.

The target's logit is picked by comparing an iota with the target and summing, not by a gather: the
sum stays local to each shard when the vocabulary axis is split over a mesh (one all-reduce of
[B, T] follows, Megatron's vocabulary-parallel loss), its gradient fuses with the softmax where a
gather's would be a scatter, and on one device XLA fuses it into the log-sum-exp pass.

Training goes through kernels/cross_entropy.py, which is the same loss of hidden states and a head;
these functions take logits that exist anyway, and are what it is tested against.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _target_logit_and_normaliser(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    logits = logits.astype(jnp.float32)
    vocabulary = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    picked = jnp.sum(jnp.where(targets[..., None] == vocabulary, logits, 0.0), axis=-1)
    return picked, jax.nn.logsumexp(logits, axis=-1)


def token_logprobs(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Natural-log probability that `logits[b, t]` gives to `targets[b, t]`; float32 whatever comes.

    `logits[b, t]` must already be the prediction *for* `targets[b, t]` (shift before the call).
    A target outside 0..V-1 gets the log-probability of a logit of 0, so mask it.
    """
    picked, normaliser = _target_logit_and_normaliser(logits, targets)
    return picked - normaliser


def cross_entropy(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"] | Float[Array, "B T"],
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Masked cross-entropy in nats: `(sum of weighted token losses, sum of weights)`.

    Divide the two for the mean; keeping them apart lets micro-batches and packed rows of unequal
    weight add up to exactly the loss of the whole batch. `z_loss` adds z_loss * logsumexp^2 per
    token (PaLM section 5 uses 1e-4), which holds the softmax normaliser near 1; 0 is InternLM2's.
    """
    picked, normaliser = _target_logit_and_normaliser(logits, targets)
    losses = normaliser - picked
    if z_loss:
        losses = losses + z_loss * jnp.square(normaliser)
    weights = loss_mask.astype(jnp.float32)
    # where() and not only a product: a masked token with an infinite loss must not give a NaN.
    return jnp.sum(jnp.where(weights != 0, losses * weights, 0.0)), jnp.sum(weights)
