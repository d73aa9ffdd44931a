"""A corpus without what evaluation sets ask: n-gram and exact-answer overlap (section 5.4 of the
report measures what happens without it; InternLM-Math matches exact numbers too)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from data_beam.attributes.contamination import Contamination
from data_beam.contamination import benchmarks, common, index, report
from data_beam.io import listing, readers, storage
from data_beam.mix import write
from data_beam.mix.rules import Rule
from data_beam.pipelines import annotate, build, ingest
from data_beam.stage import open_documents
from internlm2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """`benchmarks` are NAME=PATH[:field,field]; `action` "drop" removes a document with at least
    `min_ngrams` runs of 13 words, or a short question whole, of one of them; "cut" removes only
    what matches, 200 characters to each side, and drops documents that fall into more than
    `max_pieces`. With `ignore_common` N, runs of 13 words that stand in more than N documents count
    as nobody's question (a licence, a template, a famous passage); 0 = all count."""

    benchmarks: tuple[str, ...]
    action: str = "drop"
    min_ngrams: int = 1
    max_pieces: int = 10
    ignore_common: int = 0
    seed: int = 0
    validation_fraction: float = 0.02

    def __post_init__(self):
        if self.action not in ("drop", "cut"):
            raise UserError(f"action {self.action!r} is neither drop nor cut")
        if not self.benchmarks:
            raise UserError("no evaluation set given; use --benchmark NAME=PATH")
        if self.ignore_common < 0:
            raise UserError(
                f"ignore_common is {self.ignore_common}; give a number of documents, or 0 to "
                "ignore nothing"
            )


def attribute(output: str | os.PathLike, specs: Sequence[str]) -> Contamination:
    """The attribute for these evaluation sets, whose index is made below `output`."""
    path = storage.join(output, "benchmarks.index")
    index.build([benchmarks.read(benchmarks.parse(spec)) for spec in specs], path)
    return Contamination.of(path)


def without_common(
    output: str | os.PathLike, found: Contamination, more_than: int, beam_options: Sequence[str]
) -> Contamination:
    """`found` less the runs in more than `more_than` documents of `output`; they are counted in a
    pass of their own, once."""
    path = storage.join(output, "common_runs.json")
    if not common.is_counted(path, found.digest, open_documents(output).digest, more_than):
        annotate.run(output, [found], beam_options=beam_options)
        common.write(output, path, more_than=more_than)
    return Contamination.of(found.index, ignore=path)


def rules(settings: Decontaminate) -> tuple[Rule, ...]:
    if settings.action == "cut":
        maximum = settings.max_pieces - 1
        return (Rule("contamination", "many_cuts", "contamination.num_spans", maximum=maximum),)
    maximum = settings.min_ngrams - 1
    return (Rule("contamination", "benchmark", "contamination.matched_ngrams", maximum=maximum),)


def run(
    inputs: Sequence[str],
    output: str | os.PathLike,
    settings: Decontaminate,
    *,
    read: readers.ReadOptions | None = None,
    shards: int | None = None,
    wave_bytes: int | None = None,
    max_dead_share: float = 0.25,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Builds OUTPUT from the files that `inputs` match and the report attributes/contamination/
    report.json of what went, and for which set; returns the funnel."""
    files = listing.list_inputs(inputs, read, output)
    ingest.run(
        files, output, read=read, shards=shards, wave_bytes=wave_bytes,
        max_dead_share=max_dead_share, beam_options=beam_options,
    )  # fmt: skip
    found = attribute(output, settings.benchmarks)
    if settings.ignore_common:
        found = without_common(output, found, settings.ignore_common, beam_options)
    recipe = build.Recipe(
        rules={"default": rules(settings)}, attributes=(found,), near=None,
        mix=write.Mix(
            seed=settings.seed, validation_fraction=settings.validation_fraction,
            edits=("contamination.removed",) if settings.action == "cut" else (),
        ),
        max_removed_share=1,
    )  # fmt: skip
    funnel = build.run(
        output, recipe, settings={"decontaminate": dataclasses.asdict(settings)},
        beam_options=beam_options,
    )  # fmt: skip
    report.write(output)
    return funnel
