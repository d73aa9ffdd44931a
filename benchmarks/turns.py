"""Two programs that take turns, one call each: what benchmarks beside a peer share.

A worker prints a line about itself, then answers each line it reads with one of its own.
"""

from __future__ import annotations

import os
import subprocess

import click


def serve(command: list[str], threads: int) -> subprocess.Popen:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    process = subprocess.Popen(
        ["taskset", "-c", cores, *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout
    click.echo(process.stdout.readline().strip())
    return process


def ask(process: subprocess.Popen, what: str) -> str:
    assert process.stdin and process.stdout
    process.stdin.write(what + "\n")
    answer = process.stdout.readline()
    if not answer:
        raise click.ClickException(f"a worker ended during {what}; its message is above")
    return answer.strip()
