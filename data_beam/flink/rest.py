"""Flink's REST interface, as far as this package asks it anything."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

ENDED = ("FINISHED", "CANCELED", "FAILED")
_SECONDS = 30.0


def get(master: str, path: str) -> Any:
    """The answer of the cluster at `master` (host:port or URL). Raises OSError."""
    with urllib.request.urlopen(_url(master) + path, timeout=_SECONDS) as response:
        return json.load(response)


def cancel(master: str, job: str) -> None:
    request = urllib.request.Request(f"{_url(master)}/jobs/{job}?mode=cancel", method="PATCH")
    urllib.request.urlopen(request, timeout=_SECONDS).close()


def cancel_named(master: str, name: str) -> int:
    """Cancels the jobs of this name that have not ended; returns how many there were."""
    running = [
        row["jid"]
        for row in get(master, "/jobs/overview")["jobs"]
        if row["name"] == name and row["state"] not in ENDED
    ]
    for job in running:
        cancel(master, job)
    return len(running)


def _url(master: str) -> str:
    return (master if "://" in master else f"http://{master}").rstrip("/")
