"""Conversion never holds a model in host memory beside the one on the devices."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MiB = 2**20

# In a process of its own: the peak of this one is that of all tests before. Devices of a CPU lie in
# host memory too, so what may be resident is the parameters once and, for a moment, a part of one
# file and of one layer.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from internlm2_jax import sharding
from internlm2_jax.models import convert, tensor_files
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset

folder, layout, mesh = sys.argv[1:4]
cfg = preset("tiny", vocab_size=4096, num_layers=24, embed_dim=768, num_heads=12, num_kv_heads=4,
             head_dim=64, mlp_dim=2304, dtype="bfloat16")
tensor_files.SHARD_BYTES = 24 * 2**20
model = build(cfg)
places = sharding.shardings(model.axes, sharding.Layout.parse(mesh).mesh()) if mesh else None

def resident(row):  # VmRSS now, VmHWM the peak
    rows = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(rows[row].split()[0]) * 1024

def reset():  # the peak counts anew
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

small = preset("tiny", num_layers=2)  # compiles what is common, and sizes thread pools
tiny = build(small).init(jax.random.key(0))
warm = f"{folder}/warm-{sys.argv[4]}"
convert.save_hf(warm, small, tiny)
convert.load_hf(warm)

if sys.argv[4] == "write":
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, jnp.bfloat16), model.abstract)
    before = resident("VmRSS"); reset()
    convert.save_hf(folder + "/a", cfg, params, "bfloat16", layout=layout)
    held = 0
else:
    before = resident("VmRSS"); reset()
    _, params = convert.load_hf(folder + "/a", places, dtype="bfloat16")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
layer = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"])) // cfg.num_layers
print(json.dumps({"grown": resident("VmHWM") - before, "params": held, "layer": layer,
                  "shard": tensor_files.SHARD_BYTES}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "mesh"), [("internlm2", ""), ("llama", "fsdp=4,tensor=2")])
def test_peak_memory(tmp_path, layout, mesh):
    seen = {}
    for step in ("write", "read"):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), layout, mesh, step]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        seen[step] = json.loads(result.stdout.splitlines()[-1])
    shards = list((tmp_path / "a").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    assert size > 250 * MiB and len(shards) > 8
    for step, numbers in seen.items():
        # and 64 MiB for programs, of which every shape has some, and the allocator
        allowed = numbers["params"] + numbers["shard"] + numbers["layer"] + 64 * MiB
        assert numbers["grown"] < allowed, (step, numbers)
        # half the checkpoint beside the parameters would not pass
        assert allowed < numbers["params"] + size / 2
