"""Two processes, four devices each, read a checkpoint onto one mesh and write it back."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from internlm2_jax.models import convert
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset

PROGRAM = """
import json, sys
from internlm2_jax import distributed
distributed.start()

import jax
from internlm2_jax import sharding
from internlm2_jax.models import convert
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.models.tensor_files import Reader

folder = sys.argv[1]
elements, read = [0], Reader.read
def counting(self, name, *index):
    value = read(self, name, *index)
    elements[0] += value.size
    return value
Reader.read = counting

mesh = sharding.Layout.parse("fsdp=4,tensor=2").mesh()
places = sharding.shardings(build(preset("tiny")).axes, mesh)
cfg, params = convert.load_hf(folder + "/a", places)
convert.save_hf(folder + "/b", cfg, params, "float32")
with open(f"{folder}/said{jax.process_index()}.json", "w") as file:  # gloo talks on stdout
    json.dump({"elements": elements[0]}, file)
"""


@pytest.mark.slow
def test_each_process_reads_its_own_slices(tmp_path):
    cfg = preset("tiny")
    random = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), build(cfg).abstract
    )
    convert.save_hf(tmp_path / "a", cfg, params, "float32")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            env=environment | {"JAX_PROCESS_ID": str(index)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ended = [(*process.communicate(timeout=240), process.returncode) for process in running]
    assert [code for _, _, code in ended] == [0, 0], "\n".join(error for _, error, _ in ended)
    said = [json.loads((tmp_path / f"said{index}.json").read_text()) for index in range(2)]
    norms = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim <= 2 and leaf.size <= 64)
    assert norms == 5 * cfg.embed_dim  # these alone lie everywhere, so both read them
    for row in said:
        assert row["elements"] == (cfg.num_params() - norms) / 2 + norms
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b
