"""Fixtures that tests of the corpus's tools share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A pipeline's output with everything that `inspect` shows; not to be written to."""
    from inspect_corpus import build_sample  # here: test_tasks runs without apache-beam

    return build_sample(tmp_path_factory.mktemp("inspect") / "out")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is read: no picture is drawn."""
    from internlm2_jax.report import svg

    monkeypatch.setattr(svg, "_svg", lambda draw, width, height, alt: "")


@pytest.fixture
def output(whole: Path, tmp_path: Path, undrawn) -> Path:
    """A copy of `whole` of the test's own."""
    return shutil.copytree(whole, tmp_path / "out")
