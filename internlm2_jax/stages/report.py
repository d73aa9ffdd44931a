"""The HTML page of a run, as its last stage."""

from __future__ import annotations

from pathlib import Path

from internlm2_jax import report as reports


def report(folder: Path, *, after: Path) -> None:
    """Writes report.html into the run folder; `after` is the stage that must be done first."""
    reports.build(folder.parent)
