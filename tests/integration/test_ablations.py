"""The ablations run from end to end in their tiny form; the needle model finds what it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm2_jax import config, files
from internlm2_jax.ablation import ablate

ROOT = Path(__file__).parents[2]
ABLATIONS = ROOT / "experiments" / "ablations"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "grid", "measure"),
    [
        ("attention_heads", {"arm": ["mha", "gqa"]}, "cache_bytes_per_token"),
        ("data_quality", {"arm": ["raw", "both"]}, "dropped/filter"),
        ("capability_enhancement", {"arm": ["on", "off"]}, "task_accuracy"),
    ],
)
def test_arms_with_two_seeds_become_one_page(name, grid, measure, tmp_path):
    found = ablate(
        ABLATIONS / f"{name}.py", grid, seeds=2, folder=tmp_path, function="tiny",
        assignments=[f"corpus={str(ROOT / 'data_beam')!r}"],
    )  # fmt: skip
    assert len(found.runs) == 4
    results = [files.read_json(run / "measure" / "result.json") for run in found.runs]
    assert [r["arm"] for r in results] == [arm for arm in grid["arm"] for _ in range(2)]
    assert any(measure in r["measures"] for r in results)
    page = (tmp_path / "comparison.html").read_text()
    assert "What the arms come to" in page and "95%" in page


def test_vocabularies_on_chinese_text(shared, tmp_path):
    found = ablate(
        ABLATIONS / "tokenizer_chinese.py", {"vocabulary": [2048, 4096]}, folder=tmp_path,
        function="tiny", assignments=[f"corpus={str(shared / 'data' / 'chinese_poetry')!r}"],
    )  # fmt: skip
    small, large = (files.read_json(r / "measure" / "result.json")["measures"] for r in found.runs)
    assert large["bytes_per_token/chinese"] > small["bytes_per_token/chinese"] > 1


def test_the_long_phase_makes_needles_found_at_eight_times_the_first_length(tmp_path):
    effective = {}
    for long in (True, False):
        made = config.load(ABLATIONS / "needle_lengths.py", [f"long={long}"])
        run = tmp_path / str(long)
        config.build(made).run(run, settings=made)
        result = files.read_json(run / "needle" / "result.json")
        assert result["trained_length"] == (1024 if long else 128)
        effective[long] = result["series"]["pairs, 1 needle"]["effective_length"]
    assert effective[True] >= 8 * 128 > effective[False]
