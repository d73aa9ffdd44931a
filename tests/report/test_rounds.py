"""Rounds of PPO joined from their stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm2_jax import files
from internlm2_jax.report import rounds
from internlm2_jax.report.load import DONE, UNFINISHED, Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two rounds of five iterations, two of them warm-up, and a patch between them."""
    names = ["ppo_round1", "reward_patch", "ppo_round2"]
    files.write_json(tmp_path / "pipeline.json", {"stages": names})
    for number, stage in ((1, names[0]), (2, names[2])):
        rows = [{"step": i, "round": number, "warmup": i < 3, "reward": i} for i in range(1, 6)]
        files.write_jsonl(tmp_path / stage / "metrics.jsonl", rows)
        files.write_json(tmp_path / stage / "result.json", {"round": number})
        files.write_json(tmp_path / stage / "done.json", {})
    files.write_json(tmp_path / names[1] / "result.json", {"hacking": {"num_pairs": 40}})
    return tmp_path


def test_steps_run_on_and_spans_meet(folder):
    found = rounds.load(Run(folder))
    assert found.status == DONE
    assert [row.number("step") for row in found.rows] == list(range(1, 11))
    assert [(s.start, s.stop, s.label, s.shaded) for s in found.spans] == [
        (1, 3, "warm-up", True), (3, 6, "round 1", False),
        (6, 8, "warm-up", True), (8, 10, "round 2", False),
    ]  # fmt: skip


def test_a_patch_is_marked_where_the_next_round_begins_if_it_had_pairs(folder):
    assert [mark.x for mark in rounds.load(Run(folder)).marks] == [6]
    files.write_json(folder / "reward_patch" / "result.json", {"hacking": {"num_pairs": 0}})
    assert rounds.load(Run(folder)).marks == []


def test_a_second_round_that_only_began_is_unfinished(folder):
    for name in ("done.json", "result.json"):
        (folder / "ppo_round2" / name).unlink()
    found = rounds.load(Run(folder))
    assert found.status == UNFINISHED
    assert len(found.rows) == 10
    assert [one.name for one in found.rounds] == ["1", "ppo_round2"]
