"""Attention implementations side by side.

    python benchmarks/attention.py                      # times, on the platform at hand
    python benchmarks/attention.py --compile-for v5p    # what the TPU compiler says, with no TPU

Times are medians of interleaved runs, so that a machine's drift meets all implementations alike;
the ratio is to the fastest. An implementation that cannot run here says why.

`--compile-for` (v5e, v5p or v6e; needs libtpu) compiles each TPU kernel for one chip and prints
numbers of the compiler, none of which is a time: temporaries in HBM, scratch in VMEM, and the
length of the schedule of a kernel's inner loop in bundles, which are cycles if no copy is late. A
core issues one bundle a cycle, so the same work in fewer bundles is faster; waiting for HBM is not
in it.
"""

from __future__ import annotations

import functools
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp

from internlm2_jax.errors import UserError
from internlm2_jax.kernels import adapters, attention, decode_gqa, flash_blocks, flash_gqa

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KERNELS: dict[str, Callable[..., Any]] = {
    "flash_gqa": flash_gqa.flash_gqa,
    "splash": adapters.splash,
    "splash, fused backward": functools.partial(adapters.splash, fused_backward=True),
}


@click.command()
@click.option("--tokens", default=8192, help="Tokens of a batch, in rows of each length.")
@click.option("--heads", type=int, help="Default: 6 on a CPU, 4 to compile, else 32.")
@click.option("--kv-heads", type=int, help="Default: 2 on a CPU, 1 to compile, else 8.")
@click.option("--head-dim", type=int, help="Default: 32 on a CPU, else 128.")
@click.option("--lengths", help="Of rows, with commas between.")
@click.option("--dtype", help="Default: float32 on a CPU, else bfloat16.")
@click.option("--segments/--no-segments", default=False, help="Four documents a row.")
@click.option("--repeats", default=5)
@click.option("--compile-for", type=click.Choice(list(TOPOLOGIES)))
def main(
    tokens: int,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    lengths: str | None,
    dtype: str | None,
    segments: bool,
    repeats: int,
    compile_for: str | None,
) -> None:
    """Prints one table per mode."""
    small = compile_for is None and jax.default_backend() == "cpu"
    # One kv head says all that a compiler can.
    defaults = (6, 2, 32) if small else (4, 1, 128) if compile_for else (32, 8, 128)
    given = (heads, kv_heads, head_dim)
    heads, kv_heads, head_dim = (a or b for a, b in zip(given, defaults, strict=True))
    lengths = lengths or ("128,512,1024" if small else "4096,32768" if compile_for else "4096,8192")
    dtype = dtype or ("float32" if small else "bfloat16")
    shape = (heads, kv_heads, head_dim)
    rows = [int(length) for length in lengths.split(",")]
    if compile_for:
        report_compiler(compile_for, rows, shape, segments)
        return
    print(
        f"{jax.devices()[0].device_kind}, {tokens} tokens, {heads}/{kv_heads} x {head_dim}, {dtype}"
    )
    for length in rows:
        report_times(max(1, tokens // length), length, shape, dtype, segments, repeats)
    report_decoding(8 if small else ROWS, 512 if small else LENGTH, shape, repeats)


# Times


def report_times(
    batch: int, length: int, shape: tuple[int, int, int], dtype: str, segments: bool, repeats: int
) -> None:
    """Milliseconds, and the ratio to the fastest, of every implementation that runs here."""
    heads, kv_heads, dim = shape
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, (batch, length, n, dim), dtype)
        for key, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    ids = None
    if segments:
        ids = jnp.broadcast_to(jnp.arange(length) * 4 // length, (batch, length))

    def forward(q, k, v, dout, impl):
        return attention.dispatch(q, k, v, segment_ids=ids, impl=impl)

    def both(q, k, v, dout, impl):
        out, pull = jax.vjp(functools.partial(forward, dout=None, impl=impl), q, k, v)
        return out, *pull(dout)

    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    why: dict[str, str] = {}
    for name in attention.IMPLEMENTATIONS:
        for mode, function in (("forward", forward), ("forward+backward", both)):
            compiled = jax.jit(functools.partial(function, impl=name))
            try:
                jax.block_until_ready(compiled(q, k, v, dout))
            except UserError as error:
                why[name] = str(error)
                continue
            runs[name, mode] = functools.partial(compiled, q, k, v, dout)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[key].append(time.perf_counter() - start)
    median = {key: statistics.median(values) for key, values in times.items()}
    modes = ("forward", "forward+backward")
    fastest = {mode: min(t for (_, m), t in median.items() if m == mode) for mode in modes}
    print(f"\n{f'{batch} x {length}':<24}" + "".join(f"{mode:>26}" for mode in modes))
    for name in attention.IMPLEMENTATIONS:
        cells = [
            f"{median[name, m] * 1e3:.2f} ms ({median[name, m] / fastest[m]:.2f}x)"
            if (name, m) in median
            else "-"
            for m in modes
        ]
        print(f"{name:<24}" + "".join(f"{cell:>26}" for cell in cells) + "  " + why.get(name, ""))


# Decoding

ROWS, LENGTH, PAGE = 32, 4096, 128


def decoders(
    rows: int, length: int, shape: tuple[int, int, int]
) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Functions and the shapes of their arguments: one new position for each of full rows."""
    heads, kv_heads, dim = shape
    width = -(-length // PAGE)
    q, lengths = ((rows, 1, heads, dim), jnp.bfloat16), ((rows,), jnp.int32)
    pages = ((rows * width, kv_heads, PAGE, dim), jnp.bfloat16)
    table = ((rows, width), jnp.int32)

    def ragged(q, pages, lengths, table):
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

        starts, count = jnp.arange(rows + 1, dtype=jnp.int32), jnp.array([rows], jnp.int32)
        return ragged_paged_attention(
            q[:, 0], pages, lengths, table, starts, count, sm_scale=dim**-0.5
        )

    def of_one_layer(impl: str) -> Callable[..., Any]:
        def run(q, k, v, table, lengths):
            return decode_gqa.dispatch(q, k[None], v[None], jnp.int32(0), table, lengths, impl=impl)

        return run

    both = ((rows * width, PAGE, 2 * kv_heads, dim), jnp.bfloat16)
    ours = [q, pages, pages, table, lengths]
    return {
        "decode_gqa": (of_one_layer("decode_gqa"), ours),
        "decoding, reference": (of_one_layer("reference"), ours),
        "ragged_paged_attention": (ragged, [q, both, lengths, table]),
    }


def report_decoding(rows: int, length: int, shape: tuple[int, int, int], repeats: int) -> None:
    """Milliseconds and GB/s of keys and values, beside those of a plain copy."""
    width = -(-length // PAGE)
    table = jnp.arange(rows * width, dtype=jnp.int32).reshape(rows, width)
    runs: dict[str, Callable[[], Any]] = {}
    for name, (function, shapes) in decoders(rows, length, shape).items():
        arguments = []
        for size, dtype in shapes:
            if dtype == jnp.int32:
                arguments.append(table if len(size) == 2 else jnp.full(size, length, dtype))
            else:
                arguments.append(jax.random.normal(jax.random.key(0), size, dtype))
        if name == "ragged_paged_attention" and jax.default_backend() != "tpu":
            continue
        run = functools.partial(jax.jit(function), *arguments)
        try:
            jax.block_until_ready(run())
        except UserError as error:
            print(f"{name:<24}{error}")
            continue
        runs[name] = run
    pages = jax.random.normal(jax.random.key(0), (2 * rows * length, *shape[1:]), jnp.bfloat16)
    runs["copy"] = functools.partial(jax.jit(jnp.negative), pages)
    jax.block_until_ready(runs["copy"]())
    print(f"\n{f'decoding, {rows} x {length}':<24}{'':>14}{'keys and values':>18}")
    for name, run in runs.items():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times)
        moved = pages.nbytes * (2 if name == "copy" else 1)  # a copy reads and writes
        print(f"{name:<24}{seconds * 1e3:>11.2f} ms{moved / seconds / 1e9:>13.1f} GB/s")


# What the TPU compiler says


def report_compiler(chip: str, lengths: list[int], shape: tuple[int, int, int], segments: bool):
    """A line for each TPU kernel and length, and one for decoding."""
    dump = tempfile.TemporaryDirectory()
    # Read when libtpu is loaded, at the first topology.
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump.name}"
        " --xla_jf_dump_llo_text=true"
        " --xla_jf_dump_llo_pass_label_regex=.*(final_bundles|original).*"
    )
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[:1]
    mesh = jax.make_mesh((1,), ("data",), devices=devices)
    heads, kv_heads, dim = shape
    print(f"{chip}, one chip, one row, {heads}/{kv_heads} x {dim}, bfloat16, forward+backward")
    print("bundles are those of 1024 x 512 scores (decoding: of a step), without and with a mask\n")
    print(f"{'':<32}{'HBM temp':>12}{'HBM traffic':>14}{'GFLOP':>8}  kernels: bundles, VMEM")
    groups = heads // kv_heads
    for length in lengths:
        q, k = ((1, length, heads, dim), jnp.bfloat16), ((1, length, kv_heads, dim), jnp.bfloat16)
        ids = ((1, length), jnp.int32) if segments else None
        for name, kernel in KERNELS.items():

            def step(q, k, v, dout, ids, kernel=kernel):
                out, pull = jax.vjp(functools.partial(kernel, segment_ids=ids), q, k, v)
                return out, *pull(dout)

            # Rows and keys of the innermost block of scores.
            block = (512, 512)
            if name == "flash_gqa":
                blocks = flash_blocks.Blocks.default(groups, length, length)
                block = (blocks.queries * groups, blocks.keys)
            report_compiled(
                f"{name}, {length}", mesh, Path(dump.name), block, step, q, k, k, q, ids
            )
    for name, (function, shapes) in decoders(ROWS, LENGTH, shape).items():
        report_compiled(
            f"{name}, {ROWS} x {LENGTH}", mesh, Path(dump.name), None, function, *shapes
        )
    dump.cleanup()


def report_compiled(
    title: str,
    mesh: jax.sharding.Mesh,
    dump: Path,
    block: tuple[int, int] | None,
    function: Callable[..., Any],
    *shapes: Any,
) -> None:
    """Compiles for the mesh and prints a line."""
    for old in dump.iterdir():
        old.unlink()
    spec = jax.NamedSharding(mesh, jax.P())
    arguments = [
        None if shape is None else jax.ShapeDtypeStruct(*shape, sharding=spec) for shape in shapes
    ]
    try:
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).lower(*arguments).compile()
    except (UserError, jax.errors.JaxRuntimeError) as error:
        print(f"{title:<32}does not compile: {str(error).splitlines()[0][:150]}")
        return
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    # Kernels without a cost estimate have no FLOPs that the compiler knows of.
    gflop = f"{cost['flops'] / 1e9:.0f}" if cost["flops"] > 1e9 else "?"
    kernels = []
    for path in sorted(dump.glob("*final_bundles.txt")):
        text = path.read_text(errors="replace")
        # The last line names the instruction; fusions of XLA's own are of no interest.
        if "schedule-analysis" not in path.name and "= custom-call(" in text[-5000:]:
            kernels += describe(path, text, block)
    print(
        f"{title:<32}{memory.temp_size_in_bytes / 2**20:>8.1f} MiB"
        f"{cost['bytes accessed'] / 2**20:>10.0f} MiB{gflop:>8}  " + "; ".join(kernels)
    )


def describe(path: Path, text: str, block: tuple[int, int] | None) -> list[str]:
    """A kernel's name, the bundles of its bodies, its VMEM; nothing if it has no products.

    Bodies are the stretches without a branch that do the most matrix products: one without and one
    with the mask, or a single one.
    """
    stretches, start, products = [], 0, 0
    for line in text.splitlines():
        at = re.match(r"\s*(0x[0-9a-f]+)\s+(PF|LB|LH|PB)?\s*:", line)
        if not at:
            continue
        if at[2] or "sbr.rel" in line:
            stretches.append((products, int(at[1], 16) - start))
            start, products = int(at[1], 16), 0
        products += line.count(".mxu")
    unit = 1.0 if block is None else (1024 * 512) / math.prod(block)
    most = max((products for products, _ in stretches), default=0)
    if not most:
        return []
    bodies = sorted(n for products, n in stretches if products > most / 2)
    name = re.sub(r"^\d+-|-\d+-final_bundles.*$", "", path.name)
    before = next(path.parent.glob(f"*-{name}-*-original.txt")).read_text(errors="replace")
    vmem = sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", before))
    cells = " / ".join(f"{n * unit:.0f}" for n in bodies)
    return [f"{name} {cells}, {vmem / 2**20:.1f} MiB"]


if __name__ == "__main__":
    main()
