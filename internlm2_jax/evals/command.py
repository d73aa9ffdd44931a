"""`internlm2 evaluate`: any checkpoint, at any stage, on any suite."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from internlm2_jax.errors import UserError


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--suite", "names", multiple=True, help="Of this name, a dimension, or a YAML file.")
@click.option("--list", "listing", is_flag=True, help="Show the suites and stop.")
@click.option(
    "--data", help="The data set's folder, or its id on the hub. Default: the suite's id."
)
@click.option("--shots", type=click.IntRange(0), help="Examples before each question.")
@click.option("--shot-seed", type=int, help="Examples at random; default: the first of the file.")
@click.option("--limit", type=click.IntRange(1), help="So many items, evenly spread.")
@click.option("--method", type=click.Choice(["likelihood", "generation"]), help="For choices.")
@click.option("--chat/--no-chat", default=None, help="Ask in ChatML turns, or as a text.")
@click.option("--samples", type=click.IntRange(1), help="Answers to each question.")
@click.option("--pass-at", "k", multiple=True, type=click.IntRange(1), help="k of pass@k.")
@click.option("--temperature", type=click.FloatRange(0), help="0 is greedy.")
@click.option("--max-new-tokens", type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, help="Of the answers' random numbers.")
@click.option("--max-length", type=click.IntRange(16), help="Tokens of a prompt with its answer.")
@click.option("--slots", default=32, show_default=True, help="Answers that are decoded together.")
@click.option(
    "--weights", default="auto", show_default=True, help="auto (as they are), int8 or int4."
)
@click.option("--out", type=click.Path(path_type=Path), help="Default: STAGE/evaluations/SUITE.")
@click.option("--redo", is_flag=True, help="Begin again where results are.")
def evaluate(
    run: Path | None,
    names: tuple[str, ...],
    listing: bool,
    data: str | None,
    limit: int | None,
    shot_seed: int | None,
    seed: int,
    max_length: int | None,
    slots: int,
    weights: str,
    out: Path | None,
    redo: bool,
    **given: Any,
) -> None:
    """Measure the model of RUN (a run, a stage of one, or a Hugging Face folder) on a suite.

    Results are items.jsonl, a line an item, and totals.json. The same command again continues.
    """
    from internlm2_jax.evals import suites

    if listing:
        _list(suites.built_in())
        return
    if run is None or not names:
        raise UserError("give a RUN and --suite NAME; internlm2 evaluate --list shows the suites")
    chosen = [changed(suite, given) for name in names for suite in suites.find(name)]

    import internlm2_jax
    from internlm2_jax.evals import hub, runner

    folders = {suite.name: hub.folder(suite, data) for suite in chosen}
    opened = internlm2_jax.open(run)
    subject = _subject(opened, max_length=max_length, slots=slots, weights=weights)
    home = out or opened.folder / "evaluations"
    for suite in chosen:
        loaded = runner.load(suite, folders[suite.name], opened.tokenizer, limit)
        place = home if out and len(chosen) == 1 else home / suite.name
        found = runner.evaluate(
            subject, suite, loaded, place,
            seed=seed, shot_seed=shot_seed, name=str(run), redo=redo,
        )  # fmt: skip
        click.echo(line(found))
        click.echo(f"  {place}")


def _subject(opened: Any, **sizes: Any) -> Any:
    from internlm2_jax.evals.subject import Subject

    if opened.tokenizer is None:
        raise UserError(f"{opened.folder} has no tokenizer.model; put the model's own beside it")
    return Subject(opened.model, opened.params, opened.tokenizer, **sizes)


@click.command()
@click.argument("judge", type=click.Path(path_type=Path))
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--suite", default="mt_bench", show_default=True)
@click.option("--max-length", type=click.IntRange(16), help="Tokens of what the judge reads.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: in B's evaluations.")
@click.option("--redo", is_flag=True, help="Begin again where results are.")
def judge(
    judge: Path, a: Path, b: Path, suite: str, max_length: int | None, out: Path | None, redo: bool
) -> None:
    """Let the model JUDGE compare the answers of A and B to a suite both were measured on.

    Every pair is shown in both orders; the score is how often B wins, 1/2 for a win in one order.
    """
    import internlm2_jax
    from internlm2_jax.evals.judge import judge as compare

    ours, theirs = (_measured(folder, suite) for folder in (a, b))
    subject = _subject(internlm2_jax.open(judge), max_length=max_length)
    place = out or theirs.parent / f"{suite}_against_{a.resolve().name}"
    found = compare(subject, ours, theirs, place, name=f"{b} against {a}, by {judge}", redo=redo)
    click.echo(line(found))
    click.echo(f"  {place}")


def _measured(folder: Path, suite: str) -> Path:
    """The one evaluation on a suite that a run, or a stage, or the folder itself has."""
    found = sorted(folder.glob(f"**/{suite}/totals.json")) if folder.is_dir() else []
    if len(found) != 1:
        raise UserError(
            f"{folder} has {len(found) or 'no'} evaluations on {suite}; run internlm2 evaluate "
            f"{folder} --suite {suite} first, or name a stage"
        )
    return found[0].parent


@click.command()
@click.argument("folders", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("leaderboard.html"),
    show_default=True, help="The page; the same as JSON goes beside it.",
)  # fmt: skip
def leaderboard(folders: tuple[Path, ...], out: Path) -> None:
    """Compare on one page what FOLDERS (runs, stages, or what --out named) were measured on."""
    from internlm2_jax.report import leaderboard as page

    for path in page.build(folders, out):
        click.echo(path)


def changed(suite: Any, given: dict[str, Any]) -> Any:
    """The suite with what the command line says; samples at temperature 0 are drawn at 0.8."""
    fields = {k: v for k, v in given.items() if v is not None and v != ()}
    if fields.get("samples", 1) > 1 and not fields.get("temperature") and not suite.temperature:
        fields["temperature"] = 0.8
    if "method" in fields and suite.format not in ("choices", "reading", "c3"):
        raise UserError(f"suite {suite.name} has no choices; leave --method out")
    if "k" in fields:
        fields["k"] = tuple(sorted(fields["k"]))
    return dataclasses.replace(suite, **fields)


def line(found: dict[str, Any]) -> str:
    """A suite's totals in one line."""
    if found["score"] is None:
        return f"{found['suite']}: {found['items']} items answered, none graded"
    low, high = found["interval"]
    text = (
        f"{found['suite']}: {found['score']:.1%} [{low:.1%}, {high:.1%}], {found['graded']} items"
    )
    if "macro" in found:
        text += f", {found['macro']:.1%} over {len(found['groups'])} groups"
    for k, rate in found.get("pass_at_k", {}).items():
        text += f", pass@{k} " + ("none" if rate is None else f"{rate:.1%}")
    if "majority" in found:
        text += f", majority {found['majority']:.1%}"
    noted = {"cut": "prompts cut", "infrastructure": "not graded", "timeouts": "timeouts",
             "inconsistent": "changed with the order"}  # fmt: skip
    notes = [f"{found[key]} {said}" for key, said in noted.items() if found.get(key)]
    return text + (f" ({', '.join(notes)})" if notes else "")


def _list(known: dict[str, Any]) -> None:
    dimension = ""
    for suite in known.values():
        if suite.dimension != dimension:
            dimension = suite.dimension
            click.echo(dimension)
        asked = f"{suite.shots} shots" if suite.shots else "no examples"
        click.echo(f"  {suite.name:18} {suite.method}, {asked}, {suite.measure}")
