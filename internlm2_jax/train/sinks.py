"""Where metrics go beside JSONL: TensorBoard event files, Weights & Biases."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internlm2_jax.errors import UserError
from internlm2_jax.train.session import Session


class Sink(Protocol):
    def log(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files; those of steps after `first`, from before a kill, are marked as void."""

    def __init__(self, folder: Path, first: int):
        module = _needs("tensorboardX", "--tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=first + 1)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of its own for every stage folder, continued when the stage is."""

    def __init__(self, project: str, folder: Path):
        module = _needs("wandb", "--wandb")
        name = f"{folder.parent.name}-{folder.name}"
        self._run = module.init(
            project=project, name=name, id=name, dir=str(folder), resume="allow"
        )

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


def opened(session: Session, folder: Path, first: int) -> list[Sink]:
    """The sinks that `session` asks for. Errors: UserError that says what to install."""
    sinks: list[Sink] = []
    if session.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", first))
    if session.wandb:
        sinks.append(WandB(session.wandb, folder))
    return sinks


def scalars(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """{"prefix/a/b": number} of a nested row; entries of a list are numbered.

    Text is left out, and NaN: a source that the batch does not have.
    """
    flat: dict[str, float] = {}
    for name, value in row.items():
        path = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            flat |= scalars(value, path)
        elif isinstance(value, (int, float, np.number)) or getattr(value, "ndim", None) == 0:
            if not math.isnan(value):
                flat[path] = float(value)
        elif isinstance(value, (list, np.ndarray)):
            flat |= scalars({f"{i:03}": v for i, v in enumerate(value)}, path)
    return flat


def _needs(module: str, flag: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{flag} needs {module}, which is not installed; pip install {module}, or leave it out"
        ) from error
