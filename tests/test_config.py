"""Experiments load, take overrides, refuse misspelt ones, and come back from a run folder."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from internlm2_jax import config
from internlm2_jax.errors import UserError

ROOT = Path(__file__).parents[1]

EXPERIMENT = """
from internlm2_jax.config import Config, Partial

def stage(folder, *, steps: int, rate: float = 0.1, mixture=None): ...

def pipeline(**stages): return stages

def experiment(seed=0, size="small"):
    return Config(
        pipeline,
        train=Partial(stage, steps=seed + 10, mixture={"code": 0.5}),
        parts=[Partial(stage, steps=1), Partial(stage, steps=2)],
    )
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "exp.py"
    path.write_text(EXPERIMENT)
    return path


def test_macros_and_overrides(experiment):
    resolved = config.load(experiment, ["seed=5", "train.rate=0.5", "parts.1.steps=7"])
    assert resolved.train.steps == 15
    assert resolved.train.rate == 0.5
    assert resolved.parts[1].steps == 7
    assert config.build(resolved)["train"].keywords["rate"] == 0.5


def test_mixture_entries_can_be_set(experiment):
    assert config.load(experiment, ["train.mixture.code=1"]).train.mixture == {"code": 1}


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("train.stpes=3", r"train has no field 'stpes'; did you mean 'steps'\? it has: folder, st"),
        ("trian.steps=3", r"no field 'trian'; did you mean 'train'"),
        ("sede=3", r"did you mean 'seed'"),
        ("parts.9.steps=3", r"parts has no field '9'; it has: 0, 1"),
        ("train=3", r"it is a group, set one of its fields"),
        ("train.steps=many", r"expected a number like 10, got 'many'"),
        ("train.steps", r"not of the form name=value"),
    ],
)
def test_a_wrong_override_is_one_line(experiment, assignment, message):
    with pytest.raises(UserError, match=message) as error:
        config.load(experiment, [assignment])
    assert "\n" not in str(error.value)


def test_missing_and_broken_experiments(tmp_path):
    with pytest.raises(UserError, match="no experiment file"):
        config.load(tmp_path / "none.py")
    (tmp_path / "broken.py").write_text("def experiment(:\n")
    with pytest.raises(UserError, match=r"broken\.py:1"):
        config.load(tmp_path / "broken.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="has no function experiment"):
        config.load(tmp_path / "empty.py")


def test_diff_lists_only_what_differs(experiment):
    lines = config.diff(config.load(experiment), config.load(experiment, ["train.rate=0.5"]))
    assert lines == ["train.rate: '(unset)' -> 0.5"]


def test_saved_settings_come_back_equal(tmp_path):
    resolved = config.load(ROOT / "experiments/demo/pipeline.py", ["seed=3"])
    config.save(resolved, tmp_path)
    assert config.diff(config.saved(tmp_path), resolved) == []
    assert "pretrain.phases[0].steps" in (tmp_path / "config.txt").read_text()


def test_describe_includes_defaults():
    def stage(folder, *, a, b=2): ...

    described = config.describe(functools.partial(stage, a=1))
    assert (described["a"], described["b"]) == (1, 2)
