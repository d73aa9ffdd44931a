"""PPO's updates as compiled functions of (state, batch): what one iteration does to the weights.

The state is a dict of trees: "params" and "opt_state" are the actor's, "critic" and
"critic_opt_state" the critic's, "control" holds what is steered between iterations (the KL
coefficient, running moments of the scores). A batch holds tokens [B, W] and, for the steps that
predict tokens 1 .. W - 1, mask, logprobs, reference, values, advantages, returns [B, W - 1], as
host arrays: each model has its own mesh, and only such numbers go from one to another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from internlm2_jax import sharding
from internlm2_jax.kernels.cross_entropy import linear_logprobs
from internlm2_jax.losses.policy_gradient import entropy, masked_mean, ppo_policy_loss, value_loss
from internlm2_jax.models.remat import Remat
from internlm2_jax.rlhf import advantage, kl, rewards
from internlm2_jax.rlhf.config import Layouts, PPOConfig
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.objectives import language_model_loss

__all__ = ["Layouts", "PPOConfig", "Updates", "next_token_logprobs"]

State = dict[str, Any]
Batch = dict[str, Any]
_ACTOR = ("tokens", "mask", "logprobs", "advantages", "reference")
_CRITIC = ("tokens", "mask", "returns", "values")


def next_token_logprobs(
    model: Any, params: Any, tokens: jax.Array, remat: Remat = "full"
) -> jax.Array:
    """[B, W - 1] log-probability of token t + 1 given the tokens up to t, from tokens [B, W].

    `remat` is what a block keeps for its gradient (models/remat.py).
    """
    hidden = model.hidden(params, tokens[:, :-1], remat=remat)
    hidden, head = model.logit_factors(params, hidden)
    return linear_logprobs(hidden, head, tokens[:, 1:])


class Updates:
    """The compiled parts of PPO for an actor `model` and a `critic_model` with a scalar head."""

    def __init__(
        self, model: Any, critic_model: Any, config: PPOConfig, layouts: Layouts | None = None
    ):
        self._model, self._critic_model, self._config = model, critic_model, config
        self._layouts = layouts or Layouts()
        self._actor_optimizer = optimizers.adamw(
            config.actor_learning_rate, weight_decay=0.0, clip_norm=config.clip_norm
        )
        self._critic_optimizer = optimizers.adamw(
            config.critic_learning_rate, weight_decay=0.0, clip_norm=config.clip_norm
        )

    def init(self, actor: Any, critic: Any) -> State:
        """The state before the first update; it owns copies, so that updates may donate it."""
        with self._layouts.use("actor"):
            actor = jax.tree.map(jnp.copy, actor)
            opt_state = self._actor_optimizer.init(actor)
        with self._layouts.use("critic"):
            critic = jax.tree.map(jnp.copy, critic)
            critic_opt_state = self._critic_optimizer.init(critic)
        return {
            "params": actor,
            "opt_state": opt_state,
            "critic": critic,
            "critic_opt_state": critic_opt_state,
            "control": {
                "kl_coefficient": jnp.float32(self._config.kl_coefficient),
                "scores": rewards.Moments.empty()._asdict(),
            },
        }

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """`epochs` passes over `batch`, each in `minibatches` equal parts."""
        rows = len(batch["tokens"]) // self._config.minibatches
        for _ in range(self._config.epochs):
            for i in range(self._config.minibatches):
                yield {name: part[i * rows : (i + 1) * rows] for name, part in batch.items()}

    # ---------------------------------------------------------------- before the updates

    def assess(self, reference: Any, critic: Any, tokens: np.ndarray) -> tuple[Any, Any]:
        """(reference log-probabilities, values), both [B, W - 1] on the host, of tokens [B, W]."""
        with self._layouts.use("reference"):
            logprobs = sharding.fetch(self._logprobs(reference, sharding.place_rows(tokens)))
        with self._layouts.use("critic"):
            values = sharding.fetch(self._values(critic, sharding.place_rows(tokens)))
        return logprobs, values

    @functools.partial(jax.jit, static_argnums=0)
    def _logprobs(self, params: Any, tokens: jax.Array) -> jax.Array:
        return next_token_logprobs(self._model, params, tokens)

    @functools.partial(jax.jit, static_argnums=0)
    def _values(self, critic: Any, tokens: jax.Array) -> jax.Array:
        return self._critic_model.scores(critic, tokens[:, :-1])

    def steer(self, state: State, scores: np.ndarray, measured_kl: float) -> tuple[State, Any]:
        """(state, scores as the policy is paid): normalised, clipped; the KL coefficient adapted.

        The moments that scores are normalised by hold these scores too.
        """
        config, control = self._config, dict(state["control"])
        paid = jnp.asarray(scores, jnp.float32)
        if config.reward_normalisation == "running":
            moments = rewards.Moments(**control["scores"]).after(paid)
            control["scores"] = moments._asdict()
            paid = rewards.normalised(paid, moments)
        if config.reward_clip is not None:
            paid = jnp.clip(paid, -config.reward_clip, config.reward_clip)
        if config.kl_target is not None:
            control["kl_coefficient"] = kl.adapted(
                control["kl_coefficient"],
                jnp.float32(measured_kl),
                target=config.kl_target,
                horizon=config.kl_horizon,
                count=len(scores),
            )
        return {**state, "control": control}, np.asarray(paid)

    @functools.partial(jax.jit, static_argnums=0)
    def estimate(
        self,
        scores: jax.Array,
        logprobs: jax.Array,
        reference: jax.Array,
        values: jax.Array,
        mask: jax.Array,
        finished: jax.Array,
        kl_coefficient: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """(advantages, returns) [B, W - 1] of responses that are paid `scores` [B] at their end."""
        config = self._config
        coefficient = config.kl_coefficient if kl_coefficient is None else kl_coefficient
        shaped = rewards.shape(
            scores,
            logprobs,
            reference,
            mask,
            finished,
            kl_coefficient=coefficient if config.kl_in == "reward" else 0.0,
            missing_eos_penalty=config.missing_eos_penalty,
            estimator=kl.ESTIMATORS[config.kl_estimator],
        )
        advantages, returns = advantage.gae(
            shaped, values, mask, gamma=config.gamma, lam=config.gae_lambda
        )
        if config.whiten_advantages:
            advantages = advantage.whiten(advantages, mask)
        return advantages, returns

    # --------------------------------------------------------------------------- updates

    def update_critic(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step of the critic on the squared error to the returns."""
        own = {name: state[name] for name in ("critic", "critic_opt_state")}
        with self._layouts.use("critic"):
            rows = sharding.place_rows({n: batch[n] for n in _CRITIC if n in batch})
            own, metrics = self.critic_step(own, rows)
        return {**state, **own}, metrics

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def critic_step(self, own: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """`update_critic` of {"critic", "critic_opt_state"}, on the mesh in use."""
        clip = self._config.value_clip

        def loss_fn(critic: Any) -> jax.Array:
            values = self._critic_model.scores(critic, batch["tokens"][:, :-1], remat="full")
            old = None if clip is None else batch["values"]
            mask = batch["mask"]
            return value_loss(values, batch["returns"], mask, old_values=old, clip_epsilon=clip)

        loss, grads = jax.value_and_grad(loss_fn)(own["critic"])
        critic, opt_state = _apply(
            self._critic_optimizer, grads, own["critic_opt_state"], own["critic"]
        )
        return {"critic": critic, "critic_opt_state": opt_state}, {"value_loss": loss}

    def update_actor(
        self, state: State, batch: Batch, pretrain_batch: Batch
    ) -> tuple[State, dict[str, jax.Array]]:
        """One step of the actor on the clipped surrogate plus the pre-training loss."""
        own = {name: state[name] for name in ("params", "opt_state")}
        coefficient = np.float32(state["control"]["kl_coefficient"])
        with self._layouts.use("actor"):
            rows = sharding.place_rows({n: batch[n] for n in _ACTOR if n in batch})
            extra = sharding.place_rows(pretrain_batch)
            own, metrics = self.actor_step(own, rows, extra, coefficient)
        return {**state, **own}, metrics

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def actor_step(
        self, own: State, batch: Batch, pretrain_batch: Batch, kl_coefficient: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        """`update_actor` of {"params", "opt_state"}, on the mesh in use."""
        config, mask = self._config, batch["mask"]
        pretrain_loss = language_model_loss(self._model)

        def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            logprobs = next_token_logprobs(self._model, params, batch["tokens"])
            policy, metrics = ppo_policy_loss(
                logprobs,
                batch["logprobs"],
                batch["advantages"],
                mask,
                clip_epsilon=config.clip_epsilon,
                clip_epsilon_high=config.clip_epsilon_high,
                dual_clip=config.dual_clip,
            )
            kept, _ = pretrain_loss(params, pretrain_batch)
            total = policy + config.pretrain_coefficient * kept
            found = {
                "policy_loss": policy,
                "pretrain_loss": kept,
                "ratio": metrics["ratio"],
                "ratio_max": metrics["ratio_max"],
                "clip_share": metrics["clip_fraction"],
                "approx_kl": metrics["approx_kl"],
                "log_ratio": metrics["log_ratio"],
            }
            if config.kl_in == "loss":
                estimator = kl.ESTIMATORS[config.kl_estimator]
                found["kl_loss"] = masked_mean(estimator(logprobs, batch["reference"]), mask)
                total += kl_coefficient * found["kl_loss"]
            if config.entropy_coefficient:
                logits = self._model.logits(params, batch["tokens"][:, :-1], remat="full")
                found["entropy"] = masked_mean(entropy(logits), mask)
                total -= config.entropy_coefficient * found["entropy"]
            return total, found

        grads, metrics = jax.grad(loss_fn, has_aux=True)(own["params"])
        squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads)]
        metrics["actor_grad_norm"] = jnp.sqrt(sum(squares))
        params, opt_state = _apply(self._actor_optimizer, grads, own["opt_state"], own["params"])
        return {"params": params, "opt_state": opt_state}, metrics


def _apply(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
