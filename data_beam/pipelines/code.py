"""Repositories -> one Markdown document each: section 3.1.2 of the InternLM2 report.

format   folders or archives of repositories, or records with `repo` and `path` -> files
clean    generated, vendored, minified files; rules; licences
dedup    by file, with the width of indentation unified
quality  three grades per language: high (to be repeated), moderate (once), low (dropped)
sort     files in the order of their imports, documentation before the code of its folder
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from data_beam.attributes.code_quality import CodeQuality
from data_beam.attributes.fingerprints import Fingerprints
from data_beam.attributes.licences import Licence
from data_beam.attributes.signals import TextSignals
from data_beam.code import assemble, grades
from data_beam.dedup.near import NearDuplicates
from data_beam.io import listing, readers
from data_beam.mix import decide, funnel, rules, write
from data_beam.mix.rules import Rule
from data_beam.pipelines import build, graded_code, ingest, repository
from data_beam.schema import Document, Drop

_IS_CODE = f"repository.kind={repository.CODE}"
# A licence's text has done its work when every file knows its licence.
LICENCE_TEXT = Rule(
    "licence", "licence_text", "repository.kind",
    allowed=(repository.CODE, repository.DOCUMENTATION, repository.MANIFEST),
)  # fmt: skip
NOT_PERMISSIVE = Rule("licence", "not_permissive", "repository.permissive", minimum=1)
UNLICENSED = Rule("licence", "no_licence", "repository.licensed", minimum=1)
GENERATED = Rule("filter", "generated", "licence.generated", maximum=0, where=_IS_CODE)
LOW_GRADE = Rule("quality", "low_grade", "grade.grade", allowed=(grades.HIGH, grades.MODERATE))


@dataclasses.dataclass(frozen=True)
class Code:
    """`licences` "permissive" keeps files whose licence, or else their repository's, permits use
    freely, and those without any unless `drop_unlicensed`; "any" keeps all."""

    rules: str = "internlm2_code"
    documentation_rules: str = "internlm2_text"
    licences: str = "any"
    drop_unlicensed: bool = False
    near: NearDuplicates = dataclasses.field(default_factory=NearDuplicates)
    grades: graded_code.Grades = dataclasses.field(default_factory=graded_code.Grades)
    max_document_bytes: int = 16 << 20
    seed: int = 0
    validation_fraction: float = 0.02
    max_removed_share: float = funnel.MAX_REMOVED_SHARE


@dataclasses.dataclass(frozen=True)
class Repositories:
    """Files of a shard -> one document per repository, graded by the mean grade of its bytes."""

    options: assemble.Options

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document | Drop]:
        graded_files = (
            document._replace(
                meta={**document.meta, "epochs": grades.EPOCHS[document.meta["grade"]]}
            )
            for document in documents
        )
        border = (grades.EPOCHS[grades.HIGH] + grades.EPOCHS[grades.MODERATE]) / 2
        for item in assemble.assemble(graded_files, self.options):
            if isinstance(item, Document):
                high = item.meta["epochs"] >= border
                grade = grades.HIGH if high else grades.MODERATE
                item = item._replace(meta={**item.meta, "grade": grade})
            yield item


@dataclasses.dataclass(frozen=True)
class Grading:
    """The scoring step of `build`: grades among the documents worth keeping."""

    settings: graded_code.Grades
    rules: rules.Rules

    def run(self, output: str | os.PathLike, beam_options: Sequence[str] = ()) -> dict[str, Any]:
        candidates = decide.Candidates(os.fspath(output), self.rules)
        return graded_code.run(output, self.settings, candidates, beam_options=beam_options)


def cleaning_rules(settings: Code) -> dict[str, tuple[Rule, ...]]:
    """Licences, then what no person wrote, then the rules: those for code on code, those for text
    on documentation."""
    first = [LICENCE_TEXT]
    if settings.licences == "permissive":
        first.append(NOT_PERMISSIVE)
    if settings.drop_unlicensed:
        first.append(UNLICENSED)
    prose = [
        dataclasses.replace(rule, where=f"repository.kind={repository.DOCUMENTATION}")
        for rule in rules.rules_for("text", rules.load(settings.documentation_rules))
        if rule.where is None
    ]
    return {
        source: (
            *first, GENERATED,
            *(rule if rule.where else dataclasses.replace(rule, where=_IS_CODE) for rule in some),
            *prose,
        )
        for source, some in rules.load(settings.rules).items()
    }  # fmt: skip


def recipe(settings: Code) -> build.Recipe:
    """The attributes to compute and the rules to apply."""
    cleaning = cleaning_rules(settings)
    options = assemble.Options(max_bytes=settings.max_document_bytes)
    return build.Recipe(
        rules={source: (*some, LOW_GRADE) for source, some in cleaning.items()},
        attributes=(
            TextSignals(), Licence(), CodeQuality(),
            Fingerprints(
                ngram=settings.near.ngram, num_perm=settings.near.num_perm, seed=settings.seed,
                tokenizer="code",
            ),
        ),
        near=settings.near,
        scores=(repository.Repository(), Grading(settings.grades, cleaning)),
        mix=write.Mix(
            seed=settings.seed, validation_fraction=settings.validation_fraction, split_by="repo",
            licence="repository.spdx", suffix="grade.grade", assemble=Repositories(options),
        ),
        max_removed_share=settings.max_removed_share,
    )  # fmt: skip


def run(
    inputs: Sequence[str],
    output: str | os.PathLike,
    settings: Code | None = None,
    *,
    read: readers.ReadOptions | None = None,
    shards: int | None = None,
    wave_bytes: int | None = None,
    max_dead_share: float = 0.25,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Builds OUTPUT from the repositories that `inputs` match; returns the funnel."""
    settings = settings or Code()
    todo = recipe(settings)  # a wrong setting is told before the first file is read
    read = dataclasses.replace(read or readers.ReadOptions(), source="code")
    files = listing.list_inputs(inputs, read, output)
    ingest.run(
        files, output, read=read, shards=shards, wave_bytes=wave_bytes,
        max_dead_share=max_dead_share, beam_options=beam_options,
    )  # fmt: skip
    return build.run(
        output, todo, settings={"code": dataclasses.asdict(settings)}, beam_options=beam_options
    )
