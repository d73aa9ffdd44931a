"""Grids of runs: cached by their settings, one table, one plot with bands; from a notebook too."""

from __future__ import annotations

import functools
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import internlm2_jax
from internlm2_jax import ablation, files
from internlm2_jax.ablation import ablate, combinations, parse_sweep
from internlm2_jax.cli import cli
from internlm2_jax.config import Config, Partial
from internlm2_jax.errors import UserError
from internlm2_jax.stages import Output, Pipeline

ROOT = Path(__file__).parents[1]
calls: list[str] = []


def corpus(folder: Path, *, size: int = 3) -> None:
    calls.append(f"corpus {size}")
    files.write_json(folder / "result.json", {"size": size})


def pretrain(folder: Path, *, corpus: Path, rate: float, seed: int = 0) -> None:
    calls.append(f"pretrain {rate} {seed}")
    size = files.read_json(corpus / "result.json")["size"]
    rows = [
        {"step": step, "split": "validation", "loss": rate * size / step + seed}
        for step in range(1, 5)
    ]
    files.write_jsonl(folder / "metrics.jsonl", rows)
    files.write_json(folder / "result.json", {"validation_loss": rows[-1]["loss"], "fixed": 7})


def base() -> Config:
    return Config(
        Pipeline,
        corpus=Partial(corpus),
        pretrain=Partial(pretrain, corpus=Config(Output, "corpus"), rate=1.0, seed=0),
    )


@pytest.fixture(autouse=True)
def _no_calls():
    calls.clear()


GRID = {"pretrain.rate": [1.0, 2.0]}


def test_every_combination_with_every_seed_and_nothing_twice(tmp_path):
    found = ablate(base(), GRID, seeds=2, folder=tmp_path)
    trained = ["pretrain 1.0 0", "pretrain 1.0 1", "pretrain 2.0 0", "pretrain 2.0 1"]
    assert calls == ["corpus 3", *trained]
    assert [run.name.rpartition(",")[0] for run in found.runs] == [
        "rate-1.0,seed-0", "rate-1.0,seed-1", "rate-2.0,seed-0", "rate-2.0,seed-1"
    ]  # fmt: skip
    calls.clear()
    ablate(base(), {"pretrain.rate": [1.0, 2.0, 5.0]}, seeds=[1], folder=tmp_path)
    assert calls == ["pretrain 5.0 1"]
    calls.clear()
    ablate(base(), {"corpus.size": [3, 4]}, folder=tmp_path)
    assert calls == ["corpus 4", "pretrain 1.0 0"]


def test_table_and_plot(tmp_path):
    found = ablate(base(), GRID, seeds=3, folder=tmp_path)
    assert found.table() == [
        ["Result", "rate 1.0", "rate 2.0"],
        ["pretrain/validation_loss", "1.75 ± 1", "2.50 ± 1"],
    ]
    assert str(found).splitlines()[2].split() == [
        "pretrain/validation_loss",
        "1.75",
        "±",
        "1",
        "2.50",
        "±",
        "1",
    ]
    assert "<th>rate 1.0</th>" in found._repr_html_()
    axes = found.figure().axes[0]
    drawn = [line for line in axes.lines if len(line.get_xdata()) == 4]
    np.testing.assert_allclose(drawn[0].get_ydata(), [3 / s + 1 for s in range(1, 5)])
    bands = [c for c in axes.collections if c.get_paths()]
    assert len(bands) == 2
    heights = bands[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.75, 5.0)
    with pytest.raises(UserError, match="has logged 'accuracy' for train in 'pretrain'"):
        found.figure("accuracy", split="train")
    page = (tmp_path / "comparison.html").read_text()
    assert "Settings that differ" in page and "rate 2.0" in page and "± 1" in page


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(folder, **options):
        if options["rate"] == 2.0:
            raise Killed
        pretrain(folder, **options)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(ablation.config, "build", functools.partial(_replace, dying))
        ablate(base(), GRID, folder=tmp_path)
    assert calls == ["corpus 3", "pretrain 1.0 0"]
    found = ablate(base(), GRID, folder=tmp_path)
    assert calls[2:] == ["pretrain 2.0 0"] and len(found.runs) == 2


