"""Two processes, four devices each, train and save; one process with eight devices goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
import sys
from internlm2_jax import distributed
distributed.start()

import jax, numpy as np
from internlm2_jax import sharding
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.train import optimizer
from internlm2_jax.train.loop import fit
from internlm2_jax.train.objectives import language_model_loss
from internlm2_jax.train.step import init_state, make_train_step

folder, layout, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
assert len(jax.devices()) == 8
model = build(preset("tiny"))
tx = optimizer.adamw(1e-2)
step_fn = make_train_step(language_model_loss(model), tx)

def batch(step):
    tokens = np.random.default_rng(step).integers(1, 256, (8, 17)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    ones = np.ones((8, 16), np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions,
            "segment_ids": ones, "loss_mask": ones.astype(np.float32)}

with sharding.use(layout):
    params = sharding.create(model.init, model.axes, jax.random.key(0))
    train = lambda step, state, rows: step_fn(state, rows)
    fit(folder, init_state(params, tx), train,
        batch=lambda step, skipped: sharding.place_rows(batch(step + skipped)),
        steps=steps, label="test", log_every=1, checkpoint_every=3)
print("process", jax.process_index(), "of", jax.process_count(), "ends")
"""


def launch(folder: Path, layout: str, steps: int, processes: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={8 // processes}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), layout, str(steps)]
    running = [
        subprocess.Popen(
            command,
            env=environment | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    ended = [(*process.communicate(timeout=240), process.returncode) for process in running]
    assert [code for _, _, code in ended] == [0] * processes, "\n".join(e for _, e, _ in ended)
    return [out for out, _, _ in ended]


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # one writer
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_two_processes_then_one(tmp_path):
    said = launch(tmp_path / "moved", "data=2,fsdp=4", 5, processes=2)
    for index, out in enumerate(said):
        assert f"process {index} of 2 ends" in out
    launch(tmp_path / "moved", "fsdp=4,tensor=2", 8, processes=1)
    launch(tmp_path / "whole", "fsdp=8", 8, processes=1)
    np.testing.assert_allclose(
        losses(tmp_path / "moved"), losses(tmp_path / "whole"), rtol=2e-4, atol=0
    )
