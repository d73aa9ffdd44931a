"""Sandboxes for tests, and what the host looks like while they run."""

from __future__ import annotations

import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.sandbox.jail import Jail, SandboxError
from internlm2_jax.sandbox.limits import MIB, Limits
from internlm2_jax.sandbox.session import Session

# Small, so that every limit is met quickly.
LIMITS = Limits(
    memory=192 * MIB, processes=12, disk=8 * MIB, file=2 * MIB, open_files=32, output=20_000,
    grace=0.3,
)  # fmt: skip


@pytest.fixture(scope="session")
def isolates() -> None:
    """Skips where this machine cannot isolate, and says why."""
    try:
        Session().close()
    except (UserError, SandboxError) as error:
        pytest.skip(f"no sandbox on this machine: {error}")


@pytest.fixture(scope="module")
def jail(isolates) -> Jail:
    return Jail(LIMITS)


@pytest.fixture
def session(jail):
    with Session(jail) as one:
        yield one
