"""Several runs on one page: what differs, seeds as bands, phases behind the curves."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.report import compare
from internlm2_jax.report.load import Run, Series


@pytest.fixture
def runs(whole_run, tmp_path):
    """Three copies of a run: two seeds of one setting, and another setting."""
    made = []
    for name, rate, seed, loss in (("a", 1, 0, 3.0), ("b", 1, 1, 3.2), ("c", 2, 0, 2.5)):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(whole_run / "pipeline.json", folder)
        files.write_json(
            folder / "pipeline.json", files.read_json(folder / "pipeline.json") | {"name": name}
        )
        for stage in ("pretrain", "sft"):
            shutil.copytree(whole_run / stage, folder / stage)
        files.atomic_write(
            folder / "config.txt",
            f"pretrain.phases[0].rate = {rate}\npretrain.seed = {seed}\npretrain.same = 'x'\n",
        )
        result = files.read_json(folder / "pretrain" / "result.json")
        files.write_json(folder / "pretrain" / "result.json", result | {"validation_loss": loss})
        rows = files.read_jsonl(folder / "pretrain" / "metrics.jsonl")
        files.write_jsonl(
            folder / "pretrain" / "metrics.jsonl", [r | {"loss": r["loss"] + seed} for r in rows]
        )
        made.append(folder)
    return made


def test_runs_that_differ_in_seeds_are_one_variant(runs):
    found = compare.variants([Run(run) for run in runs])
    assert [(v.label, [r.name for r in v.runs]) for v in found] == [
        ("rate 1", ["a", "b"]), ("rate 2", ["c"])
    ]  # fmt: skip
    (one, two) = compare.lines(found, "pretrain", "loss", "validation")
    assert one.low is not None and two.low is None
    np.testing.assert_allclose(one.high - one.low, 1)
    np.testing.assert_allclose(one.series.y - two.series.y, 0.5)


def test_a_mean_is_over_the_steps_of_all():
    line = compare.over_seeds(
        [
            Series(np.array([1.0, 2, 3]), np.array([5.0, 4, 3])),
            Series(np.array([2.0, 3, 4]), np.array([2.0, 1, 0])),
        ]
    )
    assert line.series.x.tolist() == [2, 3] and line.series.y.tolist() == [3, 2]
    assert line.low.tolist() == [2, 1] and line.high.tolist() == [4, 3]


def test_page(runs, tmp_path):
    path = compare.build(runs, tmp_path / "out" / "page.html")
    page = path.read_text()
    expected = ("rate 1 · rate 2", "pretrain.phases[0].rate", "3.10 ± 0.14", "Results that differ")
    for text in (*expected, "SFT", "Learning rate", "Phases:"):
        assert text in page, text
    assert "pretrain.same" not in page
    assert compare.build(runs, tmp_path / "again.html").read_text() == page


def test_phases_are_marked_in_every_chart_of_pretraining(runs):
    found = compare.variants([Run(run) for run in runs])
    spans, note = compare.spans(found, "pretrain")
    assert len(spans) == 3 and "longest run" not in note
    result = files.read_json(runs[2] / "pretrain" / "result.json")
    result["phases"][-1]["last_step"] += 100
    files.write_json(runs[2] / "pretrain" / "result.json", result)
    longer, note = compare.spans(found, "pretrain")
    assert longer[-1].stop == spans[-1].stop + 100 and "longest run" in note


def test_half_finished_and_unknown_runs(runs, tmp_path):
    shutil.rmtree(runs[2] / "pretrain")
    (runs[2] / "config.txt").unlink()
    page = compare.build(runs, tmp_path / "p.html").read_text()
    assert "variant" in page or "c" in page
    with pytest.raises(UserError, match="two or more different run folders"):
        compare.build([runs[0], runs[0] / "../a"], tmp_path / "p.html")
    with pytest.raises(UserError, match="is not a run folder"):
        compare.build([runs[0], tmp_path / "none"], tmp_path / "p.html")


def test_labels():
    paths = ["a.0.rate", "a.1.rate", "b.size"]
    assert [compare._short(p, paths) for p in paths] == ["0.rate", "1.rate", "size"]
    assert compare.mean_and_spread([4.5]) == "4.50"
