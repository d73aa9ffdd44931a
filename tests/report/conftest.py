"""One made-up run for all report tests."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run; not to be changed."""
    import fake_run

    return fake_run.write(tmp_path_factory.mktemp("runs") / "demo", points=120)


@pytest.fixture
def run_folder(whole_run: Path, tmp_path: Path) -> Path:
    """A complete run of the test's own."""
    return shutil.copytree(whole_run, tmp_path / "demo")
