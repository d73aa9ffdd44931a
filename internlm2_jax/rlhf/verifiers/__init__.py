"""Rewards that a program can verify: mathematics, code, exact answers."""

from internlm2_jax.rlhf.verifiers.checks import Checks, summary
from internlm2_jax.rlhf.verifiers.code import Code, Problem
from internlm2_jax.rlhf.verifiers.maths import Maths
from internlm2_jax.rlhf.verifiers.verdict import Verdict

__all__ = ["Checks", "Code", "Maths", "Problem", "Verdict", "summary"]
