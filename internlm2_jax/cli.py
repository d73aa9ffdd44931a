"""The `internlm2` command: from experiments and models to runs, pages, answers and scores."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from internlm2_jax import __version__, config, files
from internlm2_jax.data.commands import conversations
from internlm2_jax.errors import RESTART, Preempted, UserError
from internlm2_jax.evals import command as evals_command
from internlm2_jax.infer import commands
from internlm2_jax.plan.command import plan
from internlm2_jax.rlhf.annotate import annotate

RUN_FILES = ("model.json", "pipeline.json")  # one of them marks a stage or a run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """From raw files to an aligned, evaluated language model, in JAX."""


def _of_experiments(command: Callable) -> Callable:
    """What `run` and `train` both take."""
    for option in reversed(
        [
            click.argument("experiment", type=click.Path(path_type=Path)),
            click.option(
                "--set", "assignments", multiple=True, metavar="A.B=C", help="Override one field."
            ),
            click.option(
                "--overrides",
                type=click.Path(path_type=Path),
                help="A file with one A.B=C a line, as `internlm2 plan --search` writes; --set "
                "comes after it.",
            ),
            click.option("--seed", type=int, help="Short for --set seed=N."),
            click.option(
                "--corpus",
                type=click.Path(path_type=Path),
                help="A folder of your own documents.",
            ),
            click.option("--only", default="", metavar="STAGE,...", help="Run these stages only."),
            click.option("--from", "start", metavar="STAGE", help="Run this stage and later ones."),
            click.option(
                "--redo", is_flag=True, help="Repeat the selected stages even if they are done."
            ),
            click.option(
                "--run-dir",
                type=click.Path(path_type=Path),
                help="Default: runs/NAME[,overrides].",
            ),
            click.option("--tiny", is_flag=True, help="The small twin, for a first look."),
            click.option("--dry-run", is_flag=True, help="Print the resolved settings and stop."),
        ]
    ):
        command = option(command)
    return command


@cli.command()
@_of_experiments
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="A.B=X,Y",
    help="Run every value (of several sweeps: every combination), and compare them on one page.",
)
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    help="With --sweep: seeds of every value; --sweep seed=5,6 says which.",
)
def run(**given: Any) -> None:
    """Run EXPERIMENT (a Python file). The same command again continues where it stopped."""
    _run(**given)


@cli.command()
@_of_experiments
@click.option("--coordinator", metavar="HOST:PORT", help="Address of the first of the processes.")
@click.option("--num-processes", type=int, help="How many there are.")
@click.option("--process-id", type=int, help="Which of them this is, from 0.")
@click.option("--profile", metavar="FIRST:STOP", help="Trace these steps, say 50:55.")
@click.option("--tensorboard", is_flag=True, help="Write event files beside metrics.jsonl.")
@click.option("--wandb", default="", metavar="PROJECT", help="Send metrics to Weights & Biases.")
@click.option(
    "--hang-seconds",
    type=click.FloatRange(0),
    default=1800.0,
    show_default=True,
    help="End the process when a step, a batch, a checkpoint or a validation takes longer; 0: no.",
)
@click.option("--hang-status", default=RESTART, show_default=True, help="Exit status of that.")
def train(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    profile: str | None,
    tensorboard: bool,
    wandb: str,
    hang_seconds: float,
    hang_status: int,
    **given: Any,
) -> None:
    """Run EXPERIMENT as something that is left alone: on one device, or as one process of many.

    Every host of a TPU pod or a SLURM job runs the same command, which finds the others by itself
    (docs/running.md); elsewhere give --coordinator, --num-processes and --process-id. Exit status
    75 means that all is saved and the same command continues.
    """
    from internlm2_jax import distributed
    from internlm2_jax.train import session

    window = session.parse_window(profile) if profile else None
    by_hand = dict(zip(distributed.BY_HAND, (coordinator, num_processes, process_id), strict=True))
    named = {name: str(value) for name, value in by_hand.items() if value is not None}
    if not given["dry_run"]:
        distributed.start({**os.environ, **named})
    with session.use(
        session.Session(
            profile=window,
            tensorboard=tensorboard,
            wandb=wandb,
            hang_seconds=hang_seconds,
            hang_status=hang_status,
        )
    ):
        _run(**given)


def _run(
    experiment: Path,
    assignments: tuple[str, ...],
    overrides: Path | None,
    seed: int | None,
    corpus: Path | None,
    only: str,
    start: str | None,
    redo: bool,
    run_dir: Path | None,
    tiny: bool,
    dry_run: bool,
    sweeps: tuple[str, ...] = (),
    seeds: int = 1,
) -> None:
    given = [*(config.read_overrides(overrides) if overrides else []), *assignments]
    given += [f"seed={seed}"] if seed is not None else []
    given += [f"corpus={os.fspath(corpus.absolute())!r}"] if corpus is not None else []
    if sweeps or seeds != 1:
        others = {"--seed": seed is not None, "--only": only, "--from": start, "--redo": redo}
        if wrong := [
            name for name, is_given in {**others, "--dry-run": dry_run}.items() if is_given
        ]:
            raise UserError(f"{wrong[0]} does not go with --sweep and --seeds; leave it out")
        _sweep(experiment, sweeps, seeds, given, "tiny" if tiny else "experiment", run_dir)
        return
    resolved = config.load(experiment, given, function="tiny" if tiny else "experiment")
    if dry_run:
        click.echo(config.text(resolved), nl=False)
        return

    from internlm2_jax import distributed
    from internlm2_jax.stages.pipeline import Pipeline, Selection

    pipeline = config.build(resolved)
    if not isinstance(pipeline, Pipeline):
        raise UserError(f"{experiment}: experiment() must return a Config of stages.Pipeline")
    name = experiment.parent.name if experiment.stem == "pipeline" else experiment.stem
    folder = run_dir or Path("runs") / default_run_name(f"{name}-tiny" if tiny else name, given)
    _compilation_cache(folder.absolute().parent / ".compiled")
    names = tuple(n.strip() for n in only.split(",") if n.strip())
    pipeline.run(folder, Selection(names, start, redo), settings=resolved)
    if not distributed.is_first():
        return
    click.echo(f"run folder: {folder}")
    if (folder / "report.html").is_file():
        click.echo(f"report: {folder / 'report.html'}")


def _sweep(
    experiment: Path,
    sweeps: tuple[str, ...],
    seeds: int,
    given: list[str],
    function: str,
    run_dir: Path | None,
) -> None:
    from internlm2_jax import ablation

    folder = run_dir or Path("runs") / default_run_name(f"{experiment.stem}-sweep", given)
    _compilation_cache(folder.absolute().parent / ".compiled")
    done = ablation.ablate(
        experiment,
        dict(map(ablation.parse_sweep, sweeps)),
        seeds,
        folder=folder,
        assignments=given,
        function=function,
        before=lambda line: click.echo(line, err=True),
    )
    click.echo(done)
    click.echo(f"report: {folder / 'comparison.html'}")


cli.add_command(plan)
cli.add_command(conversations)
cli.add_command(annotate)
cli.add_command(evals_command.evaluate)
cli.add_command(evals_command.judge)
cli.add_command(evals_command.leaderboard)


@cli.command()
@click.argument("folders", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where the page goes. Default: report.html in the run; of several, comparison.html beside "
    "the first.",
)
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Write the HTML report of a run from the files in its folder; of several, their comparison."""
    from internlm2_jax.report import compare, page

    if len(folders) == 1:
        click.echo(page.build(folders[0], out))
    else:
        default = folders[0].absolute().parent / "comparison.html"
        click.echo(compare.build(folders, out or default))


