"""One optimizer step as a pure function: (state, batch) -> (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

State = dict[str, Any]
LossFn = Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


def init_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """{"params", "opt_state"}: all that a checkpoint holds beside the step number.

    The first train step donates the state, so `params` must not be used after it.
    """
    return {"params": params, "opt_state": optimizer.init(params)}


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[[State, Any], tuple[State, dict[str, jax.Array]]]:
    """Compiles `loss_fn(params, batch) -> (scalar, metrics)` with `optimizer` into one step.

    The state is donated. `grad_norm` (before clipping) joins the metrics.
    """

    def step(state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = gradient(state["params"], batch)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return {"params": params, "opt_state": opt_state}, metrics

    return jax.jit(step, donate_argnums=0)
