"""`internlm2 plan`: from an experiment and the name of a pod to plans on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from internlm2_jax.chips import Topology, parse_topology
from internlm2_jax.errors import UserError
from internlm2_jax.plan import environment
from internlm2_jax.progress import Progress


@click.command()
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--topology", required=True, metavar="CHIP:AxB", help="v5p:4x4x4, h100:1x1x8, ...")
@click.option("--layout", metavar="AXIS=N,...", help="Default: the experiment's, or fsdp.")
@click.option("--remat", help="none, minimal, save_qkv, offload or full.")
@click.option("--batch", type=int, help="Rows of a step, over all chips, taken at once.")
@click.option("--accumulate", type=int, help="Parts in which the rows of a step are taken.")
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Override one field.")
@click.option("--only", default="", metavar="STAGE[/STEP],...", help="Plan these only.")
@click.option("--tiny", is_flag=True, help="The experiment's small twin.")
@click.option("--search", "searching", is_flag=True, help="Try layouts, remat and parts.")
@click.option("--limit", default=12, show_default=True, help="Compile so many in a search.")
@click.option("--output", type=click.Path(path_type=Path), help="Where the best settings go.")
@click.option("--json", "as_json", is_flag=True, help="Numbers instead of text.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path("runs/.plans"),
    show_default=True,
    help="What was compiled once is found again here.",
)
def plan(
    experiment: Path,
    topology: str,
    layout: str | None,
    remat: str | None,
    batch: int | None,
    accumulate: int | None,
    assignments: tuple[str, ...],
    only: str,
    tiny: bool,
    searching: bool,
    limit: int,
    output: Path | None,
    as_json: bool,
    cache: Path,
) -> None:
    """Compile the steps of EXPERIMENT for a pod that is not there, and say what they cost."""
    pod = parse_topology(topology)
    environment.prepare()
    from internlm2_jax import config
    from internlm2_jax.plan import planners, report, search, steps
    from internlm2_jax.plan.compile import devices_of
    from internlm2_jax.stages.pipeline import Pipeline

    function = "tiny" if tiny else "experiment"
    pipeline = config.build(config.load(experiment, list(assignments), function=function))
    if not isinstance(pipeline, Pipeline):
        raise UserError(f"{experiment}: experiment() must return a Config of stages.Pipeline")
    names = tuple(n.strip() for n in only.split(",") if n.strip())
    if searching:  # the experiment's own layout is for another pod
        layout = layout or f"fsdp={pod.num_devices}"
    choice = steps.Choice(layout, remat, batch, accumulate)
    devices = devices_of(pod)
    found = planners.planned(pipeline, devices, choice, names)
    if not searching:
        plans, failed = [], []
        with Progress("plan", len(found), "step", silent=as_json) as progress:
            for step in found:
                try:
                    plans.append(_plan(step, pod, devices, cache))
                except UserError as error:  # the others are planned all the same
                    failed.append(error)
                    progress.note(str(error))
                else:
                    if not as_json:
                        click.echo(report.text(plans[-1]))
                progress.update(step=step.name)
        if as_json:
            click.echo(json.dumps([report.as_json(p) for p in plans], indent=2))
        if failed:
            raise UserError(
                f"{len(failed)} of {len(found)} steps could not be planned: {failed[0]}"
            )
        return

    if len(found) > 1 and not names:
        click.echo(f"searching for {found[0].name}; name another with --only", err=True)
    first = found[0]
    tried = []
    chosen = search.candidates(first, pod)[:limit]
    with Progress("search", len(chosen), "plan", silent=as_json) as progress:
        for candidate in chosen:
            step = planners.planned(pipeline, devices, candidate.choice, (first.name,))[0]
            tried.append(_plan(step, pod, devices, cache))
            progress.update(layout=str(candidate.layout), remat=candidate.remat)
    best = search.rank(tried)
    if as_json:
        click.echo(json.dumps([report.as_json(p) for p in [*best, *tried]], indent=2))
    else:
        click.echo(search.table(tried))
    if not best:
        raise UserError(
            f"none of {len(tried)} settings tried fits {pod}; raise --limit or take a larger pod"
        )
    target = output or Path(f"{experiment.stem}.{str(pod).replace(':', '-')}.overrides")
    search.write_overrides(best[0], target)
    if not as_json:
        click.echo(report.text(best[0]))
    click.echo(f"best settings: internlm2 run {experiment} --overrides {target}", err=True)


def _plan(step: Any, pod: Topology, devices: list[Any], cache: Path) -> Any:
    from jax._src.core import ShardingTypeError  # jax has no public name for it

    from internlm2_jax.plan import report, steps
    from internlm2_jax.plan.compile import compile_lowered

    try:
        lowered = step.lower()
    except ShardingTypeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{step.name} does not run on {step.layout} yet ({reason}); "
            "choose the others with --only"
        ) from error
    compiled = compile_lowered(lowered, pod, cache)
    mesh = steps.mesh_of(step.layout, tuple(devices))
    return report.make(step, pod, compiled, list(mesh.devices.flat))
