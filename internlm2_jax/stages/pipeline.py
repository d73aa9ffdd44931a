"""Runs stages in order, each in a folder of its own; skips what is done, continues what was cut.

A stage is a plain callable `stage(folder, **keywords)` that leaves its results in `folder` and can
be called again after it was killed. Its fingerprint is the hash of its name, its keywords and the
fingerprints of the stages whose output it reads. `done.json` is written last; a folder whose
`done.json` carries the same fingerprint is skipped, one with another fingerprint is refused.

With several processes, which share the file system, stages marked `distributed.collective` are
carried out by all together, the others by the first alone. The first writes every file but those of
checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import platform
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm2_jax import config, distributed, files
from internlm2_jax.errors import UserError

Stage = Callable[..., Any]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "apache-beam", "numpy")


@dataclasses.dataclass(frozen=True)
class Output:
    """Stands, among a stage's keywords, for the folder of another stage of the pipeline."""

    stage: str


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which stages to run: `only` these, or those from `start` on; `redo` repeats finished ones."""

    only: tuple[str, ...] = ()
    start: str | None = None
    redo: bool = False

    def names(self, stages: Sequence[str]) -> list[str]:
        """The selected names in pipeline order. Errors: UserError on an unknown name."""
        for name in [*self.only, *([self.start] if self.start else [])]:
            if name not in stages:
                raise UserError(f"no stage {name!r}; the stages are: {', '.join(stages)}")
        if self.only:
            return [name for name in stages if name in self.only]
        return list(stages)[stages.index(self.start) if self.start else 0 :]


class Pipeline:
    """Named stages in order.

    Built by an experiment as `Config(Pipeline, corpus=Partial(...), tokenizer=Partial(...), ...)`;
    `run(folder, selection)` carries it out.

    Attributes: `stages`; `fingerprints`, name -> hash of all that a stage's results depend on.
    """

    def __init__(self, **stages: functools.partial):
        self.stages = stages
        self.fingerprints: dict[str, str] = {}
        for name, stage in stages.items():
            for dependency in _inputs(stage):
                if dependency not in self.fingerprints:
                    raise UserError(f"stage {name!r} reads {dependency!r}, not an earlier stage")
            self.fingerprints[name] = files.fingerprint(
                {
                    "call": config.describe(stage),
                    "inputs": {d: self.fingerprints[d] for d in _inputs(stage)},
                }
            )

    def run(
        self,
        folder: str | Path,
        selection: Selection = Selection(),
        *,
        settings: Any = None,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        """Runs the selected stages in `folder`; finished ones are skipped unless `redo`.

        `settings`, the config this was built from, is saved beside the results.

        Errors: UserError when another process runs there, when a folder was made with other
        settings, when a needed stage is not done, and whatever a stage itself raises.
        """
        folder = Path(folder)
        selected = selection.names(list(self.stages))
        with contextlib.ExitStack() as stack:

            def prepare() -> None:
                stack.enter_context(_locked(folder))
                if selection.redo:
                    for name in selected:
                        shutil.rmtree(folder / name, ignore_errors=True)
                for name in self.stages:
                    self._refuse_other_settings(folder, name)
                self._write_summary(folder)
                if settings is not None:
                    config.save(settings, folder)

            distributed.first_alone(prepare)
            if not distributed.is_first():
                say = _silent
            for number, name in enumerate(selected, start=1):
                title = f"[{number}/{len(selected)}] {name}"
                done = folder / name / "done.json"
                if distributed.from_first(done.is_file()):
                    say(f"{title}: already done ({files.read_json(done)['wall_seconds']:.0f} s)")
                    continue
                for dependency in _inputs(self.stages[name]):
                    if not (folder / dependency / "done.json").is_file():
                        raise UserError(
                            f"stage {name!r} needs {dependency!r}, which is not done in {folder}; "
                            f"run it first, or run without --only"
                        )
                say(f"{title}: started")
                seconds = self._run_stage(folder, name)
                say(f"{title}: finished in {seconds:.0f} s")

    def _run_stage(self, folder: Path, name: str) -> float:
        stage = self.stages[name]
        target = folder / name
        keywords = {k: _resolve(v, folder) for k, v in stage.keywords.items()}
        made_by = {"fingerprint": self.fingerprints[name], "settings": config.describe(stage)}
        distributed.first_alone(lambda: files.write_json(target / "settings.json", made_by))
        with _Stopwatch(target / "elapsed.json") as watch:
            if getattr(stage.func, "collective", False):
                stage.func(target, **keywords)
            else:
                distributed.first_alone(lambda: stage.func(target, **keywords))
        done = {"fingerprint": made_by["fingerprint"], "wall_seconds": round(watch.seconds, 1)}
        distributed.first_alone(lambda: files.write_json(target / "done.json", done))
        return watch.seconds

    def _refuse_other_settings(self, folder: Path, name: str) -> None:
        path = folder / name / "settings.json"
        if not path.is_file():
            return
        earlier = files.read_json(path)
        if earlier["fingerprint"] == self.fingerprints[name]:
            return
        old = _leaves(earlier["settings"])
        new = _leaves(config.describe(self.stages[name]))
        changed = [k for k in [*old, *new] if old.get(k) != new.get(k)]
        what = (
            f"{changed[0]} was {old.get(changed[0])!r}, is now {new.get(changed[0])!r}"
            if changed
            else "a stage before it changed"
        )
        raise UserError(
            f"{folder / name} was made with other settings ({what}): "
            f"give another --run-dir, or repeat it here with --from {name} --redo"
        )

    def _write_summary(self, folder: Path) -> None:
        versions = {p: importlib.metadata.version(p) for p in ("internlm2-jax", *PACKAGES)}
        files.write_json(
            folder / "pipeline.json",
            {
                "name": folder.name,
                "stages": list(self.stages),
                "fingerprints": self.fingerprints,
                "versions": {"python": platform.python_version(), **versions},
                "command": shlex.join(["internlm2", *sys.argv[1:]]),
                "platform": f"{platform.system()} {platform.machine()}",
            },
        )


def _silent(line: str) -> None:
    """Of several processes one speaks."""


def _inputs(stage: functools.partial) -> list[str]:
    """Names of the stages that this one reads, in the order of its keywords."""
    values = list(stage.keywords.values())
    values += [v for group in values if isinstance(group, Mapping) for v in group.values()]
    return [v.stage for v in values if isinstance(v, Output)]


def _resolve(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return {k: _resolve(v, folder) for k, v in value.items()}
    return folder / value.stage if isinstance(value, Output) else value


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list):
        items = iter(enumerate(value))
    else:
        return {prefix: value}
    return {k: v for n, c in items for k, v in _leaves(c, f"{prefix}.{n}".strip(".")).items()}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the run folder for this process; the lock dies with the process."""
    with files.explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")  # noqa: SIM115
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is running in {folder}; wait for it, or give another --run-dir"
            ) from error
        yield


class _Stopwatch:
    """Wall time of a stage over all its attempts: the count survives a kill within seconds."""

    INTERVAL = 2.0

    def __init__(self, path: Path):
        self._path = path
        self._before = files.read_json(path)["seconds"] if path.is_file() else 0.0
        self._writes = distributed.is_first()
        self._stop = threading.Event()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def __enter__(self) -> _Stopwatch:
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()
        return self

    def _tick(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            self._write()

    def _write(self) -> None:
        if self._writes:
            with contextlib.suppress(OSError, UserError):  # the stage itself reports a full disk
                files.write_json(self._path, {"seconds": self.seconds})

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._write()
