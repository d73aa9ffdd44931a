"""The phases of pre-training: what each sets, and which of them a step belongs to."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence, Sized
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from internlm2_jax import sharding
from internlm2_jax.data import mixture
from internlm2_jax.data.mixture import WhenShort
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.errors import UserError
from internlm2_jax.models.build import build
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.remat import Remat
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.objectives import by_source, language_model_loss
from internlm2_jax.train.speed import Work
from internlm2_jax.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of pre-training.

    Attributes:
        name: what plots call it.
        steps: optimizer steps.
        sequence_length: tokens in a packed row (T).
        batch_size: rows in a step (B).
        rope_theta: RoPE base while this phase lasts.
        learning_rate: peak; goes down to `final_ratio` of it within the phase.
        mixture: source -> share of the rows; "short/NAME" is the source's documents cut to
            `short_length`, "long/NAME" those of at least half a row.
        schedule: "cosine" over the whole phase, or "wsd": stable, then `decay` (train/optimizer.py)
            over the last `decay_steps`.
        warmup: steps of linear warm-up at the phase's start.
        ramp: (steps, rows) pairs: smaller batches with which the phase begins.
        epochs: source -> how often its rows may be repeated within the phase, e.g. 2.0.
        when_short: what a source lacks is given to the others ("share") or is an error ("error").
        short_length: documents of a "short/" source are cut to pieces of this many tokens.
        accumulate: parts in which the rows of a step are taken, one after another.
        weight_decay, clip_norm, z_loss: of the optimizer and the loss.
    """

    name: str
    steps: int
    sequence_length: int
    batch_size: int
    rope_theta: float
    learning_rate: float
    mixture: Mapping[str, float]
    final_ratio: float = 1.0
    warmup: int = 0
    short_length: int = 128
    accumulate: int = 1
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: optimizers.Decay = "exponential"
    decay_steps: int = 0
    ramp: Sequence[tuple[int, int]] = ()
    epochs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    when_short: WhenShort = "share"
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd"):
            raise UserError(f"phase {self.name!r}: schedule is {self.schedule!r}; cosine or wsd")
        if self.schedule == "cosine" and self.decay_steps:
            raise UserError(
                f"phase {self.name!r}: decay_steps need schedule='wsd'; a cosine falls all along"
            )
        if sum(steps for steps, _ in self.ramp) > self.steps:
            raise UserError(f"phase {self.name!r}: its ramp is longer than its {self.steps} steps")

    @property
    def rows(self) -> int:
        """Rows of all steps."""
        ramped = sum(steps for steps, _ in self.ramp)
        small = sum(steps * size for steps, size in self.ramp)
        return small + (self.steps - ramped) * self.batch_size

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence_length

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every number of rows that a step may have."""
        return self.batch_size, *(size for _, size in self.ramp)

    def parts(self, rows: int) -> int:
        """In how many parts a batch of so many rows is taken: none larger than of a whole one."""
        return max(1, -(-rows * self.accumulate // self.batch_size))

    def model(self, config: ModelConfig) -> ModelConfig:
        """`config` with the RoPE base and the length of this phase."""
        return dataclasses.replace(
            config, rope_theta=self.rope_theta, max_position_embeddings=self.sequence_length
        )

    def shares(self, rows: Mapping[str, Sized]) -> dict[str, float]:
        """The part of each source, no more often than `epochs` allows."""
        return mixture.limited(
            {name: self.mixture[name] for name in rows},
            {name: len(source) for name, source in rows.items()},
            self.epochs,
            total=self.rows,
            row_length=self.sequence_length,
            when_short=self.when_short,
            label=f"phase {self.name!r}",
        )

    def learning_rates(self) -> optimizers.Schedule:
        """The learning rate over the phase's own steps."""
        if self.schedule == "cosine":
            return optimizers.warmup_cosine(
                self.learning_rate, self.steps, warmup=self.warmup, final_ratio=self.final_ratio
            )
        return optimizers.warmup_stable_decay(
            self.learning_rate,
            self.steps,
            decay=self.decay,
            decay_steps=self.decay_steps,
            warmup=self.warmup,
            final_ratio=self.final_ratio,
        )


