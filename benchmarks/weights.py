"""Weights of few bits on the machine at hand: tokens per second, bytes, and what they cost.

    python benchmarks/weights.py                       # the 88M model's speed, in turns
    python benchmarks/weights.py --quality FILE        # beside it, a small model's loss on a text

Speed: the engine goes on with prompts of 16 tokens for 64 more, greedy, one row and eight, the
kinds in turn; the medians' ratio to float32 is the result. Quality: a model of bytes (6 layers of
256) is trained on nine tenths of FILE, then reads the last tenth with its weights of each kind; KL
is that of the next byte's distribution from float32's.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from decode import SIZES

from internlm2_jax.infer.engine import Engine, EngineConfig, Request
from internlm2_jax.models.build import Model, build
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.quantise import quantise
from internlm2_jax.train import optimizer
from internlm2_jax.train.objectives import language_model_loss
from internlm2_jax.train.step import init_state, make_train_step

KINDS = ("auto", "int8", "int4")
NEW, LENGTH, ROWS = 64, 256, 16


def speed(rounds: int) -> None:
    cfg = ModelConfig(**SIZES, max_position_embeddings=4096, dtype="float32")  # type: ignore[arg-type]
    model = build(cfg)
    params = model.init(jax.random.key(0))
    random = np.random.default_rng(0)
    for slots in (1, 8):
        engines = {}
        for kind in KINDS:
            sizes = EngineConfig(
                slots=slots, max_length=128, prefill=((slots, 16),), steps=NEW, weights=kind
            )
            engines[kind] = Engine(model, params, sizes)
            engines[kind].warm_up()
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind, engine in engines.items():
                asked = [Request(random.integers(0, 8192, 16).tolist(), NEW) for _ in range(slots)]
                start = time.perf_counter()
                engine.run(asked)
                times[kind].append(time.perf_counter() - start)
        rate = {kind: slots * NEW / statistics.median(t) for kind, t in times.items()}
        shown = ", ".join(
            f"{kind} {r:,.0f} ({r / rate['auto']:.2f} times)" for kind, r in rate.items()
        )
        click.echo(f"batch {slots}: {shown} tokens/s")


def quality(file: Path, steps: int) -> None:
    cfg = ModelConfig(
        vocab_size=256, num_layers=6, embed_dim=256, num_heads=8, num_kv_heads=4, head_dim=32,
        mlp_dim=768, max_position_embeddings=LENGTH, dtype="float32",
    )  # fmt: skip
    model = build(cfg)
    text = np.frombuffer(file.read_bytes(), np.uint8).astype(np.int32)
    cut = len(text) * 9 // 10
    params = trained(model, text[:cut], steps)
    held = text[cut:][: 64 * (LENGTH + 1)].reshape(64, LENGTH + 1)
    exact = logprobs(model, params, held)
    bfloat16 = build(ModelConfig(**{**vars(cfg), "dtype": "bfloat16"}))
    rows: dict[str, tuple[Model, Any]] = {
        "float32": (model, params),
        "bfloat16": (bfloat16, params),
    }
    rows |= {kind: (model, quantise(params, kind)) for kind in KINDS[1:]}
    for name, (of, weights) in rows.items():
        got = logprobs(of, weights, held)
        loss = -np.take_along_axis(got, held[:, 1:, None], axis=-1).mean()
        divergence = (np.exp(exact) * (exact - got)).sum(-1).mean()
        same = (got.argmax(-1) == exact.argmax(-1)).mean()
        size = sum(x.nbytes for x in jax.tree.leaves(weights)) / 2**20
        size = size / 2 if name == "bfloat16" else size
        click.echo(
            f"{name}: {size:.1f} MiB, loss {loss:.4f}, KL {divergence:.5f} nats, "
            f"same likeliest byte {same:.1%}"
        )


def trained(model: Model, text: np.ndarray, steps: int) -> Any:
    tx = optimizer.adamw(1e-3)
    step = make_train_step(language_model_loss(model, remat="none"), tx)
    state = init_state(model.init(jax.random.key(0)), tx)
    random = np.random.default_rng(0)
    for _ in range(steps):
        starts = random.integers(0, len(text) - LENGTH - 1, ROWS)
        rows = np.stack([text[s : s + LENGTH + 1] for s in starts])
        batch = {
            "tokens": rows[:, :-1],
            "targets": rows[:, 1:],
            "segment_ids": np.ones_like(rows[:, 1:]),
            "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
            "loss_mask": np.ones(rows[:, 1:].shape, np.float32),
        }
        state, metrics = step(state, batch)
    click.echo(f"trained for {steps} steps: loss {float(metrics['loss']):.3f}")
    return state["params"]


def logprobs(model: Model, params: Any, rows: np.ndarray) -> np.ndarray:
    read = jax.jit(lambda p, ids: jax.nn.log_softmax(model.logits(p, ids)))
    return np.concatenate([read(params, jnp.asarray(part[:, :-1])) for part in np.split(rows, 8)])


@click.command(help=__doc__)
@click.option("--rounds", default=7)
@click.option("--quality", "file", type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=400, help="Of training, for --quality.")
def main(rounds: int, file: Path | None, steps: int) -> None:
    if rounds:
        speed(rounds)
    if file:
        quality(file, steps)


if __name__ == "__main__":
    main()
