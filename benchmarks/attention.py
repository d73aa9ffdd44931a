"""Attention implementations, forward and backward, as ratios to the reference.

    python benchmarks/attention.py                # 8192 tokens in rows of 128, 512, 1024

Times are medians of interleaved runs, so that a machine's drift meets all implementations alike.
"""

from __future__ import annotations

import statistics
import time

import click
import jax
import jax.numpy as jnp

from internlm2_jax.kernels import attention

IMPLEMENTATIONS = ("reference", "blockwise")


@click.command()
@click.option("--tokens", default=8192)
@click.option("--heads", default=6)
@click.option("--kv-heads", default=2)
@click.option("--head-dim", default=32)
@click.option("--lengths", default="128,512,1024")
@click.option("--repeats", default=5)
def main(tokens: int, heads: int, kv_heads: int, head_dim: int, lengths: str, repeats: int) -> None:
    """Prints milliseconds and the ratio to the reference for each row length."""
    print(
        f"{jax.devices()[0].device_kind}, {tokens} tokens, {heads}/{kv_heads} x {head_dim}, float32"
    )
    print(f"{'rows of':>8}  " + "".join(f"{n:>22}" for n in IMPLEMENTATIONS))
    for length in map(int, lengths.split(",")):
        batch = tokens // length
        keys = jax.random.split(jax.random.key(0), 3)
        q = jax.random.normal(keys[0], (batch, length, heads, head_dim))
        k, v = (jax.random.normal(key, (batch, length, kv_heads, head_dim)) for key in keys[1:])

        def step(implementation: str, q=q, k=k, v=v):
            def loss(q, k, v):
                return jnp.sum(attention.dispatch(q, k, v, impl=implementation) ** 2)

            function = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
            jax.block_until_ready(function(q, k, v))
            return lambda: jax.block_until_ready(function(q, k, v))

        steps = {name: step(name) for name in IMPLEMENTATIONS}
        times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
        for _ in range(repeats):
            for name, run in steps.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        median = {name: statistics.median(t) for name, t in times.items()}
        cells = [
            f"{median[n] * 1e3:9.0f} ms ({median[n] / median['reference']:.2f}x)" for n in median
        ]
        print(f"{length:>8}  " + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