class Course:
    """Phases one after another: what is read at a step, by which model, and how it learns.

    Attributes:
        rows: source -> its packed rows, of each phase.
        models: of each phase; they differ in RoPE base and length, not in parameters.
        batches: of each phase.
        optimizers: of each phase, of one kind of state, so that it goes from phase to phase.
        ends: steps done when each phase ends.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        config: ModelConfig,
        rows: Sequence[Mapping[str, Any]],
        *,
        layout: str,
        remat: Remat,
        width_ratio: float,
        seed: int,
    ) -> None:
        """
        Args:
            layout, remat, seed: as in `pretrain`.
            width_ratio: the model's width over the one its learning rates are for (muP).
        Errors: UserError when a batch or the model does not divide over the layout, or a source is
            too small for its phase.
        """
        self.phases, self.rows, self.remat = phases, rows, remat
        self.batches = [
            Batches(
                of_phase,
                phase.shares(of_phase),
                batch_size=phase.batch_size,
                ramp=phase.ramp,
                seed=seed + i,
            )
            for i, (phase, of_phase) in enumerate(zip(phases, rows, strict=True))
        ]
        self.models = [build(phase.model(config)) for phase in phases]
        self.ends = list(itertools.accumulate(phase.steps for phase in phases))
        self.schedule = optimizers.join(
            [p.learning_rates() for p in phases], [p.steps for p in phases]
        )
        self.optimizers = [
            optimizers.adamw(
                self.schedule,
                weight_decay=phase.weight_decay,
                clip_norm=phase.clip_norm,
                width_ratio=width_ratio,
            )
            for phase in phases
        ]
        mesh = sharding.Layout.parse(layout)
        for model, phase in zip(self.models, phases, strict=True):
            for size in phase.batch_sizes:
                parts = phase.parts(size)
                if size % parts:
                    raise UserError(
                        f"phase {phase.name!r}: a batch of {size} rows does not divide into "
                        f"{parts} parts; change batch_size, ramp or accumulate"
                    )
                mesh.check(
                    model.axes, model.abstract, batch=size // parts, length=phase.sequence_length
                )
        self._step = functools.cache(self._compiled)

    @property
    def steps(self) -> int:
        return self.ends[-1]

    def locate(self, step: int) -> tuple[int, int]:
        """(number of the phase, step within it)."""
        i = bisect.bisect_right(self.ends, step)
        return i, step - (self.ends[i] - self.phases[i].steps)

    def work(self, step: int) -> Work:
        """Tokens and operations of a step."""
        i, own = self.locate(step)
        length = self.phases[i].sequence_length
        tokens = self.batches[i].size(own) * length
        return Work(tokens, tokens * self.models[i].cfg.train_flops(length))

    def read(self, step: int, skipped: int, mesh: Mesh) -> dict[str, np.ndarray]:
        """This process's rows of a batch of the mesh, when `skipped` were left out of the phase."""
        i, own = self.locate(step)
        own += skipped
        return self.batches[i](own, sharding.local_rows(self.batches[i].size(own), mesh))

    def place(self, rows: dict[str, np.ndarray], step: int, skipped: int) -> dict[str, jax.Array]:
        """What `read` gave, on the mesh in use."""
        i, own = self.locate(step)
        return sharding.place_rows(rows, self.batches[i].size(own + skipped))

    def train(
        self, step: int, state: dict[str, Any], batch: dict[str, jax.Array]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the state after the step, what it measured)."""
        i, _ = self.locate(step)
        rows = len(batch["tokens"])
        state, measured = self._step(i, self.phases[i].parts(rows))(state, batch)
        return state, {
            **by_source(measured, self.batches[i].names),
            "phase": self.phases[i].name,
            "learning_rate": self.schedule(step),
            "batch_size": rows,
        }

    def _compiled(self, i: int, parts: int) -> Any:
        phase, sources = self.phases[i], len(self.batches[i].names)
        loss = language_model_loss(self.models[i], phase.z_loss, self.remat, sources)
        return make_train_step(loss, self.optimizers[i], accumulate=parts)
