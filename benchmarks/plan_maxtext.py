"""Our pre-training step beside MaxText's, compiled for the same pod and read by the same counter.

    python -m venv PEER                                                       # Python 3.12
    PEER/bin/pip install "maxtext[tpu]==0.2.5" tokamax==0.0.14 "mpmath<1.4"
    python benchmarks/plan_maxtext.py --peer PEER/bin/python --topology v5p:4x4x4 --layout fsdp=64

The model is InternLM2-7B; in MaxText it is its Llama-3-8B with InternLM2's vocabulary and RoPE
base, Adam in float32, bf16 compute, and one-hot products for the embedding. MaxText's own
`train_compile` builds and compiles its step; only the compiled text and its memory are taken from
it. Its attention kernels tell the compiler no cost and are given theirs (`told`). `--rows` counts
per chip. A compile takes minutes; what is in `--keep` is not compiled again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import click

# MaxText names pods by cores (v5p) or chips (v5e); policies of the same class.
PODS = {"v5p:4x4x4": "v5p-128", "v5e:16x16": "v5e-256", "v5e:8x8": "v5e-64", "v5p:4x4x8": "v5p-256"}
POLICIES = {"full": "full", "minimal": "minimal", "save_qkv": "save_qkv_proj", "none": "none"}

WORKER = """
import glob, json, sys
from maxtext.trainers.pre_train import train_compile
target, compiles = sys.argv.pop(1), train_compile.jit_and_compile
def compile_and_keep(*args, **kwargs):
    compiled = compiles(*args, **kwargs)
    stats = compiled.memory_analysis()
    names = ("argument_size", "temp_size", "output_size", "alias_size", "generated_code_size",
             "peak_memory")
    sizes = {n: getattr(stats, n + "_in_bytes") for n in names}
    mesh = dict(args[3].shape)
    devices = [[d.id, list(d.coords)] for d in args[3].devices.flat]
    dumped = "/*jit_train_step*.after_optimizations_after_buffer_assignment.txt"
    try:
        text = compiled.as_text()
    except Exception:
        text = open(glob.glob(target + ".dump" + dumped)[0]).read()
    open(target + ".txt", "w").write(text)
    json.dump({"memory": sizes, "mesh": mesh, "devices": devices}, open(target + ".json", "w"))
    return compiled
train_compile.jit_and_compile = compile_and_keep
train_compile.main(sys.argv)
"""


def peer(python: str, target: Path, topology: str, layout: str, length: int, rows: float,
         remat: str, extra: tuple[str, ...]) -> None:  # fmt: skip
    """Runs MaxText's train_compile and leaves TARGET.txt (HLO) and TARGET.json."""
    axes = dict(part.split("=") for part in layout.split(","))
    settings = {
        "compile_topology": PODS[topology],
        "compile_topology_num_slices": 1,
        "model_name": "llama3-8b",
        "override_model_config": True,
        "vocab_size": 92544,
        "rope_max_timescale": 1000000,
        "use_iota_embed": True,
        "max_target_length": length,
        "per_device_batch_size": rows,
        "remat_policy": POLICIES[remat],
        "allow_split_physical_axes": True,
        "base_output_directory": tempfile.gettempdir(),
        "run_name": "plan",
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
        "log_config": False,
        **{f"ici_{name}_parallelism": size for name, size in axes.items()},
    }
    folder = subprocess.run(
        [python, "-c", "import maxtext; print(list(maxtext.__path__)[0])"],
        check=True, capture_output=True, text=True,
    ).stdout.split()[-1]  # fmt: skip
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        # jaxlib may be too old to read libtpu's program back; then its dump is read
        "XLA_FLAGS": f"--xla_dump_to={target}.dump --xla_dump_hlo_as_text",
    }
    command = [python, "-c", WORKER, str(target), f"{folder}/configs/base.yml"]
    command += [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in settings.items()]
    subprocess.run([*command, *extra], check=True, env=environment)


def ours(target: Path, topology: str, layout: str, length: int, rows: float, remat: str) -> None:
    """The same through our own step."""
    from internlm2_jax.chips import parse_topology
    from internlm2_jax.models.config import preset
    from internlm2_jax.plan import steps
    from internlm2_jax.plan.compile import compile_lowered, devices_of
    from internlm2_jax.sharding import Layout

    pod = parse_topology(topology)
    mesh = Layout.parse(layout).mesh(devices_of(pod))
    cfg = preset("internlm2_7b", max_position_embeddings=length)
    batch = round(rows * pod.num_devices)
    lowered = steps.train_step(cfg, mesh, batch, length, remat=remat)()
    compiled = compile_lowered(lowered, pod)
    if compiled.memory is None or compiled.text is None:
        raise click.ClickException(f"ours needs {compiled.needed / 2**30:.1f} GiB: does not fit")
    memory = compiled.memory
    sizes = {
        "argument_size": memory.arguments,
        "temp_size": memory.temporaries,
        "output_size": memory.results,
        "alias_size": memory.aliased,
        "generated_code_size": memory.code,
        "peak_memory": memory.reported,
    }
    devices = [[d.id, list(d.coords)] for d in mesh.devices.flat]
    target.with_suffix(".txt").write_text(compiled.text)
    found = {"memory": sizes, "mesh": dict(mesh.shape), "devices": devices}
    target.with_suffix(".json").write_text(json.dumps(found))


