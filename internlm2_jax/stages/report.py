"""The HTML page of a run, as its last stage."""

from __future__ import annotations

from pathlib import Path


def report(folder: Path, *, after: Path) -> None:
    """Writes report.html into the run folder; `after` is the stage that must be done first."""
    from internlm2_jax import report as reports  # here: it imports matplotlib

    reports.build(folder.parent)