@cli.command("diff")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
def diff_command(a: Path, b: Path) -> None:
    """Show the settings in which A and B differ (experiment files or run folders)."""
    old, new = (config.saved(p) if p.is_dir() else config.load(p) for p in (a, b))
    for line in config.diff(old, new):
        click.echo(line)


for command in (commands.generate, commands.chat, commands.serve):
    cli.add_command(command)


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--layout",
    type=click.Choice(["internlm2", "llama", "run"]),
    help="internlm2: Hugging Face, InternLM2's own code. llama: Hugging Face, for any Llama "
    "runtime. run: a stage folder, to train on. Default: run for a Hugging Face SOURCE, else "
    "internlm2.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of Hugging Face tensors; default: that of the model's products. Stages are float32.",
)
def convert(source: Path, target: Path, layout: str | None, dtype: str | None) -> None:
    """Write the model in SOURCE to TARGET, a new folder.

    SOURCE is a Hugging Face folder, a stage of a run, or a run.
    """
    import internlm2_jax

    if layout is None:
        layout = "internlm2" if any((source / n).exists() for n in RUN_FILES) else "run"
    if layout == "run" and dtype not in (None, "float32"):
        raise UserError(f"--dtype {dtype}: a stage keeps float32 parameters; leave it out")
    model = internlm2_jax.open(source)
    if layout == "run":
        model.save_stage(target)
    else:
        public: Literal["internlm2", "llama"] = "llama" if layout == "llama" else "internlm2"
        model.save_hf(target, dtype=dtype or model.cfg.dtype, layout=public)
    click.echo(target)


def default_run_name(name: str, assignments: list[str]) -> str:
    """The experiment's name, then each override: other settings never share a folder.

    Long values are cut and told apart by a hash.
    """
    parts = [name]
    for assignment in assignments:
        key, value = config.parse(assignment)
        shown = Path(value).name if key == "corpus" else str(value)
        safe = re.sub(r"[^\w.+-]+", "_", f"{key.split('.')[-1]}={shown}".replace("=", "-"))
        exact = key in ("seed",) and len(safe) < 40
        parts.append(safe if exact else f"{safe[:40]}-{files.fingerprint([key, value])[:6]}")
    return ",".join(parts)


def _quiet_libraries() -> None:
    """Beam, orbax and absl log every step of theirs; a reader wants the progress lines.

    Orbax's threads (absl) and asyncio also print what the main thread raises and reports anyway:
    every part of a checkpoint that is damaged or finds no space.
    """
    warnings.filterwarnings("ignore", module="apache_beam")
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    for name in ("absl", "orbax", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """As Python's own, but silent about readers of a damaged checkpoint that end too late."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _compilation_cache(folder: Path) -> None:
    """Keeps compiled steps beside the runs, so that a resumed run starts at once."""
    import jax  # an experiment has imported it by now: its environment variables come too late

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def main() -> None:
    """The console script: a UserError is one line and status 2, an interrupt says how to go on.

    A run that was told to stop, and is saved, ends with status 75 (EX_TEMPFAIL): start it again.
    """
    _quiet_libraries()
    try:
        cli.main(standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except Preempted as stop:
        click.echo(f"stopped: {stop}", err=True)
        sys.exit(RESTART)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command continues from here", err=True)
        sys.exit(130)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)


if __name__ == "__main__":
    main()
