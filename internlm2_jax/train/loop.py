"""The one training loop: pre-training, SFT, reward model and PPO all run through `fit`.

Everything a step sees is a function of the state, the step number and the batches left out so far,
so that a killed run which continues from a checkpoint repeats the very numbers of an uninterrupted
one. What a step measures is looked at when the next one is under way, so the device never waits for
the host; before anything is saved, all is looked at, so no checkpoint follows a bad loss.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from internlm2_jax import distributed, files
from internlm2_jax.errors import DiskError, Preempted, UserError
from internlm2_jax.progress import Progress
from internlm2_jax.train import faults, session, sinks
from internlm2_jax.train.checkpoint import Checkpoints, Retention
from internlm2_jax.train.clock import Clock
from internlm2_jax.train.faults import LossWatch, Recovery, Skip, Skips, StopSignal, Watchdog
from internlm2_jax.train.metrics import MetricsLog
from internlm2_jax.train.profiler import Profiler
from internlm2_jax.train.speed import Speed, Work

State = dict[str, Any]
_NO_RECOVERY = Recovery()


def fit(
    folder: str | Path,
    state: State,
    train: Callable[[int, State, Any], tuple[State, dict[str, Any]]],
    *,
    steps: int,
    label: str,
    unit: str = "step",
    batch: Callable[[int, int], Any] = lambda step, skipped: None,
    work: Callable[[int], Work] | None = None,
    shown: tuple[str, ...] = ("loss",),
    log_every: int = 10,
    validate: Callable[[int, State], dict[str, Any]] | None = None,
    validate_every: int = 0,
    sample: Callable[[int, State], list[dict[str, Any]]] | None = None,
    sample_every: int = 0,
    checkpoint_every: int = 100,
    keep: int = 2,
    keep_every: int = 0,
    milestones: Collection[int] = (),
    recovery: Recovery = _NO_RECOVERY,
) -> State:
    """Runs `train(step, state, batch) -> (state, metrics)` for steps 0 .. `steps` - 1, and resumes.

    Args:
        folder: the stage's folder; metrics.jsonl, speed.jsonl and checkpoints/ appear in it.
        state: the initial state, a dict of pytrees; also the shape of what is restored.
        train: one step; metrics are arrays, plain values or dicts of them. A list of rows under
            "samples" goes to samples.jsonl instead.
        batch: what `train` gets as its third argument: `batch(step, skipped)`, where `skipped`
            batches were left out since the last milestone.
        work: tokens and operations of a step, for tokens per second and MFU.
        shown: names of metrics to show beside the progress count.
        log_every: a metrics row every so many steps, and after the last one.
        validate: called as `validate(steps_done, state)`; its values are logged as a row with
            split "validation" every `validate_every` steps and after the last one (0: never).
        sample: the same, `sample_every` steps; its rows go to samples.jsonl.
        checkpoint_every: steps between checkpoints; one is always written after the last step.
        keep, keep_every: checkpoints that stay (train/checkpoint.py).
        milestones: numbers of steps done after which a phase ends: the run validates and saves, the
            checkpoint stays, and losses are judged afresh.
        recovery: what to do about a bad loss (train/faults.py).

    Returns the final state. Errors: UserError when the loss is bad once too often; DiskError when
    the disk is full or gone; Preempted after a SIGTERM, when all is saved.
    """
    # ---------------------------------------------------------------- resume
    if jax.process_count() > 1 and jax.sharding.get_mesh().empty:
        raise UserError(
            f"{label} has no layout, so it trains on one device: run this stage in one process, or "
            "give it a layout of all devices"
        )
    folder = Path(folder)
    asked = session.current()
    settings = folder / "settings.json"
    made_by = files.read_json(settings) if settings.is_file() else {}
    checkpoints = Checkpoints(folder, Retention(keep, keep_every, milestones))
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    step, state, record = checkpoints.restore_latest(state)
    # Restored arrays are committed to their devices, fresh ones are not: one kind, one compilation.
    state = jax.tree.map(lambda x: jax.device_put(x, x.sharding), state)
    _refuse_other(made_by, record, checkpoints)
    skips = Skips(folder, record.get("skips", ()))
    judge = LossWatch(recovery, record.get("losses", ()))
    metrics, samples, speeds = (
        MetricsLog(folder / name) for name in ("metrics.jsonl", "samples.jsonl", "speed.jsonl")
    )
    for log in (metrics, samples, speeds):
        log.rewind(step)

    compiled_at = {step, *milestones}  # steps that begin with a compilation, which no rate counts
    clock = Clock()
    speed = Speed(clock, work)
    measured: deque[tuple[int, dict[str, Any]]] = deque()  # steps done, what the last measured

    def is_mark(done: int) -> bool:
        return done == steps or done in milestones

    def last_milestone(step: int) -> int:
        return max((m for m in milestones if m <= step), default=0)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_named_last_good(checkpoints))
        progress = stack.enter_context(
            Progress(label, steps, unit, done=step, silent=not distributed.is_first())
        )
        writers = sinks.opened(asked, folder, step) if distributed.is_first() else []
        for writer in writers:
            stack.callback(writer.close)
        profiler = stack.enter_context(Profiler(asked.profile, folder / "profile"))
        stop = stack.enter_context(StopSignal())
        stack.enter_context(Watchdog(clock, label, asked.hang_seconds, asked.hang_status))
        if step:
            progress.note(f"continues after {unit} {step}")
        if asked.profile and not (asked.profile[0] <= steps and step < asked.profile[1] - 1):
            begin, end = asked.profile
            progress.note(
                f"traces nothing: {unit}s {begin} to {end - 1} are not among {step + 1} to {steps}"
            )

        def write(log: MetricsLog, done: int, **values: Any) -> None:
            log.log(done, **values)
            for writer in writers:
                writer.log(done, sinks.scalars(values, str(values.get("split", "speed"))))

        def look(leave: int) -> tuple[int, str] | None:
            """Judges and logs what was measured but for the newest `leave`: (steps, why) if bad."""
            while len(measured) > leave:
                done, values = measured.popleft()
                with clock.phase("step"):
                    values = jax.device_get(values)  # waits until that step has ended
                if reason := judge.judge(values):
                    return done, reason
                if done - 1 in compiled_at:
                    speed.reset()
                else:
                    speed.count(done - 1)
                for row in values.pop("samples", ()):
                    write(samples, done, **row)
                fast: dict[str, Any] = {}
                if is_mark(done) or done % log_every == 0:
                    write(metrics, done, split="train", **values)
                    if row := speed.row():
                        write(speeds, done, **row)
                        fast = {k: row[n] for k, n in _FAST.items() if n in row}
                progress.update(1, **{k: _plain(values[k]) for k in shown if k in values}, **fast)
            return None

        def save() -> None:
            with clock.phase("checkpoint"):
                checkpoints.save(
                    step,
                    state,
                    {
                        "step": step,
                        "milestone": last_milestone(step),
                        "skips": skips.rows(),
                        "losses": judge.losses,
                        **made_by,
                    },
                )

        while step < steps:
            # -------------------------------------------------------- train
            for skip in skips.all:
                if skip.at == step:
                    write(metrics, step + 1, split="event", event="skip", **skip.row())
            profiler.before(step + 1)
            with clock.phase("data"):
                rows = batch(step, skips.before(step, since=last_milestone(step)))
            with clock.phase("step"), jax.profiler.StepTraceAnnotation(label, step_num=step + 1):
                state, values = train(step, state, rows)
            measured.append((step + 1, values))
            step += 1
            stopping = stop()
            mark = is_mark(step)
            validating = validate_every and (mark or step % validate_every == 0)
            sampling = sample_every and (mark or step % sample_every == 0)
            saving = mark or stopping or step % checkpoint_every == 0
            compiled = step - 1 in compiled_at
            pause = compiled or validating or sampling or saving or profiler.ends(step)
            bad = look(leave=0 if pause else 1)
            with clock.phase("checkpoint"):
                checkpoints.check()

            # ----------------------------------------------------- rollback
            if bad:
                done, reason = bad
                with clock.phase("checkpoint"):
                    checkpoints.wait()
                good = checkpoints.newest() is not None
                if not good or len(skips.all) >= recovery.max_rollbacks:
                    raise faults.too_many(label, reason, f"after {unit} {done}", recovery, good)
                measured.clear()
                with clock.phase("checkpoint"):
                    step, state, record = checkpoints.restore_latest(abstract)
                judge = LossWatch(recovery, record["losses"])
                skips.add(Skip(step, done - step, f"{reason} after {unit} {done}"))
                for log in (metrics, samples, speeds):
                    log.rewind(step)
                speed.reset()
                progress.back_to(step)
                progress.note(f"{skips.all[-1].reason}: back to {step}, {done - step} batches out")
                continue
            profiler.after(step)

            # --------------------------------------------------- validation
            if validate and validating:
                with clock.phase("validation"):
                    write(metrics, step, split="validation", **validate(step, state))
            if sample and sampling:
                with clock.phase("samples"):
                    found = sample(step, state)
                for row in found:
                    write(samples, step, **row)

            # --------------------------------------------------- checkpoint
            if step in milestones:
                judge.forget()
            if saving:
                save()
            if stopping:
                with clock.phase("checkpoint"):
                    checkpoints.wait()
                raise Preempted(
                    f"{label}: told to stop after {unit} {step} of {steps}; all is saved, the same "
                    "command continues"
                )
        checkpoints.close()
    return state


_FAST = {"tok/s": "tokens_per_second", "mfu": "mfu"}


@contextlib.contextmanager
def _named_last_good(checkpoints: Checkpoints) -> Any:
    """A save under way is ended, however the body ends; a lost disk names what there is left."""
    try:
        yield
    except DiskError as error:
        good = checkpoints.newest()
        raise DiskError(f"{error}; the last good checkpoint is {good or 'none'}") from error
    except BaseException:
        with contextlib.suppress(Exception):  # the error under way is the one to report
            checkpoints.wait()
        raise


def _refuse_other(made_by: dict[str, Any], record: dict[str, Any], at: Checkpoints) -> None:
    old, new = record.get("fingerprint"), made_by.get("fingerprint")
    if old and new and old != new:
        raise UserError(
            f"{at.newest()} was saved under other settings ({old}, now {new}); "
            "remove it, or give another --run-dir"
        )


def _plain(value: Any) -> Any:
    return float(value) if hasattr(value, "item") else value
