"""PPO's updates as compiled functions of (state, batch): what one iteration does to the weights.

The state is a dict of trees: "params" and "opt_state" are the actor's, "critic" and
"critic_opt_state" the critic's. A batch holds tokens [B, W] and, for the steps that predict tokens
1 .. W - 1, mask, logprobs, advantages, returns [B, W - 1].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from internlm2_jax.kernels.cross_entropy import linear_logprobs
from internlm2_jax.losses.policy_gradient import ppo_policy_loss, value_loss
from internlm2_jax.models.remat import Remat
from internlm2_jax.rlhf import advantage, rewards
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.objectives import language_model_loss

State = dict[str, Any]
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Hyper-parameters of the update.

    Stated by InternLM2 section 4.2.3: kl_coefficient, gae_lambda, pretrain_coefficient, no value
    clipping, no advantage normalisation (learning rates 1e-6 and 5e-6 at 7B). Choices: the rest.
    """

    actor_learning_rate: float = 1e-6
    critic_learning_rate: float = 5e-6
    kl_coefficient: float = 0.01
    gamma: float = 1.0
    gae_lambda: float = 0.99
    clip_epsilon: float = 0.2
    pretrain_coefficient: float = 0.5
    missing_eos_penalty: float = 1.0
    clip_norm: float = 1.0
    epochs: int = 1
    minibatches: int = 1


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

    def __init__(self, model: Any, critic_model: Any, config: PPOConfig):
        self._model, self._critic_model, self._config = model, critic_model, config
        self._actor_optimizer = optimizers.adamw(
            config.actor_learning_rate, weight_decay=0.0, clip_norm=config.clip_norm
        )
        self._critic_optimizer = optimizers.adamw(
            config.critic_learning_rate, weight_decay=0.0, clip_norm=config.clip_norm
        )

    def init(self, actor: Any, critic: Any) -> State:
        """The state before the first update; it owns copies, so that updates may donate it."""
        actor, critic = jax.tree.map(jnp.copy, (actor, critic))
        return {
            "params": actor,
            "opt_state": self._actor_optimizer.init(actor),
            "critic": critic,
            "critic_opt_state": self._critic_optimizer.init(critic),
        }

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """`epochs` passes over `batch`, each in `minibatches` equal parts."""
        rows = len(batch["tokens"]) // self._config.minibatches
        for _ in range(self._config.epochs):
            for i in range(self._config.minibatches):
                yield {name: part[i * rows : (i + 1) * rows] for name, part in batch.items()}

    @functools.partial(jax.jit, static_argnums=0)
    def assess(self, reference: Any, critic: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(reference log-probabilities, values), both [B, W - 1], of tokens [B, W]."""
        values = self._critic_model.scores(critic, tokens[:, :-1])
        return next_token_logprobs(self._model, reference, tokens), values

    @functools.partial(jax.jit, static_argnums=0)
    def estimate(
        self,
        scores: jax.Array,
        logprobs: jax.Array,
        reference: jax.Array,
        values: jax.Array,
        mask: jax.Array,
        finished: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """(advantages, returns) [B, W - 1] of responses with reward-model scores [B]."""
        shaped = rewards.shape(
            scores,
            logprobs,
            reference,
            mask,
            finished,
            kl_coefficient=self._config.kl_coefficient,
            missing_eos_penalty=self._config.missing_eos_penalty,
        )
        return advantage.gae(
            shaped, values, mask, gamma=self._config.gamma, lam=self._config.gae_lambda
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update_critic(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step of the critic on the squared error to the returns."""

        def loss_fn(critic: Any) -> jax.Array:
            values = self._critic_model.scores(critic, batch["tokens"][:, :-1], remat="full")
            return value_loss(values, batch["returns"], batch["mask"])

        loss, grads = jax.value_and_grad(loss_fn)(state["critic"])
        critic, opt_state = _apply(
            self._critic_optimizer, grads, state["critic_opt_state"], state["critic"]
        )
        return {**state, "critic": critic, "critic_opt_state": opt_state}, {"value_loss": loss}

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update_actor(
        self, state: State, batch: Batch, pretrain_batch: Batch
    ) -> tuple[State, dict[str, jax.Array]]:
        """One step of the actor on the clipped surrogate plus the pre-training loss."""
        pretrain_loss = language_model_loss(self._model)

        def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            policy, metrics = ppo_policy_loss(
                next_token_logprobs(self._model, params, batch["tokens"]),
                batch["logprobs"],
                batch["advantages"],
                batch["mask"],
                clip_epsilon=self._config.clip_epsilon,
            )
            kept, _ = pretrain_loss(params, pretrain_batch)
            return policy + self._config.pretrain_coefficient * kept, {
                "policy_loss": policy,
                "pretrain_loss": kept,
                "ratio": metrics["ratio"],
                "clip_share": metrics["clip_fraction"],
            }

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"])
        params, opt_state = _apply(
            self._actor_optimizer, grads, state["opt_state"], state["params"]
        )
        return {**state, "params": params, "opt_state": opt_state}, metrics


def _apply(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
