"""The `internlm2` command: run, plan, report, diff, generate, chat, serve, convert."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Literal

import click

from internlm2_jax import __version__, config, files
from internlm2_jax.errors import UserError
from internlm2_jax.infer import commands
from internlm2_jax.plan.command import plan

RUN_FILES = ("model.json", "pipeline.json")  # one of them marks a stage or a run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """From raw files to an aligned, evaluated language model, in JAX."""


@cli.command()
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Override one field.")
@click.option(
    "--overrides",
    type=click.Path(path_type=Path),
    help="A file with one A.B=C a line, as `internlm2 plan --search` writes; --set comes after it.",
)
@click.option("--seed", type=int, help="Short for --set seed=N.")
@click.option("--corpus", type=click.Path(path_type=Path), help="A folder of your own documents.")
@click.option("--only", default="", metavar="STAGE,...", help="Run these stages only.")
@click.option("--from", "start", metavar="STAGE", help="Run this stage and those after it.")
@click.option("--redo", is_flag=True, help="Repeat the selected stages even if they are done.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Default: runs/NAME[,overrides].")
@click.option("--tiny", is_flag=True, help="The experiment's small twin, for a first look.")
@click.option("--dry-run", is_flag=True, help="Print the resolved settings and stop.")
def run(
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
) -> None:
    """Run EXPERIMENT (a Python file). The same command again continues where it stopped."""
    given = [*(config.read_overrides(overrides) if overrides else []), *assignments]
    given += [f"seed={seed}"] if seed is not None else []
    given += [f"corpus={os.fspath(corpus.absolute())!r}"] if corpus is not None else []
    resolved = config.load(experiment, given, function="tiny" if tiny else "experiment")
    if dry_run:
        click.echo(config.text(resolved), nl=False)
        return

    from internlm2_jax.stages.pipeline import Pipeline, Selection

    pipeline = config.build(resolved)
    if not isinstance(pipeline, Pipeline):
        raise UserError(f"{experiment}: experiment() must return a Config of stages.Pipeline")
    name = experiment.parent.name if experiment.stem == "pipeline" else experiment.stem
    folder = run_dir or Path("runs") / default_run_name(f"{name}-tiny" if tiny else name, given)
    _compilation_cache(folder.absolute().parent / ".compiled")
    names = tuple(n.strip() for n in only.split(",") if n.strip())
    pipeline.run(folder, Selection(names, start, redo), settings=resolved)
    click.echo(f"run folder: {folder}")
    if (folder / "report.html").is_file():
        click.echo(f"report: {folder / 'report.html'}")


cli.add_command(plan)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Write the HTML report of a run FOLDER from the files in it."""
    from internlm2_jax import report as reports

    click.echo(reports.build(folder))


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
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.fspath(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")


def main() -> None:
    """The console script: a UserError is one line and status 2, an interrupt says how to go on."""
    _quiet_libraries()
    try:
        cli.main(standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command continues from here", err=True)
        sys.exit(130)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
