"""`internlm2 evaluate` and `internlm2 leaderboard` from a shell's side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from internlm2_jax import files
from internlm2_jax.cli import cli
from internlm2_jax.errors import UserError
from internlm2_jax.evals import command, suites
from internlm2_jax.notebook import Opened


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def stage(subject, tmp_path_factory):
    """A finished stage with its tokenizer, and a data set."""
    home = tmp_path_factory.mktemp("run")
    Opened(Path("none"), subject.model, subject.params).save_stage(home / "sft")
    file = next(tmp_path_factory.getbasetemp().glob("vocabulary*/tokenizer.model"))
    shutil.copyfile(file, home / "sft/tokenizer.model")
    rows = [{"question": f"{i}?", "options": ["no", "yes"], "label": "AB"[i % 2]} for i in range(9)]
    files.write_jsonl(home / "data/all.jsonl", rows)
    (home / "mine.yaml").write_text(
        "mine:\n  dimension: examinations\n  format: choices\n  measure: choice\n"
        '  method: likelihood\n  prompt: "{question}\\n{options}\\nAnswer:"\n'
        "  data: [{files: '*.jsonl', fields: {choices: options, answer: label}}]\n"
    )
    return home


def test_suites_are_listed_by_dimension():
    said = run("evaluate", "--list").stdout
    assert "reasoning and mathematics\n  gsm8k              generation, 4 shots, maths" in said
    assert said.index("examinations") < said.index("alignment")


def test_an_own_suite_is_measured_and_shown(stage):
    asked = ("evaluate", stage / "sft", "--suite", stage / "mine.yaml", "--data", stage / "data")
    said = run(*asked, "--limit", 6).stdout
    assert "mine: " in said and "6 items" in said
    found = files.read_json(stage / "sft/evaluations/mine/totals.json")
    assert found["items"] == 6 and found["shots"] == 0
    assert run(*asked, "--limit", 6).stdout == said  # nothing is asked again
    with pytest.raises(UserError, match="has results with another data, items"):
        run(*asked)
    run("leaderboard", stage, "--out", stage / "board.html")
    board = json.loads((stage / "board.json").read_text())
    assert board["models"] == [f"{stage.name}/sft"]
    assert "mine" in (stage / "board.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a RUN and --suite NAME"),
        (["x", "--suite", "mmmlu"], "no suite 'mmmlu'; there are mmlu"),
        (["x", "--suite", "gsm8k", "--method", "likelihood"], "gsm8k has no choices"),
        (["x", "--suite", "gsm8k", "--pass-at", "3"], "pass@3 needs as many samples"),
        (["x", "--suite", "gsm8k", "--data", "/no/folder/here"], "neither a folder nor a hub id"),
    ],
)
def test_bad_requests_are_one_line(arguments, said):
    with pytest.raises(UserError, match=said):
        run("evaluate", *arguments)


def test_several_samples_are_drawn_warm():
    suite = command.changed(suites.built_in()["gsm8k"], {"samples": 4, "k": (4, 1), "chat": None})
    assert suite.temperature == 0.8 and suite.k == (1, 4) and suite.shots == 4
