"""Programs that take turns, a few calls each: what benchmarks beside a peer share.

A worker prints a line about itself, then answers each line it reads with one of its own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Mapping

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


def in_turns(
    sides: Mapping[str, subprocess.Popen], what: str, rounds: int, calls: int = 3
) -> dict[str, list[float]]:
    """Median seconds of each turn: of its `calls` that count, after one that does not.

    That one compiles, the first time. Later it maps memory that the other program has just given
    back, which costs up to two seconds of kernel time where a virtual machine returns free pages to
    its host, and which no program by itself pays.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, process in sides.items():
            ask(process, what)
            times[name].append(statistics.median(float(ask(process, what)) for _ in range(calls)))
    return times


def compared(times: Mapping[str, list[float]], tokens: int) -> str:
    """Each side's rate, and the first one's over the second's.

    The ratio is the median of the rounds' own, shown with the least and the largest of them: a
    machine whose speed drifts is the same for both sides of a round, not for two rounds.
    """
    rates = {name: tokens / statistics.median(seconds) for name, seconds in times.items()}
    shown = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()) + " tokens/s"
    if len(times) > 1:
        first, second, *_ = times
        ratios = [theirs / ours for ours, theirs in zip(times[first], times[second], strict=True)]
        span = f"{min(ratios):.2f} to {max(ratios):.2f} by round"
        shown += f"; {first} / {second} {statistics.median(ratios):.2f} ({span})"
    return shown
