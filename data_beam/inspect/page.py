"""The page about a corpus: one self-contained HTML file for people who look at data.

It needs no network, holds no script, no date and no path of this machine; the same folder gives the
same bytes. All text in it is escaped: documents are anybody's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from data_beam.inspect import (
    classifiers,
    contamination,
    duplicates,
    funnel,
    letters,
    settings,
    signals,
)
from data_beam.inspect import scan as scanning
from data_beam.inspect.corpus import Corpus
from data_beam.io import storage
from internlm2_jax.report.page import layout

NAME = "inspect.html"


def build(
    output: str | os.PathLike,
    page: str | os.PathLike | None = None,
    *,
    max_shards: int | None = None,
    classifier_folders: Mapping[str, str] | None = None,
) -> str:
    """Writes the page about the pipeline output `output` and returns its path, `page` or
    OUTPUT/inspect.html.

    With `max_shards`, histograms, curves and samples are of so many shards only, a random sample of
    the documents; the funnel is always of all. `classifier_folders`, by the name to show, hold a
    classifier's result.json each; None = those that the corpus was made with. Raises UserError when
    OUTPUT holds no documents, or a file in it is damaged.
    """
    path = os.fspath(page) if page is not None else storage.join(output, NAME)
    text = render(Corpus(output, max_shards), classifier_folders)
    with storage.whole(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))
    return path


def render(corpus: Corpus, classifier_folders: Mapping[str, str] | None = None) -> str:
    """The page as text."""
    scan = scanning.scan(corpus)
    clusters = scanning.clusters(corpus)
    if classifier_folders is None:
        classifier_folders = settings.classifiers(corpus)
    return layout(
        name=corpus.name,
        kind="corpus",
        about="What came in, what was dropped and why; made from the files of the pipeline.",
        headlines=[
            *funnel.headlines(corpus),
            *signals.headlines(scan),
            *duplicates.headlines(clusters, scan),
            *letters.headlines(corpus),
        ],
        sections=[
            funnel.funnel(corpus),
            funnel.sources(corpus, scan),
            funnel.languages(corpus, scan),
            *signals.sections(corpus, scan),
            classifiers.section(corpus, classifier_folders),
            duplicates.section(corpus, scan, clusters),
            contamination.section(corpus),
            letters.section(corpus),
            settings.samples(corpus),
            settings.section(corpus),
        ],
    )
