"""GRPO's update as a compiled function of (state, batch), and the batch out of groups of rollouts.

The state is {"params", "opt_state"} of the policy. A batch holds tokens [B, W] and, for the steps
that predict tokens 1 .. W - 1, mask and logprobs [B, W - 1] (and reference, with a KL); advantages
[B]. Rows of a group lie side by side: B = P * G.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.models.remat import Remat
from internlm2_jax.rlhf import groups
from internlm2_jax.rlhf.group_loss import Aggregate, grpo_loss
from internlm2_jax.rlhf.ppo import next_token_logprobs
from internlm2_jax.rlhf.rollout import Rollout
from internlm2_jax.rlhf.verifiers import Verdict
from internlm2_jax.train import optimizer as optimizers

State = dict[str, Any]
Batch = dict[str, Any]
COLUMNS = 32


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Hyper-parameters of the update. The defaults are DAPO's and Dr. GRPO's where they agree with
    what MiniCPM4 and MiMo report (clip-higher, token-level loss, dynamic sampling, no KL); MiMo's
    clip range is not published, so 0.2 and 0.28 are DAPO's.

    Attributes:
      advantage_scale: "std" divides by the group's deviation (GRPO), "none" does not (Dr. GRPO).
      aggregate: how tokens are weighed, see rlhf.group_loss.py.
      kl_coefficient: of k3 against the reference, in the loss; 0 needs no reference model.
      dynamic_rounds: how often, at most, prompts are drawn until there are enough groups whose
        responses do not all fare alike; 1 draws once and keeps all groups.
      overlong: "keep" scores a cut response as it is, "mask" leaves it out of the loss.
      overlong_buffer, overlong_weight: length before the limit over which a penalty grows to
        `overlong_weight`; 0 for none.
      warmup: updates over which the learning rate grows from 0: Adam's first steps are as large as
        any, whatever the gradient.
      epochs, minibatches: updates of one batch.
      remat: what a block keeps for its gradient (models/remat.py).
    """

    learning_rate: float = 1e-6
    warmup: int = 0
    clip_low: float = 0.2
    clip_high: float = 0.28
    advantage_scale: groups.Scale = "std"
    aggregate: Aggregate = "token"
    kl_coefficient: float = 0.0
    dynamic_rounds: int = 4
    overlong: Literal["keep", "mask"] = "keep"
    overlong_buffer: int = 0
    overlong_weight: float = 1.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    epochs: int = 1
    minibatches: int = 1
    remat: Remat = "full"

    def __post_init__(self) -> None:
        for name, choices in (("advantage_scale", ("std", "none")), ("overlong", ("keep", "mask"))):
            if getattr(self, name) not in choices:
                raise UserError(f"grpo: {name} is {getattr(self, name)!r}, not of {choices}")
        for name in ("dynamic_rounds", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise UserError(f"grpo: {name} is {getattr(self, name)}; it must be 1 or more")


@dataclasses.dataclass
class Group:
    """The responses to one prompt: rows of a `Rollout` with what was said of them.

    Attributes: rewards [G] float32; valid [G] bool, False where it could not be judged.
    """

    row: Mapping[str, Any]
    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    finished: np.ndarray
    texts: list[str]
    verdicts: list[Verdict]
    rewards: np.ndarray
    valid: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[G] tokens of the responses."""
        return self.mask.sum(axis=1)

    @property
    def solved(self) -> float:
        """Share of the valid responses that pass; 0 when none is valid."""
        right = [v.outcome == "pass" for v in self.verdicts]
        return float(np.sum(right) / max(1, self.valid.sum()))

    @property
    def useful(self) -> bool:
        """Whether its rewards differ."""
        return bool(groups.spread(self.rewards[None], self.valid[None])[0])


def grouped(
    rows: Sequence[Mapping[str, Any]],
    sampled: Rollout,
    texts: Sequence[str],
    verdicts: Sequence[Verdict],
    config: GRPOConfig,
    longest: int,
) -> list[Group]:
    """Groups out of a rollout of `len(rows)` prompts, each sampled as often; length is scored."""
    size = len(texts) // len(rows)
    found = []
    for i, row in enumerate(rows):
        part = slice(i * size, (i + 1) * size)
        judged = list(verdicts[part])
        valid = np.array([v.reward is not None for v in judged])
        scores = np.array([v.reward or 0.0 for v in judged], np.float32)
        lengths = sampled.lengths[part]
        scores += config.overlong_weight * groups.overlong_penalty(
            lengths, longest=longest, buffer=config.overlong_buffer
        )
        found.append(
            Group(
                row,
                sampled.tokens[part],
                sampled.mask[part],
                sampled.logprobs[part],
                sampled.finished[part],
                list(texts[part]),
                judged,
                scores,
                valid,
            )
        )
    return found


def collect(
    draw: Callable[[int], list[Group]], wanted: int, rounds: int
) -> tuple[list[Group], list[Group], int]:
    """(`wanted` groups to learn from, all groups drawn, rounds taken); `draw(n)` samples n groups.

    With one round every group is taken. With more, only useful ones are, and what is missing is
    drawn again; when the rounds are over the rest is filled with others, which `to_batch` masks.
    """
    drawn = draw(wanted)
    if rounds == 1:
        return drawn, drawn, 1
    taken = 1
    while (missing := wanted - sum(g.useful for g in drawn)) > 0 and taken < rounds:
        drawn = drawn + draw(missing)
        taken += 1
    in_order = sorted(drawn, key=lambda group: not group.useful)  # stable: useful ones come first
    return in_order[:wanted], drawn, taken


def to_batch(chosen: Sequence[Group], config: GRPOConfig) -> Batch:
    """The rows of the update, numpy. A response is masked as a whole where it could not be judged,
    where it was cut and `overlong` is "mask", and, under dynamic sampling, in a useless group.

    Columns that no response reaches are left out, in steps of COLUMNS: few widths are compiled.
    """
    rewards, valid = (np.stack([getattr(g, n) for g in chosen]) for n in ("rewards", "valid"))
    advantages = groups.group_advantages(rewards, valid, scale=config.advantage_scale)
    heard = valid.copy()
    if config.overlong == "mask":
        heard &= np.stack([g.finished for g in chosen])
    if config.dynamic_rounds > 1:
        heard &= groups.spread(rewards, valid)[:, None]
    tokens, mask, logprobs = (
        np.concatenate([getattr(g, name) for g in chosen])
        for name in ("tokens", "mask", "logprobs")
    )
    reached = 1 + max(np.flatnonzero(mask.any(axis=0)), default=0)  # of the steps; one more token
    width = min(tokens.shape[1], -(-(reached + 1) // COLUMNS) * COLUMNS)
    return {
        "tokens": tokens[:, :width],
        "mask": mask[:, : width - 1] & heard.reshape(-1, 1),
        "logprobs": logprobs[:, : width - 1],
        "advantages": advantages.reshape(-1),
    }


class GroupUpdates:
    """The compiled parts of GRPO for `model`; `longest` is the limit of a response in tokens."""

    def __init__(self, model: Any, config: GRPOConfig, longest: int):
        self._model, self._config, self._longest = model, config, longest
        rate = optax.warmup_constant_schedule(0.0, config.learning_rate, config.warmup)
        self._optimizer = optimizers.adamw(
            rate if config.warmup else config.learning_rate,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
        )

    def init(self, params: Any) -> State:
        """The state before the first update; it owns a copy, so that updates may donate it."""
        params = jax.tree.map(jnp.copy, params)
        return {"params": params, "opt_state": self._optimizer.init(params)}

    def minibatches(self, batch: Batch, seed: int) -> Iterator[Batch]:
        """`epochs` passes over `batch` in `minibatches` equal parts, shuffled by `seed`.

        Errors: UserError when the rows do not divide.
        """
        count = len(batch["tokens"])
        if count % self._config.minibatches:
            raise UserError(
                f"grpo: {count} responses do not divide into {self._config.minibatches} minibatches"
            )
        for epoch in range(self._config.epochs):
            order = np.arange(count)
            if self._config.minibatches > 1:
                order = np.random.default_rng([seed, epoch]).permutation(count)
            for part in np.split(order, self._config.minibatches):
                yield {name: values[part] for name, values in batch.items()}

    def logprobs(self, params: Any, tokens: np.ndarray) -> np.ndarray:
        """[B, W - 1] on the host, of tokens [B, W]; `params` rest on the mesh in use."""
        return sharding.fetch(self._logprobs(params, sharding.place_rows(tokens)))

    @functools.partial(jax.jit, static_argnums=0)
    def _logprobs(self, params: Any, tokens: jax.Array) -> jax.Array:
        return next_token_logprobs(self._model, params, tokens)

    def update(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step of the policy, on the mesh in use; `batch` is on the host, `state` donated."""
        return self._step(state, sharding.place_rows(batch))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:

        def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return grpo_loss(
                next_token_logprobs(self._model, params, batch["tokens"], self._config.remat),
                batch["logprobs"],
                batch["advantages"],
                batch["mask"],
                clip_low=self._config.clip_low,
                clip_high=self._config.clip_high,
                aggregate=self._config.aggregate,
                longest=self._longest,
                reference_logprobs=batch.get("reference"),
                kl_coefficient=self._config.kl_coefficient,
            )

        grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"])
        updates, opt_state = self._optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
        return {"params": params, "opt_state": opt_state}, metrics
