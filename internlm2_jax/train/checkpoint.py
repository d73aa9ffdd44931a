"""Orbax checkpoints: asynchronous, atomic, retained by a policy, damaged ones skipped.

    checkpoints/<step>/{params, opt_state, ..., record}

Every top-level entry of the state is an item of its own, so that the next stage restores the
parameters and leaves the optimizer on the disk. `record` is JSON: what a run must know beside
arrays (train/loop.py). A folder gets its name when it is whole, by a rename. Arrays are restored as
the wanted shardings say, so another mesh or another number of processes can go on; the processes of
a run share the file system.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from internlm2_jax import distributed, files, sharding
from internlm2_jax.errors import UserError

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
RECORD = "record"


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the `newest`, all of `every` so many steps (0: none), `milestones`.

    An older one is removed when a newer one is whole, not before.
    """

    newest: int = 2
    every: int = 0
    milestones: Collection[int] = ()

    def policy(self) -> Any:
        kept: list[Any] = [checkpoint_managers.LatestN(self.newest)]
        if self.every:
            kept.append(checkpoint_managers.EveryNSteps(self.every))
        if self.milestones:
            kept.append(checkpoint_managers.CustomSteps(sorted(self.milestones)))
        return checkpoint_managers.AnyPreservationPolicy(kept)


class Checkpoints:
    """The checkpoints of one stage. Of several processes, all call every method."""

    def __init__(self, stage_folder: str | Path, retention: Retention = Retention()):
        self.folder = Path(stage_folder).absolute() / FOLDER
        with files.explain_disk_errors(self.folder):
            self._manager = ocp.CheckpointManager(
                epath.Path(self.folder),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=retention.policy(),
                    cleanup_tmp_directories=True,
                    # Else the threads of a save wait for minutes for a folder that cannot be made.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
                handler_registry=_handlers(),
            )

    # -------------------------------------------------------------------- save
    def save(self, step: int, state: dict[str, Any], record: Mapping[str, Any] = {}) -> None:
        """Begins to write `state` and `record` as of after `step` steps.

        Returns when the arrays are in the host's memory, so the state may be donated; a save still
        under way is waited for. Errors: DiskError, here or from `check` and `wait`.
        """
        items: dict[str, Any] = {n: ocp.args.PyTreeSave(tree) for n, tree in state.items()}
        items[RECORD] = ocp.args.JsonSave(dict(record))
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def check(self) -> None:
        """Raises the error of a save that has failed since; does not wait for one under way."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Errors: DiskError."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._explained():
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self.close()

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        steps = whole_steps(self.folder)
        return self.folder / str(steps[-1]) if steps else None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with files.explain_disk_errors(self.folder):
                yield
        except Exception:
            if distributed.is_first():
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

    # ----------------------------------------------------------------- restore
    def restore_latest(self, state: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """(step, state, record) of the newest whole checkpoint; (0, `state`, {}) with none at all.

        `state`, arrays or ShapeDtypeStruct, gives shapes, dtypes and shardings. A checkpoint that
        one process cannot read is reported and left out by all; it is removed when an earlier one
        was restored, because the run will come to its step again.

        Errors: UserError when there are checkpoints and all of them are damaged.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        damaged: list[int] = []
        while (step := distributed.from_first(self._newest_but(damaged))) >= 0:
            restored, reason = self._try(step, abstract)
            if distributed.all_agree(not reason):
                for other in damaged:
                    self._manager.delete(other)
                return step, *restored
            reason = reason or "another process cannot read it"
            log.warning("checkpoint %s/%d is damaged (%s): skipped", self.folder, step, reason)
            damaged.append(step)
        if damaged:
            raise UserError(
                f"all checkpoints in {self.folder} are damaged "
                f"({', '.join(map(str, damaged))}); remove that folder to begin again"
            )
        return 0, state, {}

    def _newest_but(self, damaged: list[int]) -> int:
        return max((s for s in whole_steps(self.folder) if s not in damaged), default=-1)

    def _try(self, step: int, abstract: dict[str, Any]) -> tuple[Any, str]:
        """((state, record), why it cannot be read)."""
        path = self.folder / str(step)
        try:
            record = files.read_json(path / RECORD / "metadata")
            state = {name: _restore(path / name, tree) for name, tree in abstract.items()}
        except Exception as error:  # orbax raises many kinds for a damaged folder
            return None, _first_line(error)
        return (state, record), ""


def _handlers() -> Any:
    """Arrays uncompressed: weights shrink by a twelfth, at twice the time (benchmarks)."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
    registry.add(None, ocp.args.PyTreeSave, arrays)
    registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return registry


def whole_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder `checkpoints`, in order."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def latest_step(stage_folder: str | Path) -> int:
    """The newest checkpoint's step. Errors: UserError when there is none."""
    folder = Path(stage_folder) / FOLDER
    steps = whole_steps(folder)
    if not steps:
        raise UserError(f"{folder} holds no checkpoint; run the stage that makes it")
    return steps[-1]


def load_item(stage_folder: str | Path, item: str, abstract: Any) -> Any:
    """One item ("params", ...) of the newest checkpoint of a finished stage.

    `abstract` is a tree of ShapeDtypeStruct. Errors: UserError when it is missing or damaged.
    """
    folder = Path(stage_folder).absolute()
    path = folder / FOLDER / str(latest_step(folder)) / item
    try:
        return _restore(path, abstract)
    except Exception as error:  # orbax raises many kinds for a damaged folder
        raise UserError(
            f"checkpoint {path} is damaged ({_first_line(error)}); make it again with "
            f"--only {folder.name} --redo"
        ) from error


def _restore(path: Path, abstract: Any) -> Any:
    """The arrays of an item that this process keeps; it waits for no other process."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(epath.Path(path), abstract)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__


def save_model_json(stage_folder: str | Path, cfg: Any, head: str, params: str = "") -> None:
    """Writes model.json: what `load_model` needs beside the checkpoint.

    Args:
      params: the stage folder in this one whose checkpoint has the parameters; default: this one.
    """
    from internlm2_jax.models.config import to_json

    described = {"config": to_json(cfg), "head": head, **({"params": params} if params else {})}
    files.write_json(Path(stage_folder) / "model.json", described)


def save_model(stage_folder: str | Path, cfg: Any, head: str, params: Any) -> None:
    """Makes a stage folder of a model that no loop has saved. All processes must call it."""
    with Checkpoints(stage_folder) as checkpoints:
        if checkpoints.newest() is None:
            checkpoints.save(0, {"params": params})
    if distributed.is_first():
        save_model_json(stage_folder, cfg, head)


def load_model(stage_folder: str | Path, *, item: str = "params") -> tuple[Any, Any]:
    """(Model, params) of a finished stage; the parameters rest on the mesh in use.

    Errors: UserError when the mesh does not divide them, or they are missing or damaged.
    """
    from internlm2_jax.models.build import build
    from internlm2_jax.models.config import from_json

    description = files.read_json(Path(stage_folder) / "model.json")
    model = build(from_json(description["config"]), head=description["head"])
    at = Path(stage_folder) / description.get("params", "")
    if not (mesh := jax.sharding.get_mesh()).empty:
        sharding.Layout(**mesh.shape).check(model.axes, model.abstract)
    return model, load_item(at, item, sharding.abstract(model.abstract, model.axes))
