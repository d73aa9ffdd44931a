"""Pages of ablations: arms with intervals, needles over length, contamination."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from internlm2_jax import files
from internlm2_jax.report import compare, contamination, needle, page
from internlm2_jax.report.arms import arms
from internlm2_jax.report.load import Run

LOSSES = {"mha": [3.0, 3.2, 3.1], "mqa": [3.3, 3.5, 3.4]}


def make_run(folder, name, results):
    for stage, result in results.items():
        files.write_json(folder / name / stage / "result.json", result)
        files.write_json(folder / name / stage / "done.json", {"wall_seconds": 1.0})
    files.write_json(folder / name / "pipeline.json", {"name": name, "stages": list(results)})
    return folder / name


def needle_result(arm: str, means: list[float]) -> dict:
    grid = [means, means]
    series = {
        "scores": {"keyword": grid, "edit": grid, "needlebench": grid}, "mean": means,
        "low": [m / 2 for m in means], "high": means, "effective_length": 1024,
    }  # fmt: skip
    return {
        "arm": arm, "score": "keyword", "threshold": 0.85, "repeats": 4, "rope": "none",
        "trained_length": 128, "lengths": [128, 1024], "depths": [0, 100],
        "series": {"pairs, 1 needle": series},
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    return [
        make_run(
            tmp_path, f"{arm}-{seed}",
            {"measure": {"arm": arm, "measures": {
                "loss": loss, "num_params": 1000, "dropped/filter": 0.25, "loss/text": loss}},
             "needle": needle_result(arm, [1.0, loss / 10])},
        )
        for arm, losses in LOSSES.items() for seed, loss in enumerate(losses)
    ]  # fmt: skip


def test_runs_are_called_by_their_arms(runs, tmp_path):
    def labels(folders):
        return [variant.label for variant in compare.variants([Run(f) for f in folders])]

    assert labels(runs[::3]) == list(LOSSES)
    asked = {a: {"needle": needle_result(a, [1.0, 0.5])} for a in ("long phase", "short only")}
    assert labels([make_run(tmp_path, *one) for one in asked.items()]) == list(asked)


def test_arms_are_means_over_seeds_with_students_interval(runs):
    section = arms([Run(r) for r in runs])
    table, grid = section.blocks
    rows = {row[0].text: row[1:] for row in table.rows}
    half = stats.t.ppf(0.975, 2) * np.std(LOSSES["mha"], ddof=1) / 3**0.5
    assert rows["loss"][0] == f"3.10 [{3.1 - half:.2f}, {3.1 + half:.2f}]"
    assert list(rows["num_params"]) == ["1,000", "1,000"]
    assert list(rows["dropped/filter"]) == ["25 %", "25 %"]
    assert [row[0].text for row in table.rows][:2] == ["loss", "loss/text"]
    assert table.head == ["Measure", "mha", "mqa"] and "mha: 3; mqa: 3" in table.note
    assert [block.title for block in grid.blocks] == ["Loss", "Loss, text"]


def test_a_sweeps_page_has_arms_and_needles(runs, tmp_path):
    text = compare.build(runs, tmp_path / "page.html").read_text()
    assert "What the arms come to" in text and "Mean score over length" in text
    assert re.search(r"Effective length of every run", text)
    plain = [make_run(tmp_path, f"plain-{i}", {"pretrain": {"loss": i}}) for i in range(2)]
    text = compare.build(plain, tmp_path / "plain.html").read_text()
    assert "arms" not in text and "Needle" not in text


def test_a_runs_page_shows_heat_maps_and_what_missed(tmp_path):
    run = make_run(tmp_path, "one", {"needle": needle_result("", [1.0, 0.5])})
    row = {
        "series": "pairs, 1 needle",
        "length": 1024,
        "depth": 0,
        "keyword": 0.0,
        "needles": ["The pair is amber lamp."],
        "responses": ["The pair is amber <b>"],
    }
    files.write_jsonl(run / "needle" / "items.jsonl", [row, {**row, "keyword": 1.0}])
    section = needle.needle(Run(run))
    assert [b.kind for b in section.blocks] == ["picture", "grid", "table", "fold"]
    assert "mean keyword score 75 %" in section.blocks[1].blocks[0].title
    assert section.blocks[2].rows == [["pairs, 1 needle", "1,024"]]
    text = page.build(run).read_text()
    assert "1 of 1 answers that missed" in text and "amber &lt;b&gt;" in text
    assert "Contamination" not in text


def test_contamination_says_what_it_found(tmp_path):
    delta = {"mean": -0.5, "low": -0.6, "high": -0.4, "count": 24}
    result = {
        "losses": {"train": 1.5, "test": 1.0, "reference": 1.5}, "delta1": delta,
        "delta2": {**delta, "mean": -0.01}, "test_leak": True, "train_fit": False,
        "margin": 0.05, "confidence": 0.999, "summary": ["the test set was trained on"],
        "overlap": {"test": {"examples": 9, "indexed": 8, "found": 2, "share": 0.25,
                             "samples": [{"example": "test#1", "document": "page 7"}]}},
    }  # fmt: skip
    run = Run(make_run(tmp_path, "leaked", {"contamination": result}))
    section = contamination.contamination(run)
    assert "the test set was trained on" in section.lead
    assert section.blocks[2].rows[0][:4] == ["test", "8", "2", "25 %"]
    (headline,) = contamination.headlines(run)
    assert "test set trained on" in headline.reading and headline.number == "−0.50"
    assert "Contamination" in page.build(run.folder).read_text()
