"""Many small runs of one experiment that differ in a few settings, as one table and one plot.

    ablate("experiments/ablations/small.py", {"learning_rate": [1e-3, 3e-3]}, seeds=3)

trains six runs and returns an `Ablation`. It is what `internlm2 run EXPERIMENT --sweep
learning_rate=1e-3,3e-3 --seeds 3` does. A run lies in a folder named by its settings and their
hash; a stage with the same settings in several runs, such as the corpus, is carried out once and
lies in `stages/`, so what was computed before is never computed again.
"""

from __future__ import annotations

import ast
import copy
import html
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fiddle as fdl

from internlm2_jax import config, files
from internlm2_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from internlm2_jax.report.compare import Variant
    from internlm2_jax.stages.pipeline import Pipeline

Grid = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Ablation:
    """Finished runs of an ablation, in the order of the grid, seeds innermost.

    In a notebook it shows itself as the table; `figure()` is the plot.

    Attributes: `folder`, which also holds the page comparison.html; `runs`, their folders.
    """

    folder: Path
    runs: list[Path]

    def variants(self) -> list[Variant]:
        """Runs grouped by their settings but for seeds (report/compare.py)."""
        from internlm2_jax.report import compare
        from internlm2_jax.report.load import Run

        return compare.variants([Run(path) for path in self.runs])

    def table(self) -> list[list[str]]:
        """Rows of text, the head first: each result that differs, mean ± standard deviation."""
        from internlm2_jax.report import compare

        head, rows = compare.table(self.variants())
        return [head, *rows]

    def figure(
        self, key: str = "loss", *, stage: str = "pretrain", split: str = "validation"
    ) -> Figure:
        """The curves of a logged number: means over seeds, bands from lowest to highest."""
        from matplotlib.figure import Figure

        from internlm2_jax.report import compare, curves

        lines = compare.lines(self.variants(), stage, key, split)
        if not lines:
            raise UserError(f"no run in {self.folder} has logged {key!r} for {split} in {stage!r}")
        width, height = 900, 330
        figure = Figure(figsize=(width / 72, height / 72))
        spans, _ = compare.spans(self.variants(), stage)
        curves.line_chart(lines, "step", f"{split} {key}", spans=spans)(figure, width, height)
        return figure

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def _repr_html_(self) -> str:
        def line(row: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

        head, *rows = self.table()
        return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def ablate(
    base: str | os.PathLike | fdl.Config,
    grid: Grid,
    seeds: int | Sequence[int] = 1,
    *,
    folder: str | os.PathLike = "runs/ablation",
    assignments: Sequence[str] = (),
    function: str = "experiment",
    before: Callable[[str], None] = lambda line: None,
) -> Ablation:
    """Runs every combination of `grid` with every seed, and returns them together.

    Args:
      base: an experiment file, or a loaded config.
      grid: a macro of the experiment (files only) or a dotted field -> its values. Those of "seed"
        take the place of `seeds`.
      seeds: how many, from 0 on, or which. A file's macro `seed` takes them, if it has one, else
        every field called `seed`.
      assignments: "name=value" for all runs, as `--set`.
      function: which entry of the file, such as "tiny".
      before: is told of each run before it starts.

    Errors: UserError when a name is unknown, nothing varies, or a stage fails.
    """
    from internlm2_jax.report import compare
    from internlm2_jax.stages.pipeline import Pipeline

    folder = Path(folder)
    settings = list(combinations(grid, seeds))
    configs = [make(base, chosen, assignments, function) for chosen in settings]
    runs = [folder / name_of(*named) for named in zip(settings, configs, strict=True)]
    for number, run in enumerate(runs):
        if run in runs[:number]:
            raise UserError(f"two runs of the sweep have the same settings: {run.name}")
    for number, (run, made) in enumerate(zip(runs, configs, strict=True), start=1):
        pipeline = config.build(made)
        if not isinstance(pipeline, Pipeline):
            raise UserError("an ablation needs an experiment that returns a Config of Pipeline")
        before(f"run {number} of {len(runs)}: {run.name}")
        _share_stages(pipeline, run, folder / "stages")
        pipeline.run(run, settings=made)
    if len(runs) > 1:
        compare.build(runs, folder / "comparison.html")
    return Ablation(folder, runs)


def combinations(grid: Grid, seeds: int | Sequence[int]) -> Iterator[dict[str, Any]]:
    """{name: value} of every run, seeds innermost. Errors: UserError when there is none."""
    for name, values in grid.items():
        if isinstance(values, str) or not len(values):
            raise UserError(f"the grid gives {name!r} the values {values!r}; give a list of them")
    if "seed" in grid:
        if seeds != 1:
            raise UserError(f"the grid has values of seed, and seeds are {seeds}; give one of both")
        seeds = grid["seed"]
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"seeds are {seeds}; give a positive number, or different seeds")
    others = {name: values for name, values in grid.items() if name != "seed"}
    for values in itertools.product(*others.values()):
        for seed in chosen:
            yield {**dict(zip(others, values, strict=True)), "seed": seed}


def make(
    base: str | os.PathLike | fdl.Config,
    chosen: Mapping[str, Any],
    assignments: Sequence[str] = (),
    function: str = "",
) -> fdl.Config:
    """The config of one run. Errors: UserError for a name that `base` does not have."""
    if isinstance(base, fdl.Config):
        made, left = copy.deepcopy(base), [config.parse(a) for a in assignments]
        left += list(chosen.items())
    else:
        macros = config.macros(Path(base), function)
        given = [*assignments, *(f"{n}={v!r}" for n, v in chosen.items() if n in macros)]
        made = config.load(Path(base), given, function=function)
        left = [(n, v) for n, v in chosen.items() if n not in macros]
    for name, value in left:
        for path in [name] if name != "seed" else seed_fields(made):
            config.override(made, path, value)
    return made


def seed_fields(made: fdl.Config) -> list[str]:
    """Dotted paths of every field `seed` that is set."""
    paths = (re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path) for path in config.flatten(made))
    return [path for path in paths if path.rpartition(".")[2] == "seed"]


def name_of(chosen: Mapping[str, Any], made: fdl.Config) -> str:
    """A folder's name: what was chosen, for people, and the hash of all settings."""
    shown = [f"{name.rpartition('.')[2]}-{value}" for name, value in chosen.items()]
    readable = re.sub(r"[^\w.+,-]+", "_", ",".join(shown))[:80]
    return f"{readable},{files.fingerprint(config.text(made))[:8]}"


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """ "key=a,b,c" as (key, [a, b, c]); the values are Python literals, or else text."""
    name, separator, values = text.partition("=")
    if not separator or not name.strip() or not values.strip():
        raise UserError(f"--sweep {text!r} is not of the form name=value,value")
    try:
        found = ast.literal_eval(f"[{values}]")
    except (ValueError, SyntaxError):
        found = [config.parse(f"{name}={value}")[1] for value in values.split(",")]
    return name.strip(), found


def _share_stages(pipeline: Pipeline, run: Path, shared: Path) -> None:
    """Links each stage's folder in `run` to one that all runs with the same stage share."""
    with files.explain_disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        for name, fingerprint in pipeline.fingerprints.items():
            target = shared / f"{name}-{fingerprint}"
            target.mkdir(parents=True, exist_ok=True)
            link = run / name
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(target, run), target_is_directory=True)
