"""The leaderboard: names, tests, items on which models differ, and the page."""

from __future__ import annotations

import json

import pytest

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.evals import comparison, suites, totals
from internlm2_jax.report import leaderboard

SUITES = suites.built_in()


def measured(folder, name, scores, *, data="d", shots=0, **lines):
    """A finished evaluation whose items have these scores."""
    suite = SUITES[name]
    results = [
        {"id": f"q{i}", "group": "odd" if i % 2 else "even", "where": f"test.jsonl:{i + 1}",
         "prompt": "", "question": f"What is <b>{i}</b>?", "cut": False,
         "answers": ["right"], "score": score,
         "outputs": [{"text": f"said {score}", "tokens": 3, "finished": True, "outcome": "fail",
                      "detail": "", "answer": "", "score": score}]}
        for i, score in enumerate(scores)
    ]  # fmt: skip
    found = totals.totals(suite, results, model="x", settings={"data": data}) | {"shots": shots}
    place = folder / "evaluations" / name
    files.write_jsonl(place / "items.jsonl", results)
    files.write_json(place / "totals.json", found)


@pytest.fixture
def runs(tmp_path):
    a, b = tmp_path / "one/sft", tmp_path / "two/sft"
    measured(a, "gsm8k", [1, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    measured(b, "gsm8k", [0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    measured(b, "mmlu", [1, 0])
    return a, b


def test_models_are_compared_item_by_item(runs):
    gsm8k, mmlu = sorted(comparison.find(runs), key=lambda c: c.suite)
    assert [r.model for r in gsm8k.results] == ["one/sft", "two/sft"] and not mmlu.pairs
    ((a, b, test),) = gsm8k.pairs
    assert (a, b, test.better, test.worse) == ("one/sft", "two/sft", 8, 1)
    assert test.p == pytest.approx(2 * (1 + 9) / 2**9)
    assert set(gsm8k.differ) == {f"q{i}" for i in range(9)}


def test_what_cannot_be_compared_is_said(runs, tmp_path):
    measured(tmp_path / "three", "gsm8k", [1, 1], data="other", shots=4)
    (found,) = comparison.find([runs[0], tmp_path / "three"])
    assert not found.pairs and len(found.warnings) == 2
    assert "saw other items" in found.warnings[1] and "shots differ" in found.warnings[0]
    with pytest.raises(UserError, match="no finished evaluation; run internlm2 evaluate"):
        comparison.find([tmp_path / "nothing"])
    with pytest.raises(UserError, match="given twice"):
        comparison.find([runs[0], runs[0].parent / "../one/sft"])


def test_the_page_shows_scores_tests_and_items_and_runs_nothing(runs, tmp_path):
    page, data = leaderboard.build(runs, tmp_path / "board.html")
    text = page.read_text()
    assert "20.0 %" in text and "90.0 %" in text and "+70.0" in text and "0.039" in text
    assert "What is &lt;b&gt;0&lt;/b&gt;?" in text and "<script" not in text
    assert "said 1" in text and "Items on which models differ, 9" in text
    found = json.loads(data.read_text())
    assert found["models"] == ["two/sft", "one/sft"] or found["models"] == ["one/sft", "two/sft"]
    assert found["suites"]["gsm8k"]["results"]["two/sft"]["score"] == 0.9
    assert found["suites"]["gsm8k"]["paired"][0]["better"] == 8
    assert leaderboard.build(runs, tmp_path / "again.html")[0].read_text() == text


def test_a_long_suite_keeps_its_page_small(tmp_path):
    measured(tmp_path / "a", "gsm8k", [0, 1] * 1000)
    measured(tmp_path / "b", "gsm8k", [1, 0] * 1000)
    page, _ = leaderboard.build([tmp_path / "a", tmp_path / "b"], tmp_path / "board.html")
    text = page.read_text()
    assert len(text) < 500_000 and "1,600 more are in items.jsonl" in text
    assert "Items on which models differ, 30 of 2000" in text
