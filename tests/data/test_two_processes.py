"""Two real processes read their own rows; one, and four devices of each, see the same batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from token_folder import random_documents, write_tokens

SCRIPT = """
import sys
from internlm2_jax import distributed
distributed.start()

import jax, numpy as np
from jax.experimental import multihost_utils
from internlm2_jax import sharding
from internlm2_jax.data.manifest import TokenReader
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.windows import WindowedSource

folder, layout, out = sys.argv[1:]
reader = TokenReader(folder, "train", "text")
batches = Batches(
    {"text": WindowedSource(reader, 32, window_tokens=500, kept=2)},
    batch_size=8, ramp=[(3, 4)], seed=1,
)
seen = {}
with sharding.use(layout):
    for step in (0, 2, 3, 9):
        count = batches.size(step)
        part = sharding.local_rows(count)
        placed = sharding.place_rows(batches(step, part), count)
        if jax.process_count() > 1:
            assert part.stop - part.start == count // 2, part
            placed = multihost_utils.process_allgather(placed, tiled=True)
        seen |= {f"{name}{step}": np.asarray(x) for name, x in placed.items()}
np.savez(f"{out}-{jax.process_index()}.npz", **seen)
"""


def launch(tokens: Path, layout: str, out: Path, processes: int) -> list[dict[str, np.ndarray]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
        "JAX_PLATFORMS": "cpu",
    }
    joined = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tokens), layout, str(out)],
            env=environment | (joined | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0] * processes, "\n".join(errors)
    return [dict(np.load(f"{out}-{i}.npz")) for i in range(processes)]


def test_two_processes_see_the_batches_of_one(tmp_path):
    documents = random_documents(0, 200, 40, 100)
    tokens = write_tokens(tmp_path / "t", {"train": {"text": documents}}, vocab_size=100)
    (one,) = launch(tokens, "", tmp_path / "one", 1)
    two = launch(tokens, "data=2,fsdp=2", tmp_path / "two", 2)
    for seen in two:
        assert seen.keys() == one.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(seen[name], array)


def test_rows_of_a_process_cover_its_devices():
    import jax

    from internlm2_jax import sharding

    if len(jax.devices()) != 8:
        pytest.skip("needs eight devices")
    with sharding.use("fsdp=4,tensor=2"):
        assert sharding.local_rows(16) == slice(0, 16)
    assert sharding.local_rows(5) == slice(0, 5)
