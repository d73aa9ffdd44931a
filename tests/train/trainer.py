"""Trains the tiny model from the command line of a test: FOLDER LAYOUT STEPS [KILLED_AT].

In the end every process prints a digest of its part of the state. At step KILLED_AT the first
process kills itself with SIGKILL.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main(folder: str, layout: str, steps: str, killed_at: str = "-1") -> None:
    from internlm2_jax import distributed

    distributed.start()
    import hashlib

    import jax
    import numpy as np

    from internlm2_jax import sharding
    from internlm2_jax.models.build import build
    from internlm2_jax.models.config import preset
    from internlm2_jax.train import optimizer
    from internlm2_jax.train.loop import fit
    from internlm2_jax.train.objectives import language_model_loss
    from internlm2_jax.train.step import init_state, make_train_step

    model = build(preset("tiny"))
    tx = optimizer.adamw(1e-2)
    step_fn = make_train_step(language_model_loss(model), tx)

    def batch(step, skipped):
        rows = np.random.default_rng(step + skipped).integers(1, 256, (8, 17)).astype(np.int32)
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
        ones = np.ones((8, 16), np.int32)
        return sharding.place_rows(
            {
                "tokens": rows[:, :-1],
                "targets": rows[:, 1:],
                "positions": positions,
                "segment_ids": ones,
                "loss_mask": ones.astype(np.float32),
            }
        )

    def train(step, state, rows):
        if step == int(killed_at) and distributed.is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        return step_fn(state, rows)

    with sharding.use(layout):
        params = sharding.create(model.init, model.axes, jax.random.key(0))
        state = fit(
            folder,
            init_state(params, tx),
            train,
            steps=int(steps),
            label="test",
            batch=batch,
            log_every=1,
            checkpoint_every=5,
        )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            digest.update(np.asarray(shard.data).tobytes())
    print("process", jax.process_index(), "of", jax.process_count(), "ends in", digest.hexdigest())


STARTED: list[subprocess.Popen] = []


def end_all() -> None:
    """Ends what a test that failed has left running."""
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate()


def start(command: list[str], processes: int, devices: int, **more: str) -> list[subprocess.Popen]:
    """`command` in so many processes, which share `devices` devices of the CPU."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **more}
    joined = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
    }
    running = [
        subprocess.Popen(
            command,
            env=environment | (joined | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    STARTED.extend(running)
    return running


def ended(running: list[subprocess.Popen], status: int = 0) -> list[str]:
    """What they printed, when all have ended with `status`."""
    results = [(*process.communicate(timeout=280), process.returncode) for process in running]
    assert [code for _, _, code in results] == [status] * len(running), "\n".join(
        error[-3000:] for _, error, _ in results
    )
    # gloo writes to standard output as well
    return [
        "".join(x for x in out.splitlines() if x.startswith("process ")) for out, _, _ in results
    ]


def trainer(folder: Path, layout: str, steps: int, killed_at: int = -1) -> list[str]:
    return [sys.executable, __file__, str(folder), layout, str(steps), str(killed_at)]


if __name__ == "__main__":
    main(*sys.argv[1:])
