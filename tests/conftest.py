"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

# Eight devices on one CPU, so that mesh tests need no accelerator; set before jax is imported.
# Compilation is most of a test with a cold cache: LLVM optimises nothing, and where XLA:CPU still
# has its older emitters, which go without MLIR, they take half the time. `make test-slow` compiles
# as users do.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * version("jax").startswith("0.10."),
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import hypothesis
import pytest

# A busy machine is no failure.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The founders' folder of public data and goldens; users of the project do not have it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: it holds the founders' reference data")
    return folder


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """A tokenizer of 512 pieces, trained on this project's own sources."""
    from internlm2_jax.data.tokenizer import train_tokenizer

    texts = [path.read_text() for path in sorted((ROOT / "internlm2_jax" / "data").glob("*.py"))]
    # Found again by its folder's name, which no other fixture uses.
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    return train_tokenizer(texts, path, vocab_size=512)


@pytest.fixture
def own_suites(tmp_path):
    """{name: fields of a QuickSuite}: one asked by likelihood, one by generation."""
    import yaml

    from internlm2_jax import files

    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {"question": f"{n} + 1 is", "choices": [str(n), str(n + 1)], "answer": 1} for n in range(6)
    ]
    files.write_jsonl(data / "choices.jsonl", rows)
    for method in ("likelihood", "generation"):
        suite = {
            "dimension": "examinations", "format": "choices", "measure": "choice",
            "method": method, "max_new_tokens": 3, "data": [{"files": "*.jsonl"}],
        }  # fmt: skip
        (tmp_path / f"{method}.yaml").write_text(yaml.safe_dump({method: suite}))
    return {
        method: {"suite": str(tmp_path / f"{method}.yaml"), "data": str(data), "limit": 4}
        for method in ("likelihood", "generation")
    }
