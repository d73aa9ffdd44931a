"""What must be set before jax and libtpu start, so that they compile without an accelerator."""

from __future__ import annotations

import os

# Without the first two libtpu asks the cloud's metadata server who it is, and waits for it.
VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # No accelerator of this machine takes part, and none must be waited for.
    "JAX_PLATFORMS": "cpu",
}


def prepare() -> None:
    """Sets what is not set yet; to be called before jax is imported."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
