"""One engine over a mesh of two processes: both make the same calls and get the same answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from internlm2_jax.infer.engine import Engine, EngineConfig, Request
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset

SIZES = {"slots": 4, "max_length": 64, "page": 8, "prefill": ((4, 8),), "steps": 8}
ASKED = [([5, 6, 7, 8, 9, 10, 11, 12, 13], 12), ([3], 20), ([9, 8, 7], 5), ([1, 2], 9), ([4], 3)]
PROGRAM = """
import json, sys
from internlm2_jax import distributed
distributed.start()

import jax
from internlm2_jax import sharding
from internlm2_jax.infer.engine import Engine, EngineConfig, Request
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset

folder, sizes, asked = sys.argv[1], *map(json.loads, sys.argv[2:])
sizes["prefill"] = tuple(map(tuple, sizes["prefill"]))
model = build(preset("tiny", initializer_range=0.2))
with jax.set_mesh(sharding.Layout.parse("fsdp=2,tensor=2").mesh()):
    params = sharding.place(model.init(jax.random.key(0)), model.axes)
    engine = Engine(model, params, EngineConfig(**sizes))
    requests = [Request(p, n, Sampling(1.0), row=i) for i, (p, n) in enumerate(asked)]
    out = [[r.tokens, r.logprobs] for r in engine.run(requests)]
    assert engine.held_pages == 0
with open(f"{folder}/said{jax.process_index()}.json", "w") as file:
    json.dump(out, file)
"""


@pytest.mark.slow
def test_two_processes_answer_as_one_device(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(SIZES), json.dumps(ASKED)]
    running = [
        subprocess.Popen(
            command, env=environment | {"JAX_PROCESS_ID": str(i)},
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
    first, second = (json.loads((tmp_path / f"said{i}.json").read_text()) for i in range(2))
    assert first == second

    model = build(preset("tiny", initializer_range=0.2))
    engine = Engine(model, model.init(jax.random.key(0)), EngineConfig(**SIZES))
    requests = [Request(p, n, Sampling(1.0), row=i) for i, (p, n) in enumerate(ASKED)]
    for (tokens, logprobs), want in zip(first, engine.run(requests), strict=True):
        assert tokens == want.tokens
        assert logprobs == pytest.approx(want.logprobs, abs=1e-4)
