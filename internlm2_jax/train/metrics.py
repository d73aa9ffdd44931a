"""The metrics file of a stage: one JSON object a line, the same after a kill and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from internlm2_jax import files


class MetricsLog:
    """Appends rows {"step": int, name: number, ...} to `path`.

    `rewind(step)` drops every row after `step`, so that a resumed run leaves the file that an
    uninterrupted one would have left. Nothing that depends on the clock belongs here. Of several
    processes the first one writes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._writes = jax.process_index() == 0
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Keeps the rows of steps up to `step`; a last line that a kill cut short goes too."""
        if not self._writes or not self.path.is_file():
            return
        *whole, _ = self.path.read_bytes().split(b"\n")
        rows = [files.parse_json(line, f"{self.path}:{i}") for i, line in enumerate(whole, start=1)]
        files.write_jsonl(self.path, [row for row in rows if row["step"] <= step])

    def log(self, step: int, **values: Any) -> None:
        """Appends one row; arrays become numbers and lists of numbers."""
        if not self._writes:
            return
        row = jax.tree.map(lambda v: v.tolist() if hasattr(v, "tolist") else v, values)
        with files.explain_disk_errors(self.path), open(self.path, "ab") as handle:
            handle.write(files.json_bytes({"step": step, **row}) + b"\n")
