"""Joining the processes of one run: a TPU pod, a SLURM job, or addresses given by hand.

Every host runs the same command. `start()` comes before any other use of jax and finds the others:

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    any cluster, by hand
    SLURM_JOB_ID with more than one task                          srun
    TPU chips on this host                                        a pod, by its metadata

With none of them a run is one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from internlm2_jax.errors import UserError

# A process that ends with an error waits so long for the others, then has them ended: they may be
# in a collective that waits for it.
SHUTDOWN_SECONDS = 30
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, if there are any; returns when all have come.

    Errors: UserError when only some of the variables are set, or one is no number.
    """
    if jax.distributed.is_initialized():
        return
    if kind := cluster(environment):
        by_hand = _by_hand(environment) if kind == "by hand" else {}
        jax.distributed.initialize(**by_hand, shutdown_timeout_seconds=SHUTDOWN_SECONDS)


def cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """What this process is a part of: "by hand", "slurm", "tpu", or None for nothing."""
    if any(name in environment for name in BY_HAND):
        return "by hand"
    if "SLURM_JOB_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    return "tpu" if _tpu_chips(environment) else None


def _by_hand(environment: Mapping[str, str]) -> dict[str, Any]:
    address, *numbers = (environment.get(name) for name in BY_HAND)
    missing = [name for name in BY_HAND if name not in environment]
    if missing:
        raise UserError(
            f"{', '.join(missing)} is not set; set all of {', '.join(BY_HAND)}, or give "
            "--coordinator, --num-processes and --process-id"
        )
    for name, value in zip(BY_HAND[1:], numbers, strict=True):
        if not str(value).isdecimal():
            raise UserError(f"{name} is {value!r}; it must be a number")
    count, index = (int(str(n)) for n in numbers)
    if not index < count:
        raise UserError(f"JAX_PROCESS_ID is {index}; with {count} processes it is 0 to {count - 1}")
    return {"coordinator_address": str(address), "num_processes": count, "process_id": index}


def _tpu_chips(environment: Mapping[str, str]) -> bool:
    """Whether this host has TPU chips that jax may use."""
    if environment.get("JAX_PLATFORMS", "tpu") not in ("", "tpu", "tpu,cpu"):
        return False
    devices = Path("/dev")
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))


# ------------------------------------------------------------- agreement between the processes


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def from_first(value: int) -> int:
    """The first process's `value`, everywhere."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def first_alone(work: Callable[[], None]) -> None:
    """Runs `work` in the first process while the others wait; when it fails, all of them end.

    Errors: what `work` raises; in the other processes UserError.
    """
    error: Exception | None = None
    if is_first():
        try:
            work()
        except Exception as raised:
            error = raised
    ended_well = from_first(int(error is None))
    if error is not None:
        raise error
    if not ended_well:
        raise UserError("the first process of this run has failed; its message says why")


def collective(stage: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a stage that all processes carry out together; other stages are the first one's."""
    stage.collective = True  # type: ignore[attr-defined]
    return stage


def all_agree(holds: bool) -> bool:
    """Whether `holds` in every process."""
    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.array(holds)).all())
