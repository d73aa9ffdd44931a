"""Helpers of this folder are importable by name, also by the workers of a job; a Flink cluster."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def flink_installed():
    """Flink and the job server, in .cache/flink."""
    from data_beam.flink import distribution

    try:
        return distribution.prepare(ROOT / ".cache" / "flink")
    except distribution.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cluster(flink_installed, tmp_path_factory):
    from data_beam.flink.cluster import Cluster

    path = [str(ROOT), str(HERE)]
    folder = tmp_path_factory.mktemp("flink")
    with Cluster.start(folder, flink_installed, python_path=path) as running:
        yield running
