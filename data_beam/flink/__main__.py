"""`python -m data_beam.flink`: a Flink cluster on this machine until Ctrl-C."""

from __future__ import annotations

import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

import click

from data_beam.flink import cluster, distribution
from internlm2_jax.errors import UserError

_PATH = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--task-managers", default=2, show_default=True)
@click.option("--slots", default=1, show_default=True, help="Tasks at a time on each of them.")
@click.option("--folder", type=_PATH, help="For logs and configuration.  [default: a new one]")
@click.option("--cache", type=_PATH, help="For Flink and the job server.  [default: ~/.cache/...]")
@click.option("--job-server", type=_PATH, metavar="JAR", help="Use this one instead of building.")
def main(
    task_managers: int, slots: int, folder: Path | None, cache: Path | None, job_server: Path | None
) -> None:
    """Start Flink and Beam's job server here, and print the Beam options that lead to them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sizes = cluster.Sizes(task_managers=task_managers, slots=slots)
        folder = folder or Path(tempfile.mkdtemp(prefix="flink-"))
        with cluster.Cluster.start(folder, distribution.prepare(cache, job_server), sizes) as flink:
            click.echo(
                f"Flink {distribution.FLINK} at http://{flink.master}, logs in {folder / 'log'}"
            )
            click.echo(shlex.join(flink.options()))
            sys.stdout.flush()
            while True:
                time.sleep(1)
                for name in flink.supervise():
                    click.echo(f"flink: {name} ended, started another", err=True)
    except KeyboardInterrupt:
        click.echo("flink: stopped", err=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(prog_name="python -m data_beam.flink")
