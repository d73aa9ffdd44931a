"""The fused linear cross-entropy and log-probabilities, as ratios to the plain ones.

    python benchmarks/cross_entropy.py            # the demo's head, and one of 768 x 8192

Times are medians of interleaved runs, so that a machine's drift meets all implementations alike.
`loss` and `logprobs` are forward and backward, `evaluate` is the loss alone.
"""

from __future__ import annotations

import statistics
import time

import click
import jax
import jax.numpy as jnp

from internlm2_jax.kernels import cross_entropy as kernel
from internlm2_jax.losses import language_model


@click.command()
@click.option("--shapes", default="4x128x128x2048,8x1024x128x2048,4x512x768x8192", help="BxTxDxV")
@click.option("--chunks", default="0,256,512,1024", help="Tokens; 0 is the default choice.")
@click.option("--repeats", default=5)
def main(shapes: str, chunks: str, repeats: int) -> None:
    """Prints milliseconds of the plain path, and ratios to it for each chunk size."""
    sizes = [int(size) or None for size in chunks.split(",")]
    print(f"{jax.devices()[0].device_kind}, float32, chunk: ratio to the plain path")
    for shape in shapes.split(","):
        batch, length, dim, vocab = map(int, shape.split("x"))
        keys = jax.random.split(jax.random.key(0), 3)
        h = jax.random.normal(keys[0], (batch, length, dim))
        w = 0.05 * jax.random.normal(keys[1], (dim, vocab))
        y = jax.random.randint(keys[2], (batch, length), 0, vocab)
        for task in ("loss", "evaluate", "logprobs"):
            runs = {"plain": step(task, None, plain=True, arrays=(h, w, y))}
            runs |= {str(c or "default"): step(task, c, arrays=(h, w, y)) for c in sizes}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(repeats):
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    times[name].append(time.perf_counter() - start)
            median = {name: statistics.median(t) for name, t in times.items()}
            first = median.pop("plain")
            cells = [f"{name}: {seconds / first:.2f}" for name, seconds in median.items()]
            print(f"{shape:>16} {task:>9} {first * 1e3:8.1f} ms  " + "   ".join(cells), flush=True)


def step(task: str, chunk: int | None, *, plain: bool = False, arrays: tuple):
    """A compiled call of nothing that waits for its results."""
    mask = jnp.ones(arrays[2].shape)

    def value(h, w, y):
        if task == "logprobs":
            logprobs = (
                language_model.token_logprobs(h @ w, y)
                if plain
                else kernel.linear_logprobs(h, w, y, chunk=chunk)
            )
            return jnp.sum(logprobs**2)
        total, count = (
            language_model.cross_entropy(h @ w, y, mask)
            if plain
            else kernel.linear_cross_entropy(h, w, y, mask, chunk=chunk)
        )
        return total / count

    function = jax.jit(value if task == "evaluate" else jax.value_and_grad(value, (0, 1)))
    jax.block_until_ready(function(*arrays))
    return lambda: jax.block_until_ready(function(*arrays))


if __name__ == "__main__":
    main()
