"""Progress of a job that runs in this process; on remote workers the calls do nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from internlm2_jax.progress import Progress

_lock = threading.Lock()
_shown: Progress | None = None
_bytes = 0


@contextlib.contextmanager
def show(label: str, total: int | None, unit: str) -> Iterator[None]:
    """Shows what `bump` counts while the body runs."""
    global _shown, _bytes
    with Progress(label, total=total, unit=unit) as progress:
        _shown, _bytes = progress, 0
        try:
            yield
        finally:
            _shown = None


def bump(count: int = 1, num_bytes: int = 0) -> None:
    """Counts `count` more units of work that held `num_bytes` bytes of text."""
    global _bytes
    with _lock:
        if _shown is not None:
            _bytes += num_bytes
            _shown.update(count, text=f"{_bytes / 1e6:.1f} MB")
