"""Orbax checkpoints: atomic, retained by number, damaged ones skipped.

A state is a dict whose top-level entries ("params", "opt_state", ...) are stored as items of their
own, so that the next stage restores the parameters and leaves the optimizer on the disk.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from internlm2_jax import files
from internlm2_jax.errors import UserError

log = logging.getLogger(__name__)
FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one stage, in `<stage folder>/checkpoints/<step>`."""

    def __init__(self, stage_folder: str | Path, *, keep: int = 2):
        self.folder = Path(stage_folder).absolute() / FOLDER
        with files.explain_disk_errors(self.folder):
            self._manager = ocp.CheckpointManager(
                epath.Path(self.folder),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
                ),
            )

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes `state` as of after `step` steps. Errors: UserError when the disk refuses."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in state.items()}
        try:
            with files.explain_disk_errors(self.folder):
                self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception:
            self._discard_unfinished()
            raise

    def _discard_unfinished(self) -> None:
        """Removes what a failed save left; orbax's threads may still be writing, so look twice."""
        clean = 0
        for _ in range(50):
            unfinished = list(self.folder.glob("*.orbax-checkpoint-tmp"))
            for folder in unfinished:
                shutil.rmtree(folder, ignore_errors=True)
            clean = 0 if unfinished else clean + 1
            if clean == 2:
                return
            time.sleep(0.2)

    def restore_latest(self, state: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """(step, state) of the newest whole checkpoint; (0, `state`) when there is none.

        `state` gives shapes, dtypes and shardings. A damaged checkpoint is reported, removed, and
        the one before it is used.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        for step in sorted(self._manager.all_steps(), reverse=True):
            items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # orbax raises many kinds for a damaged folder
                reason = str(error).strip().splitlines()[0][:200] or type(error).__name__
                log.warning("checkpoint %s/%d is damaged (%s): skipped", self.folder, step, reason)
                self._manager.delete(step)
                continue
            return step, dict(restored.items())
        return 0, state

    def close(self) -> None:
        self._manager.close()


def latest_step(stage_folder: str | Path) -> int:
    """The newest checkpoint's step. Errors: UserError when there is none."""
    folder = Path(stage_folder) / FOLDER
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    if not steps:
        raise UserError(f"{folder} holds no checkpoint; run the stage that makes it")
    return max(steps)


def load_item(stage_folder: str | Path, item: str, abstract: Any) -> Any:
    """One item ("params", ...) of the newest checkpoint of a finished stage.

    `abstract` is a tree of ShapeDtypeStruct. Errors: UserError when it is missing or damaged.
    """
    folder = Path(stage_folder).absolute()
    path = folder / FOLDER / str(latest_step(folder)) / item
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(epath.Path(path), abstract)
    except Exception as error:  # orbax raises many kinds for a damaged folder
        reason = str(error).strip().splitlines()[0][:160] or type(error).__name__
        raise UserError(
            f"checkpoint {path} is damaged ({reason}); make it again with "
            f"--only {folder.name} --redo"
        ) from error


def save_model_json(stage_folder: str | Path, cfg: Any, head: str) -> None:
    """Writes model.json: what `load_model` needs beside the checkpoint."""
    from internlm2_jax.models.config import to_json

    files.write_json(Path(stage_folder) / "model.json", {"config": to_json(cfg), "head": head})


def load_model(stage_folder: str | Path, *, item: str = "params") -> tuple[Any, Any]:
    """(Model, params) of a finished stage."""
    from internlm2_jax.models.build import build
    from internlm2_jax.models.config import from_json

    description = files.read_json(Path(stage_folder) / "model.json")
    model = build(from_json(description["config"]), head=description["head"])
    return model, load_item(stage_folder, item, model.abstract)
