"""Arms of an alignment ablation: means, intervals, and a section in the comparison."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from internlm2_jax import files
from internlm2_jax.evals.intervals import student
from internlm2_jax.report import alignment, compare
from internlm2_jax.report.blocks import percent
from internlm2_jax.report.intervals import said
from internlm2_jax.report.load import Run

GOOD = {"sft": [0.2, 0.3, 0.25], "cool": [0.5, 0.7, 0.6]}


@pytest.fixture
def runs(tmp_path):
    found = []
    for arm, values in GOOD.items():
        for seed, good in enumerate(values):
            run = tmp_path / f"{arm}-{seed}"
            gold = {"good": good, "win_rate": good, "task_accuracy": good}
            files.write_json(
                run / "judge_policy/result.json", {"arm": arm, "gold": gold, "length": 4.0 + seed}
            )
            files.atomic_write(run / "config.txt", f"judge_policy.arm = {arm!r}\nseed = {seed}\n")
            files.write_json(run / "pipeline.json", {"stages": ["judge_policy"], "name": run.name})
            if arm == "cool":  # its PPO lies in rounds
                rounds = run / "cool_rlhf"
                files.write_json(rounds / "pipeline.json", {"stages": ["ppo_round1", "ppo_round2"]})
                for r in (1, 2):
                    rows = [{"step": s, "reward": s + r, "kl": 0.1 * s} for s in (1, 2, 3)]
                    files.write_jsonl(rounds / f"ppo_round{r}/metrics.jsonl", rows)
                files.write_json(
                    run / "pipeline.json",
                    {"stages": ["cool_rlhf", "judge_policy"], "name": run.name},
                )
            found.append(Run(run))
    return found


def test_an_interval_of_shares_holds_shares_only():
    found = student([0.04, 0.29, 0.31], 0.0, 1.0)
    assert found.low == 0.0 < found.mean < found.high < 1.0
    assert student([0.0, 0.9, 1.0], 0.0, 1.0).high == 1.0


def test_intervals_are_students():
    values = GOOD["cool"]
    found = student(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((0.6, low, high))
    alone = student([0.5])
    assert (alone.low, alone.high, said(alone, percent)) == (0.5, 0.5, "50 %")


def test_the_comparison_has_a_table_and_charts_of_the_arms(runs, tmp_path):
    section = alignment.alignment(runs)
    table, grid = section.blocks
    assert table.head == ["Measure", "sft", "cool"]
    assert table.rows[0][1].startswith("25 % [") and table.rows[0][2].startswith("60 % [")
    titles = [picture.title for picture in grid.blocks]
    assert "Good answers, all held-out prompts" in titles
    assert "Reward at the end: cool 5" in titles  # both rounds, one after the other
    page = compare.build([run.folder for run in runs], tmp_path / "page.html").read_text()
    assert "The arms, where the truth is known" in page


def test_runs_without_arms_have_no_such_section(tmp_path):
    files.write_json(tmp_path / "pipeline.json", {"stages": [], "name": "x"})
    assert not alignment.alignment([Run(tmp_path)]).blocks
