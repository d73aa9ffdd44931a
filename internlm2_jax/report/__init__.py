"""One self-contained HTML page about a run, made from the files in its folder and nothing else."""

from internlm2_jax.report.page import build

__all__ = ["build"]
