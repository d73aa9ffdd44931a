"""Projections of q, k and v: three products or one with the weights side by side.

    python benchmarks/fused_qkv.py [--shapes 2048x768x12x4x64,...]

Forward and backward, timed in turn on the platform at hand; the ratio is what to quote. It is why
`models/attention.py` keeps three arrays (docs/design.md).
"""

from __future__ import annotations

import functools
import statistics
import time

import click
import jax
import jax.numpy as jnp


def separate(x: jax.Array, weights: tuple[jax.Array, ...]) -> list[jax.Array]:
    return [x @ w for w in weights]


def fused(x: jax.Array, weights: tuple[jax.Array, ...]) -> list[jax.Array]:
    (w, *ends) = weights
    return jnp.split(x @ w, [e.shape[0] for e in ends], axis=-1)


@click.command(help=__doc__)
@click.option("--shapes", default="2048x768x12x4x64,256x192x6x2x32", help="TxDxNxKxH, several.")
@click.option("--repeats", default=30)
def main(shapes: str, repeats: int) -> None:
    click.echo(jax.devices()[0].device_kind)
    for shape in shapes.split(","):
        tokens, width, heads, kv_heads, dim = map(int, shape.split("x"))
        sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        keys = jax.random.split(jax.random.key(0), 4)
        x = jax.random.normal(keys[0], (tokens, width))
        parts = tuple(
            jax.random.normal(k, (width, n)) for k, n in zip(keys[1:], sizes, strict=True)
        )
        marks = tuple(jnp.zeros(end) for end in (sizes[0], sizes[0] + sizes[1]))
        cases = {"separate": (separate, parts), "fused": (fused, (jnp.hstack(parts), *marks))}

        def step(function, x, weights):
            def loss(x, weights):
                return sum(jnp.sum(jnp.tanh(y)) for y in function(x, weights))

            return jax.grad(loss, (0, 1))(x, weights)

        runs = {n: (jax.jit(functools.partial(step, f)), x, w) for n, (f, w) in cases.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + 1):
            for name, (run, *arguments) in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(*arguments))
                if turn:
                    times[name].append(time.perf_counter() - start)
        ms = {name: 1e3 * statistics.median(t) for name, t in times.items()}
        shown = ", ".join(f"{name} {t:.2f} ms" for name, t in ms.items())
        click.echo(f"{shape}: {shown}, separate / fused {ms['separate'] / ms['fused']:.2f}")


if __name__ == "__main__":
    main()
