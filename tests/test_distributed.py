"""What `start()` takes a host's environment for."""

from __future__ import annotations

import pytest

from internlm2_jax import distributed
from internlm2_jax.errors import UserError

HAND = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


def test_clusters(monkeypatch):
    assert distributed.cluster({"JAX_PLATFORMS": "cpu"}) is None
    assert distributed.cluster({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}) == "slurm"
    # an interactive job of one task is one process
    alone = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "JAX_PLATFORMS": "cpu"}
    assert distributed.cluster(alone) is None
    assert distributed.cluster({**HAND, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}) == "by hand"
    monkeypatch.setattr(distributed.Path, "glob", lambda self, pattern: iter(["/dev/accel0"]))
    assert distributed.cluster({}) == "tpu"
    assert distributed.cluster({"JAX_PLATFORMS": "cpu"}) is None


def test_by_hand(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda **given: seen.update(given)
    )
    distributed.start(HAND)
    assert seen.pop("shutdown_timeout_seconds") == distributed.SHUTDOWN_SECONDS
    assert seen == {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": None}, "JAX_PROCESS_ID is not set; set all of"),
        ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES is 'four'; it must be a number"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID is 4; with 4 processes it is 0 to 3"),
    ],
)
def test_bad_environment(change, message):
    given = {k: v for k, v in {**HAND, **change}.items() if v is not None}
    with pytest.raises(UserError, match=message):
        distributed.start(given)
