"""Self-contained HTML pages about a run, or several, made from the files in their folders alone."""

from internlm2_jax.report.page import build

__all__ = ["build"]
