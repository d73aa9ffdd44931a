"""One optimizer step as a pure function: (state, batch) -> (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from internlm2_jax import sharding
from internlm2_jax.models.build import STACKED

State = dict[str, Any]
LossFn = Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


def init_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """{"params", "opt_state"}: all that a checkpoint holds beside the step number.

    The first train step donates the state, so `params` must not be used after it.
    """
    return {"params": params, "opt_state": optimizer.init(params)}


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[[State, Any], tuple[State, dict[str, jax.Array]]]:
    """Compiles `loss_fn(params, batch) -> (scalar, metrics)` with `optimizer` into one step.

    The state is donated. Joining the metrics: `grad_norm`, before clipping; and `block_norms`,
    {"grad": ..., "param": ...} of `block_norms` below, the parameters being those before the step.

    Args:
      accumulate: the batch is taken in so many parts, one after another, for one update.
    """
    gradient = accumulated(jax.value_and_grad(loss_fn, has_aux=True), accumulate)

    def step(state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        (loss, metrics), grads = gradient(state["params"], batch)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        norms = {"grad": block_norms(grads), "param": block_norms(state["params"])}
        total = jnp.sqrt(sum(jnp.sum(norm**2) for norm in norms["grad"].values()))
        metrics = {"loss": loss, "grad_norm": total, "block_norms": norms, **metrics}
        return {"params": params, "opt_state": opt_state}, metrics

    return jax.jit(step, donate_argnums=0)


def block_norms(tree: Any) -> dict[str, jax.Array]:
    """Euclidean norm of each part of a tree like the parameters: a scalar, [L] for a stack."""

    def squares(x: jax.Array, stacked: bool) -> jax.Array:
        axes = tuple(range(int(stacked), x.ndim))
        return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes)

    return {
        name: jnp.sqrt(sum(squares(x, name in STACKED) for x in jax.tree.leaves(part)))
        for name, part in tree.items()
    }


def accumulated(gradient: Callable[[Any, Any], Any], parts: int) -> Callable[[Any, Any], Any]:
    """`gradient(params, batch) -> ((loss, metrics), grads)` over `parts` parts of a batch [B, ...].

    A part counts as much as its "tokens" metric says (all the same without one), so that the mean
    over tokens of a batch does not depend on how many parts it was taken in.
    """
    if parts == 1:
        return gradient

    def whole(params: Any, batch: Any) -> Any:
        rows = jax.tree.map(lambda x: sharding.split_rows(x, parts), batch)

        def weighted(part: Any) -> tuple[Any, jax.Array]:
            (loss, metrics), grads = gradient(params, part)
            weight = metrics.get("tokens", jnp.float32(1))
            means = (loss, {k: v for k, v in metrics.items() if k != "tokens"}), grads
            return jax.tree.map(lambda x: weight * x, means), weight

        def add(sums: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, weighted(part)), None

        first = weighted(jax.tree.map(lambda x: x[0], rows))
        later = jax.tree.map(lambda x: x[1:], rows)
        (sums, weight), _ = jax.lax.scan(add, first, later)
        (loss, metrics), grads = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), sums)
        return (loss, {**metrics, "tokens": weight}), grads

    return whole
