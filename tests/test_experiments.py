"""Every experiment's resolved settings are golden text: a changed default shows up as a diff.

After a wanted change:  internlm2 run EXPERIMENT --dry-run > tests/golden/NAME.txt
"""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm2_jax import config
from internlm2_jax.stages import Pipeline

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "experiments" / "notebooks"  # tests/test_ablation.py runs them
EXPERIMENTS = sorted(
    path for path in (ROOT / "experiments").rglob("*.py") if path.parent != NOTEBOOKS
)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_golden_settings(path):
    golden = ROOT / "tests" / "golden" / f"{path.parent.name}_{path.stem}.txt"
    assert config.text(config.load(path)) == golden.read_text()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
@pytest.mark.parametrize("function", ["experiment", "tiny"])
def test_builds_a_pipeline_and_says_how_to_run_it(path, function):
    built = config.build(config.load(path, function=function))
    assert isinstance(built, Pipeline)
    assert str(path.relative_to(ROOT)) in (config.module(path).__doc__ or "")
