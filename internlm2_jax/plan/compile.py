"""Compiles a step for a pod that nobody has rented: the real compiler, no accelerator.

TPU programs are compiled by libtpu (`pip install "internlm2-jax[plan]"`), GPU programs by the CUDA
plugin (`pip install "internlm2-jax[plan-gpu]"`), which needs a description of the GPU instead of a
GPU. Nothing is allocated and nothing runs.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.metadata
import importlib.util
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import topologies

from internlm2_jax import files
from internlm2_jax.chips import GIB, Topology
from internlm2_jax.errors import UserError
from internlm2_jax.plan import environment


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs.

    `reported` is the compiler's own peak (0: it tells none). It counts the temporaries that live at
    one time, where `temporaries` is the room that they are laid out in.
    """

    arguments: int
    temporaries: int
    results: int
    aliased: int
    code: int
    reported: int = 0

    @property
    def peak(self) -> int:
        """Results that take the place of donated arguments are not counted twice."""
        return self.arguments + self.temporaries + self.results - self.aliased + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step.

    Attributes:
        memory: None when the compiler gave up because it does not fit.
        needed: bytes the program needs on one device.
        text: the compiled HLO; None when it does not fit.
        seconds: how long compiling took.
    """

    memory: Memory | None
    needed: float
    text: str | None
    seconds: float


def devices_of(topology: Topology) -> list[Any]:
    """Stand-ins for the pod's devices, for a mesh. Errors: UserError when a package is missing."""
    if topology.chip.platform == "gpu":
        return _gpu_devices(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"planning for {topology} needs TPU's compiler: pip install 'internlm2-jax[plan]'"
        )
    environment.prepare()
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    rings = (*topology.wraps, False)[:3]
    options["wrap"] = rings
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    description = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    return list(description.devices)


def compile_lowered(lowered: Any, topology: Topology, cache: Path | None = None) -> Compiled:
    """Compiles what `jitted.lower(...)` gave for devices of `devices_of`.

    Args:
      cache: a folder in which what was compiled once is found again.
    Errors: what the compiler raises, but for "does not fit", which is a result.
    """
    key = None
    if cache is not None:
        program = [str(topology), jax.__version__, _compiler_version(topology), lowered.as_text()]
        key = cache / f"{files.fingerprint(program)}.json"
        if key.is_file():
            return _from_cache(key)
    result = _compile(lowered, topology)
    if key is not None:
        _to_cache(key, result)
    return result


def _compile(lowered: Any, topology: Topology) -> Compiled:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(
                compiler_options=options if topology.chip.platform == "tpu" else None
            )
        except jax.errors.JaxRuntimeError as error:
            needed = _out_of_memory(str(error))
            if needed is None:
                raise
            return Compiled(None, needed, None, time.perf_counter() - start)
        seconds = time.perf_counter() - start
        text = _text(compiled, Path(dump))
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        results=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        reported=getattr(stats, "peak_memory_in_bytes", 0),
    )
    return Compiled(memory, memory.peak, text, seconds)


def _text(compiled: Any, dump: Path) -> str:
    """The compiled HLO; from libtpu's dump where jaxlib is older and cannot read its program."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        found = sorted(dump.glob("*.after_optimizations_after_buffer_assignment.txt"))
        if len(found) != 1:
            reason = str(error).splitlines()[0][:120]
            raise UserError(
                f"jaxlib {jaxlib.__version__} cannot read the program that libtpu made ({reason}); "
                "install a newer jax, or an older libtpu"
            ) from error
        return found[0].read_text()


def _compiler_version(topology: Topology) -> str:
    package = "libtpu" if topology.chip.platform == "tpu" else "jax-cuda13-plugin"
    return importlib.metadata.version(package)


def _to_cache(key: Path, result: Compiled) -> None:
    if result.text is not None:
        files.atomic_write(key.with_suffix(".hlo.gz"), gzip.compress(result.text.encode(), 6))
    stats = dataclasses.asdict(result.memory) if result.memory else None
    row = {"memory": stats, "needed": result.needed, "seconds": result.seconds}
    files.write_json(key, row)  # last: it says that the text is there


def _from_cache(key: Path) -> Compiled:
    row = files.read_json(key)
    if row["memory"] is None:
        return Compiled(None, row["needed"], None, row["seconds"])
    text = gzip.decompress(key.with_suffix(".hlo.gz").read_bytes()).decode()
    return Compiled(Memory(**row["memory"]), row["needed"], text, row["seconds"])


def _out_of_memory(message: str) -> float | None:
    """Bytes that a program needs, from the compiler's refusal; None when it is another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message) or re.search(
        r"Used ([\d.]+)([KMGT]) of", message
    )
    return float(match.group(1)) * 1024 ** ("KMGT".index(match.group(2)) + 1) if match else None


# --------------------------------------------------------------------------------- GPU

# Facts of a GPU that its compiler asks for (NVIDIA's data sheets and CUDA's device properties):
# multiprocessors, shared memory of one and of one block, L2, clock in GHz, capability.
_GPUS = {
    "a100": (108, 167_936, 166_912, 41_943_040, 1.41, (8, 0), "NVIDIA A100-SXM4-80GB"),
    "h100": (132, 233_472, 232_448, 52_428_800, 1.98, (9, 0), "NVIDIA H100 80GB HBM3"),
    "h200": (132, 233_472, 232_448, 52_428_800, 1.98, (9, 0), "NVIDIA H200"),
}


def _gpu_devices(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(
            f"planning for {topology} needs CUDA's compiler (no GPU): "
            "pip install 'internlm2-jax[plan-gpu]'"
        )
    description = topologies.get_topology_desc(
        topology.chip.name,
        "cuda",
        topology="x".join(map(str, topology.shape)),
        target_config=_target_config(topology),
    )
    return list(description.devices)


def _target_config(topology: Topology) -> str:
    chip = topology.chip
    cores, shared, block, l2, clock, (major, minor), name = _GPUS[chip.name]
    # sm_90a: the instructions that Hopper's matrix kernels need
    feature = "feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32
          shared_memory_per_block: 49152 shared_memory_per_core: {shared}
          shared_memory_per_block_optin: {block}
          threads_per_core_limit: 2048 core_count: {cores}
          fpus_per_core: {64 if major == 8 else 128}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(chip.hbm_bandwidth)} l2_cache_size: {l2} clock_rate_ghz: {clock}
          device_memory_size: {chip.hbm_bytes}
          cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 12 }}
        device_description_str: "{name}"
    """


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB"
