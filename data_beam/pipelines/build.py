"""What every recipe does: documents -> attributes -> duplicates among the documents worth keeping
-> rules -> corpus. Each step is skipped where its result is there already."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from data_beam.attributes.base import Attribute
from data_beam.dedup import lines, near
from data_beam.mix import decide, funnel, rules, write
from data_beam.pipelines import annotate
from data_beam.stage import open_documents
from internlm2_jax.errors import UserError

# Stages that come before de-duplication: a document dropped there neither survives for a good copy
# nor removes one. The stages after it look at what is left (section 3.1.1 of the report).
CLEANING = ("read", "language", "filter", "licence", "contamination")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`rules` may name the attributes of later jobs ("duplicates", scores); `near` and `lines` are
    the settings of de-duplication, None = without it; `scores` are jobs that write an attribute
    (`run(output, beam_options)`), for the models."""

    rules: rules.Rules
    attributes: Sequence[Attribute]
    near: near.NearDuplicates | None = dataclasses.field(default_factory=near.NearDuplicates)
    lines: lines.RepeatedLines | None = None
    scores: Sequence[Any] = ()
    mix: write.Mix = dataclasses.field(default_factory=write.Mix)
    max_removed_share: float = funnel.MAX_REMOVED_SHARE


def run(
    output: str | os.PathLike,
    recipe: Recipe,
    *,
    select: dict[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Turns OUTPUT/documents into OUTPUT/corpus and returns the funnel."""
    output = os.fspath(output)
    before, after = divided(recipe.rules)
    attributes = [*recipe.attributes, *([recipe.lines.attribute()] if recipe.lines else [])]
    annotate.run(output, attributes, beam_options=beam_options)
    documents = open_documents(output)
    for score in recipe.scores:
        score.run(output, beam_options=beam_options)
    duplicates: tuple[rules.Rule, ...] = ()
    candidates = decide.Candidates(output, before)
    mix = recipe.mix
    if recipe.near is not None:
        near.run(output, documents, recipe.near, candidates=candidates, beam_options=beam_options)
        duplicates = (rules.EXACT, rules.NEAR)
    if recipe.lines is not None:
        kept = decide.Candidates(output, joined(before, duplicates, {}))
        lines.run(output, documents, recipe.lines, candidates=kept, beam_options=beam_options)
        mix = dataclasses.replace(mix, edits=(*mix.edits, "repeated_lines.removed"))
    return funnel.finish(
        output, joined(before, duplicates, after), mix,
        max_removed_share=recipe.max_removed_share, select=select, extra=settings,
        beam_options=beam_options,
    )  # fmt: skip


def divided(all_rules: rules.Rules) -> tuple[rules.Rules, rules.Rules]:
    """The rules before de-duplication and those after it, each in its order."""
    before = {s: tuple(r for r in some if r.stage in CLEANING) for s, some in all_rules.items()}
    after = {s: tuple(r for r in some if r.stage not in CLEANING) for s, some in all_rules.items()}
    for source, some in after.items():
        if any(rule.of for rule in some):
            raise UserError(
                f"rules for {source}: duplicates are a setting of the job, not a rule; leave "
                f"{next(rule.reason for rule in some if rule.of)!r} out"
            )
    return before, after


def joined(
    before: rules.Rules, duplicates: tuple[rules.Rule, ...], after: rules.Rules
) -> dict[str, tuple[rules.Rule, ...]]:
    sources = {*before, *after, "default"}
    return {
        source: (
            *rules.rules_for(source, before), *duplicates, *rules.rules_for(source, after)
        )
        for source in sorted(sources)
    }  # fmt: skip
