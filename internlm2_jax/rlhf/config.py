"""Hyper-parameters of PPO: the report's values, and the usual alternatives as fields."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Literal, get_args

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.rlhf.kl import Estimator
from internlm2_jax.sharding import Layout

Placement = Literal["reward", "loss"]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Stated by InternLM2 section 4.2.3: kl_coefficient, gae_lambda, pretrain_coefficient, no value
    clipping, no advantage normalisation (learning rates 1e-6 and 5e-6 at 7B). Choices: the rest.

    Attributes:
        kl_coefficient: weight of the KL to the reference; the first one, with `kl_target`.
        kl_estimator, kl_in: rlhf/kl.py; in every token's reward, or in the loss.
        kl_target: nats a response that the coefficient is steered to (None: it stays); kl_horizon:
            responses over which it adapts.
        gamma, gae_lambda: discount and lambda of the advantages.
        clip_epsilon, clip_epsilon_high: of the ratio, below 1 and above (None: the same).
        dual_clip: c > 1 bounds the loss of a negative advantage (None: no bound).
        value_clip: range of the critic's clipped loss (None: not clipped).
        whiten_advantages: mean 0 and variance 1 over a batch.
        reward_normalisation: "running": scores less the mean of all so far, over their deviation.
        reward_clip: bound of the score after that (None: none).
        missing_eos_penalty: taken from the score of a response that was cut.
        entropy_coefficient: weight of the policy's entropy; needs whole logits in memory.
        pretrain_coefficient: weight of the pre-training loss.
        epochs, minibatches: passes over a batch of rollouts, and parts of a pass.
    """

    actor_learning_rate: float = 1e-6
    critic_learning_rate: float = 5e-6
    kl_coefficient: float = 0.01
    kl_estimator: Estimator = "k1"
    kl_in: Placement = "reward"
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    gamma: float = 1.0
    gae_lambda: float = 0.99
    clip_epsilon: float = 0.2
    clip_epsilon_high: float | None = None
    dual_clip: float | None = None
    value_clip: float | None = None
    whiten_advantages: bool = False
    reward_normalisation: Literal["none", "running"] = "none"
    reward_clip: float | None = None
    missing_eos_penalty: float = 1.0
    entropy_coefficient: float = 0.0
    pretrain_coefficient: float = 0.5
    clip_norm: float = 1.0
    epochs: int = 1
    minibatches: int = 1

    def __post_init__(self) -> None:
        for field, known in (
            ("kl_estimator", get_args(Estimator)),
            ("kl_in", get_args(Placement)),
            ("reward_normalisation", ("none", "running")),
        ):
            if getattr(self, field) not in known:
                raise UserError(
                    f"PPO: {field} is {getattr(self, field)!r}; it is one of {', '.join(known)}"
                )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError(
                "PPO: k1 in the loss has a gradient of expectation 0; take k2 or k3, or "
                "kl_in='reward'"
            )
        for field in ("kl_target", "kl_horizon", "reward_clip", "value_clip", "clip_norm"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise UserError(f"PPO: {field} is {value}; it must be above 0")
        for field in ("epochs", "minibatches"):
            if getattr(self, field) < 1:
                raise UserError(f"PPO: {field} is {getattr(self, field)}; it must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Layouts:
    """The mesh of each of the four models (sharding.py), all over the same devices; empty: one.

    The report runs each model in a layout of its own. Between models go numbers per token only.
    """

    actor: str = ""
    critic: str = ""
    reference: str = ""
    reward: str = ""

    def __post_init__(self) -> None:
        found = {f.name: Layout.parse(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for role, layout in found.items():
            if layout.context > 1:
                raise UserError(
                    f"layouts: {role} has context={layout.context}, which cuts rows; rollouts are "
                    "whole: use fsdp or tensor"
                )
        if len({layout.num_devices for layout in found.values()}) > 1:
            sizes = ", ".join(f"{role} {layout.num_devices}" for role, layout in found.items())
            raise UserError(f"layouts: all models share the devices, but they take {sizes}")

    def use(self, role: str) -> AbstractContextManager:
        """Enters the mesh of a model: "actor", "critic", "reference" or "reward"."""
        return sharding.use(getattr(self, role))
