"""Long documents worth training long contexts on: section 3.1.3 of the InternLM2 report.

    length       more than 32 KB
    statistics   conjunctions, pronouns, lines: is it prose, code, or a list?
    perplexity   does the beginning help a language model to predict what follows?

The input is a finished corpus (its documents keep source and language) or raw files.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from data_beam.attributes.language import Language
from data_beam.attributes.long_context import LongContext as Statistics
from data_beam.io import listing, readers
from data_beam.mix import rules, write
from data_beam.pipelines import build, ingest
from data_beam.scoring.perplexity import Perplexity, Protocol
from internlm2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LongContext:
    """`model` is the folder of a stage with a language model of this project; without one the rules
    must not ask for its perplexity. Thresholds per domain (the source) and language are in
    `rules`."""

    model: str | None = None
    rules: str = "internlm2_long"
    protocol: Protocol = dataclasses.field(default_factory=Protocol)
    min_bytes: int = 32 * 1024
    seed: int = 0
    validation_fraction: float = 0.02


def recipe(settings: LongContext) -> build.Recipe:
    wanted = rules.load(settings.rules)
    scores = []
    if settings.model is not None:
        scores.append(Perplexity(settings.model, settings.protocol, settings.min_bytes))
    elif "perplexity" in rules.attributes_of(wanted):
        raise UserError(
            f"the rules {settings.rules} judge by perplexity: give a model with --model RUN/STAGE, "
            "or rules without it"
        )
    return build.Recipe(
        rules=wanted, attributes=(Language(), Statistics()), near=None, scores=scores,
        mix=write.Mix(seed=settings.seed, validation_fraction=settings.validation_fraction),
        max_removed_share=1,  # most documents are short, and meant to go
    )  # fmt: skip


def run(
    inputs: Sequence[str],
    output: str | os.PathLike,
    settings: LongContext | None = None,
    *,
    read: readers.ReadOptions | None = None,
    shards: int | None = None,
    wave_bytes: int | None = None,
    max_dead_share: float = 0.25,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Builds OUTPUT from the files that `inputs` match; returns the funnel."""
    settings = settings or LongContext()
    todo = recipe(settings)  # a wrong setting is told before the first file is read
    files = listing.list_inputs(inputs, read, output)
    ingest.run(
        files, output, read=read, shards=shards, wave_bytes=wave_bytes,
        max_dead_share=max_dead_share, beam_options=beam_options,
    )  # fmt: skip
    return build.run(
        output, todo, settings={"long_context": dataclasses.asdict(settings)},
        beam_options=beam_options,
    )  # fmt: skip
