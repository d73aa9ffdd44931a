"""Helpers of this folder are importable by name, also by the workers of a job."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)


def pytest_configure(config):
    config.addinivalue_line("markers", "flink: needs Java and a network; run by `make flink-test`")
