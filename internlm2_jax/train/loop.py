"""The one training loop: pre-training, SFT, reward model and PPO all run through `fit`.

Everything a step sees is a function of the state and the step number, so that a killed run which
continues from a checkpoint repeats the very numbers of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from internlm2_jax.errors import UserError
from internlm2_jax.progress import Progress
from internlm2_jax.train.checkpoint import Checkpoints
from internlm2_jax.train.metrics import MetricsLog

State = dict[str, Any]


def fit(
    folder: str | Path,
    state: State,
    train: Callable[[int, State], tuple[State, dict[str, Any]]],
    *,
    steps: int,
    label: str,
    unit: str = "step",
    shown: tuple[str, ...] = ("loss",),
    log_every: int = 10,
    validate: Callable[[int, State], dict[str, Any]] | None = None,
    validate_every: int = 0,
    checkpoint_every: int = 100,
    milestones: Collection[int] = (),
    keep: int = 2,
) -> State:
    """Runs `train(step, state) -> (state, metrics)` for steps 0 .. `steps` - 1, and resumes.

    Args:
        folder: the stage's folder; metrics.jsonl and checkpoints/ appear in it.
        state: the initial state, a dict of pytrees; also the shape of what is restored.
        train: one step; metrics are scalars or plain values. A list of rows under "samples" goes to
            samples.jsonl instead.
        shown: names of metrics to show beside the progress count.
        log_every: a metrics row every so many steps, and after the last one.
        validate: called as `validate(steps_done, state)`; its values are logged as a row with
            split "validation" every `validate_every` steps and after the last one (0: never).
        checkpoint_every: steps between checkpoints; one is always written after the last step.
        milestones: numbers of steps done after which to validate and save as well.

    Returns the final state. Errors: UserError when the loss is not finite, or the disk is full.
    """
    # ---------------------------------------------------------------- resume
    checkpoints, metrics = (
        Checkpoints(folder, keep=keep),
        MetricsLog(Path(folder) / "metrics.jsonl"),
    )
    samples = MetricsLog(Path(folder) / "samples.jsonl")
    first, state = checkpoints.restore_latest(state)
    metrics.rewind(first)
    samples.rewind(first)

    with Progress(label, steps, unit, done=first) as progress:
        if first:
            progress.note(f"continues after {unit} {first}")
        for step in range(first, steps):
            # -------------------------------------------------------- train
            state, values = train(step, state)
            done = step + 1
            mark = done == steps or done in milestones
            loss = values.get("loss")
            if loss is not None and not np.isfinite(loss):
                raise UserError(
                    f"{label}: loss is {float(loss)} after {unit} {done}; "
                    f"lower the learning rate or look at the batch of that step"
                )
            progress.update(**{k: _number(values[k]) for k in shown if k in values})

            # ---------------------------------------------------------- log
            for row in values.pop("samples", ()):
                samples.log(done, **row)
            if mark or done % log_every == 0:
                metrics.log(done, split="train", **values)
            if validate and validate_every and (mark or done % validate_every == 0):
                measured = validate(done, state)
                metrics.log(done, split="validation", **measured)

            # --------------------------------------------------- checkpoint
            if mark or done % checkpoint_every == 0:
                checkpoints.save(done, state)
    checkpoints.close()
    return state


def _number(value: Any) -> Any:
    return float(value) if hasattr(value, "item") else value
