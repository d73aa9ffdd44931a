"""The section on verified rewards: curves, time, answers, for a run that is done or not."""

from __future__ import annotations

import math

import pytest

from internlm2_jax import files
from internlm2_jax.report import build
from internlm2_jax.report.blocks import Fold, Grid, Picture
from internlm2_jax.report.grpo import grpo, headlines
from internlm2_jax.report.load import ABSENT, DONE, UNFINISHED, Run


@pytest.fixture
def folder(tmp_path):
    """A run of thirty invented iterations."""
    files.write_json(tmp_path / "pipeline.json", {"name": "sums", "stages": ["sft", "grpo"]})
    stage = tmp_path / "grpo"
    rows = [
        {
            "split": "train", "step": step, "pass_rate": 0.2 + step / 50,
            "zero_variance": 0.5, "response_length": 3.0 + math.sin(step), "ratio_at_start": 1.0,
        }
        for step in range(1, 31)
    ]  # fmt: skip
    rows += [{"split": "validation", "step": s, "pass_rate": s / 40} for s in (10, 20, 30)]
    files.write_jsonl(stage / "metrics.jsonl", rows)
    spent = {"rollout": 0.6, "scoring": 0.1, "update": 0.3}
    files.write_jsonl(stage / "timing.jsonl", [{"step": s, **spent} for s in range(1, 31)])
    sample = {"prompt": "3 + 5 = <b>", "response": "", "outcome": "fail", "score": 0, "solved": 0.5}
    files.write_jsonl(stage / "samples.jsonl", [{"step": 30, **sample}])
    return tmp_path


def test_an_unfinished_run_shows_what_it_logged(folder):
    section = grpo(Run(folder))
    assert section.status == UNFINISHED
    grid = next(block for block in section.blocks if isinstance(block, Grid))
    titles = [chart.title for chart in grid.blocks if isinstance(chart, Picture)]
    assert titles[0].startswith("Pass rate: 24") and "→" in titles[0]
    assert titles[-1] == "Rollout takes 60 % of an iteration" or "60" in titles[-1]
    assert any(isinstance(block, Fold) for block in section.blocks)
    assert headlines(Run(folder)) == []


def test_a_finished_run_has_its_headline(folder):
    files.write_json(folder / "grpo" / "done.json", {"fingerprint": "0", "wall_seconds": 3.0})
    files.write_json(
        folder / "grpo" / "result.json",
        {
            "iterations": 30,
            "pass_rate_first": 0.25,
            "pass_rate_last": 0.75,
            "held_out_pass_rate": 0.7,
        },
    )
    assert grpo(Run(folder)).status == DONE
    (found,) = headlines(Run(folder))
    assert found.name == "GRPO" and "25" in found.number and "70" in found.reading
    page = build(folder).read_text()
    assert "3 + 5 = &lt;b&gt;" in page and "(empty)" in page


def test_a_run_without_it_says_so(tmp_path):
    files.write_json(tmp_path / "pipeline.json", {"name": "other", "stages": ["sft"]})
    assert grpo(Run(tmp_path)).status == ABSENT
