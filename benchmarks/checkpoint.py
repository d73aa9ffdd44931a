"""Checkpoints: GB/s of saving and restoring, against safetensors, and for how long a save blocks.

    python benchmarks/checkpoint.py                     # 1 GiB of state
    python benchmarks/checkpoint.py --gib 0.25 --folder /mnt/disk

Every figure is the median of `--repeats`, the formats taken in turn on the same tree: float32
parameters and the two moments of AdamW. Files are flushed to the disk inside the measured time on
both sides, and dropped from the page cache before they are read. A save blocks the loop until the
arrays are in the host's memory; the share is of a training step of the same model, measured in the
same run while no save is under way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from internlm2_jax.models.build import build
from internlm2_jax.models.config import ModelConfig, preset
from internlm2_jax.train import optimizer
from internlm2_jax.train.checkpoint import Checkpoints, Retention
from internlm2_jax.train.objectives import language_model_loss
from internlm2_jax.train.step import init_state, make_train_step


def model_of(gib: float) -> ModelConfig:
    """A decoder whose float32 parameters and moments take about `gib` GiB."""
    heads = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
    sizes = {"embed_dim": 512, "mlp_dim": 2048, "vocab_size": 16384}
    cfg = dataclasses.replace(preset("demo"), **heads, **sizes, num_layers=1)
    one, two = (dataclasses.replace(cfg, num_layers=n).num_params() for n in (1, 2))
    layers = max(1, round((gib * 2**30 / 12 - one) / (two - one)) + 1)
    return dataclasses.replace(cfg, num_layers=layers)


def flush(folder: Path) -> None:
    """Waits for the disk, then drops the files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@click.command()
@click.option("--gib", default=1.0, help="Size of the state.")
@click.option("--rows", default=8, help="Of a training step.")
@click.option("--length", default=512, help="Tokens of a row.")
@click.option("--repeats", default=3)
@click.option("--folder", type=click.Path(path_type=Path), help="On the disk to measure.")
def main(gib: float, rows: int, length: int, repeats: int, folder: Path | None) -> None:
    """Prints GB/s of both formats and the blocking share of an asynchronous save."""
    cfg = model_of(gib)
    model, tx = build(cfg), optimizer.adamw(1e-4)
    step = make_train_step(language_model_loss(model), tx)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, length + 1), np.int32)
    ones = np.ones((rows, length), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "segment_ids": ones,
        "loss_mask": ones.astype(np.float32),
    }
    state, _ = step(init_state(model.init(jax.random.key(0)), tx), batch)
    jax.block_until_ready(state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    device = jax.devices()[0].device_kind
    print(f"{device}, {cfg.num_params():,} parameters, {size / 2**30:.2f} GiB of state")

    work = Path(tempfile.mkdtemp(dir=folder))
    path = work / "model.safetensors"
    times: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        times.setdefault(name, []).append(time.perf_counter() - start)

    try:
        # ------------------------------------------------------------- against safetensors
        for number in range(1, repeats + 1):
            with Checkpoints(work, Retention(1)) as checkpoints:
                with timed("checkpoint save"):
                    checkpoints.save(number, state)
                    checkpoints.wait()
                    flush(work)
                with timed("checkpoint restore"):
                    jax.block_until_ready(checkpoints.restore_latest(state)[1])
            with timed("safetensors save"):
                leaves = jax.tree_util.tree_leaves_with_path(state)
                save_file({jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}, path)
                flush(work)
            with timed("safetensors load"):
                jax.block_until_ready(jax.device_put(load_file(path)))
        # ------------------------------------------------------------------ blocking share
        with Checkpoints(work, Retention(1)) as checkpoints:
            for number in range(repeats + 1, 2 * repeats + 1):
                with timed("step"):
                    state, _ = step(state, batch)
                    jax.block_until_ready(state)
                with timed("blocks"):
                    checkpoints.save(number, state)
                with timed("step while saving"):
                    state, _ = step(state, batch)
                    jax.block_until_ready(state)
                checkpoints.wait()
    finally:
        shutil.rmtree(work)
    median = {name: statistics.median(values) for name, values in times.items()}
    for name in ("checkpoint save", "safetensors save", "checkpoint restore", "safetensors load"):
        print(f"{name:20} {size / 1e9 / median[name]:6.2f} GB/s")
    share = median["blocks"] / median["step"]
    print(
        f"a save blocks for {median['blocks']:.3f} s, {share:.1%} of a step of "
        f"{median['step']:.2f} s; the step beside it takes {median['step while saving']:.2f} s"
    )


if __name__ == "__main__":
    main()
