"""Puts the sections together and writes the page, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2

from internlm2_jax import files
from internlm2_jax.report import (
    contamination,
    corpus,
    evaluation,
    grpo,
    needle,
    overview,
    ppo,
    reward_model,
    training,
)
from internlm2_jax.report.blocks import Headline, Section, pretty
from internlm2_jax.report.load import ABSENT, DONE, UNFINISHED, Run

SECTIONS = (
    corpus.corpus,
    corpus.tokenizer,
    training.pretrain,
    corpus.instructions,
    training.sft,
    reward_model.reward_model,
    ppo.ppo,
    grpo.grpo,
    evaluation.samples,
    evaluation.evaluation,
    needle.needle,
    contamination.contamination,
    overview.time,
    overview.environment,
)
# Sections that an unknown run is not expected to have; others are shown as not run yet.
OPTIONAL = ("needle", "contamination")


# What a folder of rounds of COOL RLHF has; a run with one shows these sections from there.
ROUNDS = (reward_model.reward_model, ppo.ppo)


def build(
    run_folder: str | Path,
    out: str | Path | None = None,
    sections: Sequence[Callable[[Run], Section]] = SECTIONS,
) -> Path:
    """Writes `<run>/report.html`, or `out`, from the files in `run_folder` and returns its path.

    Stages that have left nothing are shown as not run yet. The same files give the same bytes: the
    page holds no date and no path of this machine.
    Raises UserError when the folder is not there, or a file in it is damaged (the message names
    it); an earlier page then stays as it was.
    """
    run = Run(run_folder)
    path = run.folder / "report.html" if out is None else Path(out)
    files.atomic_write(path, render(run, sections))
    return path


def render(run: Run, sections: Sequence[Callable[[Run], Section]] = SECTIONS) -> str:
    """The page as text."""
    rounds = next((Run(p) for s in run.stages() if (p := run.folder / s) and _is_run(p)), run)
    return layout(
        name=run.name,
        kind="run report",
        about="Run report of internlm2_jax, made from the files in the run folder.",
        headlines=overview.headlines(run),
        progress=[(pretty(stage), status) for stage, status in overview.progress(run)],
        sections=[
            shown
            for section in sections
            if (shown := section(rounds if section in ROUNDS else run)).status != ABSENT
            or _expected(run, shown.id)
        ],
    )


def _is_run(folder: Path) -> bool:
    return (folder / "pipeline.json").is_file()


def _expected(run: Run, section: str) -> bool:
    """Whether a run whose list of stages is known will have this section."""
    listed = run.record("pipeline.json").strings("stages")
    stage = "evaluate" if section == "samples" else section
    return any(s.startswith(stage) for s in listed) if listed else section not in OPTIONAL


def layout(
    *,
    name: str,
    kind: str,
    about: str,
    headlines: Sequence[Headline],
    sections: Sequence[Section],
    progress: Sequence[tuple[str, str]] = (),
) -> str:
    """One self-contained page: a heading, the stages, a table of headlines, the sections. `kind`
    says in its title what it is; `about` where its numbers come from. All text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("internlm2_jax.report", "."),
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    page = environment.get_template("page.html")
    text = page.render(
        name=name, kind=kind, about=about, headlines=headlines, progress=progress,
        sections=sections, done=DONE, unfinished=UNFINISHED,
    )  # fmt: skip
    return text.lstrip()
