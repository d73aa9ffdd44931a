"""Untrusted Python, cut off from the machine: batches (`run_many`) and sessions that keep state."""

from internlm2_jax.sandbox.jail import Jail, SandboxError
from internlm2_jax.sandbox.limits import Limits
from internlm2_jax.sandbox.pool import Program, run_many
from internlm2_jax.sandbox.session import Result, Session, require

__all__ = ["Jail", "Limits", "Program", "Result", "SandboxError", "Session", "require", "run_many"]