_build = ablation.config.build


def _replace(function, made):
    built = _build(made)
    stage = built.stages["pretrain"]
    built.stages["pretrain"] = functools.partial(function, **stage.keywords)
    return built


@pytest.mark.parametrize(
    ("grid", "seeds", "message"),
    [
        ({"pretrain.rat": [1]}, 1, "did you mean 'rate'"),
        ({"pretrain.rate": "1e-3"}, 1, "give a list of them"),
        ({"pretrain.rate": []}, 1, "give a list of them"),
        ({}, 0, "seeds are 0"),
        ({}, [1, 1], "or different seeds"),
        ({"pretrain.rate": [1.0, 1.0]}, 1, "two runs of the sweep have the same settings"),
        ({"seed": [1, 2]}, 2, "give one of both"),
        ({"seed": [1, 1]}, 1, "or different seeds"),
    ],
)
def test_mistakes(tmp_path, grid, seeds, message):
    with pytest.raises(UserError, match=message):
        ablate(base(), grid, seeds, folder=tmp_path)
    assert not any(tmp_path.iterdir())  # said before anything is run


def test_values_of_seed_are_the_seeds():
    grid = {"seed": [5, 7], "rate": [1.0, 2.0]}
    assert list(combinations(grid, 1)) == list(combinations({"rate": [1.0, 2.0]}, [5, 7]))


def test_sweeps_are_parsed():
    assert parse_sweep("a.b=1e-3,2") == ("a.b", [1e-3, 2])
    assert parse_sweep("schedule=wsd,cosine") == ("schedule", ["wsd", "cosine"])
    assert parse_sweep("size=(1, 2),None") == ("size", [(1, 2), None])
    with pytest.raises(UserError, match="not of the form name=value,value"):
        parse_sweep("a=")


def test_flags_that_do_not_go_together():
    experiment = str(ROOT / "experiments/ablations/small.py")
    outcome = CliRunner().invoke(cli, ["run", experiment, "--seeds", "2", "--redo"])
    assert isinstance(outcome.exception, UserError) and "--redo does not go" in str(
        outcome.exception
    )


def test_the_notebook_and_the_shell_are_one(tmp_path, monkeypatch, small_corpus):
    """Trains four tiny runs through the notebook's cells; the command line finds them done."""
    monkeypatch.setenv("INTERNLM2_TINY", "1")
    monkeypatch.setenv("INTERNLM2_ABLATION", str(tmp_path / "a"))
    monkeypatch.setenv("INTERNLM2_CORPUS", str(small_corpus))
    cells = runpy.run_path(str(ROOT / "experiments/notebooks/ablation.py"))
    found = cells["found"]
    assert isinstance(found, internlm2_jax.ablation.Ablation) and len(found.runs) == 4
    assert found.table()[0] == ["Result", "learning_rate 0.001", "learning_rate 0.004"]
    assert (tmp_path / "a" / "validation_loss.svg").is_file()
    trained = {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "stages").rglob("done.json")}
    assert len(trained) == 1 + 1 + 4
    outcome = CliRunner().invoke(
        cli,
        ["run", str(ROOT / "experiments/ablations/small.py"), "--tiny", "--corpus",
         os.fspath(small_corpus), "--sweep", "learning_rate=1e-3,4e-3", "--seeds", "2",
         "--run-dir", str(tmp_path / "a")],
        catch_exceptions=False,
    )  # fmt: skip
    assert outcome.exit_code == 0 and "pretrain/validation_loss" in outcome.output
    assert trained == {p: p.stat().st_mtime_ns for p in (tmp_path / "a/stages").rglob("done.json")}


@pytest.fixture
def small_corpus(tmp_path):
    import asyncio
    import inspect

    folder = tmp_path / "corpus"
    folder.mkdir()
    source = Path(inspect.getfile(asyncio)).parent
    for path in sorted(source.glob("*.py"))[:20]:
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"{path.stem}.txt").write_text("A sentence of words. " * 200 + path.name)
    return folder
