"""Tokens per second of one optimizer step of a preset, with and without recomputed layers.

    python benchmarks/train_step.py                       # the demo's model and its two lengths

The two are timed in turn; the ratio is what to quote.
"""

from __future__ import annotations

import statistics
import time

import click
import jax
import jax.numpy as jnp
import numpy as np

from internlm2_jax.losses.language_model import cross_entropy
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.train import optimizer
from internlm2_jax.train.step import init_state, make_train_step


@click.command()
@click.option("--model", "name", default="demo")
@click.option("--shapes", default="8x128,2x1024", help="Rows x tokens, several.")
@click.option("--repeats", default=20)
def main(name: str, shapes: str, repeats: int) -> None:
    """Prints tokens per second of both variants and their ratio."""
    model = build(preset(name))
    print(f"{jax.devices()[0].device_kind}, {model.cfg.num_params():,} parameters")
    for shape in shapes.split(","):
        batch, length = map(int, shape.split("x"))
        tokens = np.random.default_rng(0).integers(0, model.cfg.vocab_size, (batch, length + 1))
        tokens = tokens.astype(np.int32)

        def prepare(remat, tokens=tokens):
            def loss_fn(params, rows):
                logits = model.logits(params, rows[:, :-1], remat=remat)
                total, weight = cross_entropy(logits, rows[:, 1:], jnp.ones(rows[:, 1:].shape))
                return total / weight, {}

            tx = optimizer.adamw(1e-3)
            step = make_train_step(loss_fn, tx)
            state, _ = step(init_state(model.init(jax.random.key(0)), tx), tokens)
            return step, state

        variants = {"plain": prepare("none"), "recomputed": prepare("full")}
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(repeats):
            for variant, (step, state) in variants.items():
                start = time.perf_counter()
                state, metrics = step(state, tokens)
                float(metrics["loss"])
                times[variant].append(time.perf_counter() - start)
                variants[variant] = (step, state)
        rate = {v: batch * length / statistics.median(t) for v, t in times.items()}
        shown = ", ".join(f"{v} {r:,.0f} tokens/s" for v, r in rate.items())
        print(f"{shape}: {shown}, ratio {rate['recomputed'] / rate['plain']:.2f}")


if __name__ == "__main__":
    main()
