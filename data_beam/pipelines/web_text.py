"""Web pages and other text -> a clean text corpus: section 3.1.1 of the InternLM2 report.

format   WARC, WET, HTML, JSON lines, Parquet or plain text -> documents; extraction; language
clean    heuristic rules
dedup    exact, MinHash LSH (the newest dump stays), and, if wanted, lines
safe     block lists of domains and words; classifiers of toxicity and pornography
quality  classifiers of advertisement and fluency
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from data_beam.attributes.base import Attribute
from data_beam.attributes.fingerprints import Fingerprints
from data_beam.attributes.language import Language
from data_beam.attributes.pii import PersonalData
from data_beam.attributes.safety import BlockedDomains, BlockedWords
from data_beam.attributes.signals import C4Lines, TextSignals
from data_beam.dedup.lines import RepeatedLines
from data_beam.dedup.near import NearDuplicates
from data_beam.io import listing, readers
from data_beam.mix import funnel, rules, write
from data_beam.mix.rules import Rule
from data_beam.pipelines import build, decontaminate, ingest
from data_beam.scoring import score

# The four classifiers of the report, and the stage of the funnel that each belongs to.
CLASSIFIERS = {
    "toxicity": "safe", "pornography": "safe", "advertisement": "quality", "fluency": "quality",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WebText:
    """Settings. `rules` is a preset or a YAML file; `classifiers` maps a name of CLASSIFIERS to the
    folder of a trained classifier, whose own cut-off applies where no rule names its score;
    `cut_personal_data` cuts e-mail and
    IP addresses out of the texts. What is empty is left out."""

    rules: str = "internlm2_text"
    languages: tuple[str, ...] = ()
    language_backend: str = "cld2"
    language_model: str = ""
    domain_lists: tuple[str, ...] = ()
    word_lists: tuple[str, ...] = ()
    max_blocked_words: int = 3
    classifiers: dict[str, str] = dataclasses.field(default_factory=dict)
    benchmarks: tuple[str, ...] = ()
    cut_personal_data: bool = False
    near: NearDuplicates = dataclasses.field(default_factory=NearDuplicates)
    lines: RepeatedLines | None = None
    seed: int = 0
    validation_fraction: float = 0.02
    max_removed_share: float = funnel.MAX_REMOVED_SHARE


def recipe(settings: WebText, output: str | os.PathLike) -> build.Recipe:
    """The attributes to compute and the rules to apply; the index of evaluation sets, if any, is
    made below `output`."""
    attributes: list[Attribute] = [
        TextSignals(),
        Language(backend=settings.language_backend, model_file=settings.language_model),
        Fingerprints(
            ngram=settings.near.ngram, num_perm=settings.near.num_perm, seed=settings.seed
        ),
    ]  # fmt: skip
    extra: list[Rule] = []
    first: list[Rule] = []
    if settings.languages:
        first.append(
            Rule("language", "other_language", "language.lang", allowed=settings.languages)
        )
    if settings.domain_lists:
        attributes.append(BlockedDomains(settings.domain_lists))
        extra.append(Rule("safe", "blocked_domain", "blocked_domains.blocked", maximum=0))
    if settings.word_lists:
        attributes.append(BlockedWords(settings.word_lists))
        limit = settings.max_blocked_words
        extra.append(Rule("safe", "blocked_words", "blocked_words.count", maximum=limit))
    preset = rules.load(settings.rules)
    named = rules.attributes_of(preset)
    scores = []
    for name, folder in settings.classifiers.items():
        job = score.Classifier(name, folder)
        scores.append(job)
        if name not in named:
            extra.append(job.rule(CLASSIFIERS.get(name, "quality")))
    edits: list[str] = []
    if C4Lines.name in rules.attributes_of(preset):
        attributes.append(C4Lines())
        edits.append("c4.removed")
    if settings.cut_personal_data:
        attributes.append(PersonalData())
        edits.append("pii.removed")
    if settings.benchmarks:
        wanted = decontaminate.Decontaminate(benchmarks=settings.benchmarks)
        attributes.append(decontaminate.attribute(output, settings.benchmarks))
        first += decontaminate.rules(wanted)
    everything = {
        source: (*first, *some, *extra)
        for source, some in {"default": preset.get("text", ()), **preset}.items()
    }
    return build.Recipe(
        rules=everything, attributes=attributes, near=settings.near, lines=settings.lines,
        scores=scores, max_removed_share=settings.max_removed_share,
        mix=write.Mix(
            seed=settings.seed, validation_fraction=settings.validation_fraction,
            edits=tuple(edits),
        ),
    )  # fmt: skip


def run(
    inputs: Sequence[str],
    output: str | os.PathLike,
    settings: WebText | None = None,
    *,
    read: readers.ReadOptions | None = None,
    shards: int | None = None,
    wave_bytes: int | None = None,
    max_dead_share: float = 0.25,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Builds OUTPUT from the files that the patterns `inputs` match; returns the funnel."""
    settings = settings or WebText()
    todo = recipe(settings, output)  # a wrong setting is told before the first file is read
    files = listing.list_inputs(inputs, read, output)
    ingest.run(
        files, output, read=read, shards=shards, wave_bytes=wave_bytes,
        max_dead_share=max_dead_share, beam_options=beam_options,
    )  # fmt: skip
    return build.run(
        output, todo, settings={"web_text": dataclasses.asdict(settings)},
        beam_options=beam_options,
    )  # fmt: skip
