"""How a run is watched: what the person who starts it asks for, and no number depends on.

Not a keyword of a stage, so it is no part of a stage's fingerprint: a run may be continued with
another profiler window. `fit` looks it up:

    with session.use(Session(profile=(50, 55))):
        pipeline.run(folder)
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator

from internlm2_jax.errors import RESTART, UserError


@dataclasses.dataclass(frozen=True)
class Session:
    """Attributes:
    profile: first and last + 1 of the steps to trace, counted as a row of metrics counts them.
    tensorboard: write event files beside metrics.jsonl.
    wandb: project to send metrics to; empty for none.
    hang_seconds: how long one phase may last before the process is ended; 0 for ever.
    hang_status: exit status of that.
    """

    profile: tuple[int, int] | None = None
    tensorboard: bool = False
    wandb: str = ""
    hang_seconds: float = 0.0
    hang_status: int = RESTART


_current: contextvars.ContextVar[Session] = contextvars.ContextVar("session")
_UNWATCHED = Session()


@contextlib.contextmanager
def use(session: Session) -> Iterator[None]:
    """Everything in the body is run under `session`."""
    token = _current.set(session)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Session:
    return _current.get(_UNWATCHED)


def parse_window(text: str) -> tuple[int, int]:
    """`50:55`: the steps from 50 up to, not including, 55."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 0 < int(match.group(1)) < int(match.group(2)):
        raise UserError(
            f"--profile {text!r} is not of the form FIRST:STOP, with 0 < FIRST < STOP; "
            "write it like 50:55"
        )
    return int(match.group(1)), int(match.group(2))