def told(text: str, attention: float) -> str:
    """The compiled text with a cost for MaxText's splash kernels, which tell none.

    `attention` is what the two products of causal attention cost one layer and chip; the kernels
    compute 2 products forward, 3 for the queries' gradient and 4 for that of keys and values.
    """
    products = {"fwd": 2, "dq": 3, "dkv": 4}

    def cost(match: re.Match) -> str:
        flops = round(attention * products[match["kind"]] / 2)
        return match[0] + f' told={{"cost_estimate": {{"flops": {flops}}}}},'

    kernels = r"%splash_mha_(?P<kind>fwd|dq|dkv)[\w.]* = .*custom_call_target=\"tpu_custom_call\","
    return re.sub(kernels, cost, text)


def measure(target: Path, topology: str, length: int, rows: float) -> dict[str, float]:
    """The figures of one compiled step, by our counter and roofline."""
    from types import SimpleNamespace

    from internlm2_jax.chips import GIB, parse_topology
    from internlm2_jax.models.config import preset
    from internlm2_jax.plan import hlo, roofline
    from internlm2_jax.plan.links import Links

    pod = parse_topology(topology)
    found = json.loads(target.with_suffix(".json").read_text())
    devices = [SimpleNamespace(id=i, coords=c, slice_index=0) for i, c in found["devices"]]
    cfg = preset("internlm2_7b")
    model_flops = rows * length * cfg.train_flops(length)
    causal = 2 * rows * length * length * cfg.num_heads * cfg.head_dim
    program = hlo.read(told(target.with_suffix(".txt").read_text(), causal), found["mesh"])
    times = roofline.estimate(program, pod.chip, Links(pod, devices).seconds)
    m = found["memory"]
    held = m["argument_size"] + m["temp_size"] + m["output_size"] - m["alias_size"]
    totals = program.collectives()
    for warning in program.warnings:
        click.echo(f"{target.name}: {warning}", err=True)
    return {
        "peak GiB": (held + m["generated_code_size"]) / GIB,
        "of it temporaries": m["temp_size"] / GIB,
        "compiler's peak GiB": m["peak_memory"] / GIB,
        "TFLOP": program.flops / 1e12,
        "HBM GB": program.hbm_bytes / 1e9,
        "collectives": float(sum(t.count for t in totals)),
        "payload GB": sum(t.payload for t in totals) / 1e9,
        "sent GB": sum(t.sent for t in totals) / 1e9,
        "of it async": sum(t.sent for t in totals if t.asynchronous) / 1e9,
        "compute s": times.compute,
        "memory s": times.memory,
        "exposed s": times.exposed_seconds,
        "step s": times.seconds,
        "MFU %": 100 * model_flops / (times.seconds * pod.chip.flops),
    }


@click.command(help=__doc__)
@click.option("--peer", "python", help="Python of a venv with maxtext[tpu].")
@click.option("--topology", type=click.Choice(sorted(PODS)), default="v5p:4x4x4")
@click.option("--layout", default="fsdp=64")
@click.option("--length", default=4096)
@click.option("--rows", default=4.0, help="Rows per chip.")
@click.option("--remat", type=click.Choice(sorted(POLICIES)), default="full")
@click.option("--extra", multiple=True, metavar="NAME=VALUE", help="More settings of MaxText.")
@click.option("--keep", type=click.Path(path_type=Path), default=Path("runs/plan_maxtext"))
@click.option("--only", type=click.Choice(["peer", "ours"]), help="Compile and show one of them.")
def main(
    python: str | None,
    topology: str,
    layout: str,
    length: int,
    rows: float,
    remat: str,
    extra: tuple[str, ...],
    keep: Path,
    only: str | None,
) -> None:
    if python is None and only != "ours":
        raise click.UsageError("--peer is missing; or give --only ours")
    keep.mkdir(parents=True, exist_ok=True)
    name = "_".join([topology, layout, f"{length}x{rows:g}", remat, *extra])
    name = name.replace(":", "-").replace(".", "-")
    columns = {}
    for who in ("peer", "ours"):
        if only not in (None, who):
            continue
        target = keep / f"{who}_{name}"
        if not target.with_suffix(".json").is_file():
            if who == "peer" and python:
                peer(python, target, topology, layout, length, rows, remat, extra)
            else:
                ours(target, topology, layout, length, rows, remat)
        columns[who] = measure(target, topology, length, rows)
    click.echo(f"{topology}, {layout}, {length} x {rows:g} a chip, {remat}; per chip and step")
    click.echo(f"{'':20}" + "".join(f"{who:>12}" for who in columns))
    for row in next(iter(columns.values())):
        click.echo(f"{row:20}" + "".join(f"{c[row]:12.2f}" for c in columns.values()))


if __name__ == "__main__":
    main()
