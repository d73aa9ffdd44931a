"""From raw files to an aligned, evaluated language model: InternLM2 in JAX.

`import internlm2_jax` is fast and has no side effect; public names load what they need when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internlm2_jax.ablation import ablate
    from internlm2_jax.config import diff, load
    from internlm2_jax.notebook import open

__all__ = ["ablate", "diff", "load", "open"]
__version__ = "0.1.0"

_HOMES = {
    "ablate": "internlm2_jax.ablation",
    "diff": "internlm2_jax.config",
    "load": "internlm2_jax.config",
    "open": "internlm2_jax.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'internlm2_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
