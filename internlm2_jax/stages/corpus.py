"""Raw files -> documents: the Beam job of `data_beam`, as a stage."""

from __future__ import annotations

from pathlib import Path

from internlm2_jax import files


def corpus(
    folder: Path,
    *,
    files_below: str | None = None,
    max_bytes: int | None = 28_000_000,
    validation_fraction: float = 0.02,
    ngram: int = 5,
    num_perm: int = 128,
    bands: int = 16,
    rows: int = 8,
    threshold: float = 0.7,
    shards: int = 2,
    clean: bool = True,
    deduplicate: bool = True,
    seed: int = 0,
) -> None:
    """Builds the corpus of the text and code `files_below` a folder, or of the machine's own.

    What was read is in `folder`/documents, what was measured of it in `folder`/attributes, what was
    kept in `folder`/corpus, with a funnel and samples. Without `clean`, or `deduplicate`, that step
    drops nothing.
    """
    from data_beam.pipelines import corpus as pipeline

    funnel = pipeline.run(
        folder,
        corpus=None if files_below is None else Path(files_below),
        max_bytes=max_bytes,
        validation_fraction=validation_fraction,
        ngram=ngram,
        num_perm=num_perm,
        bands=bands,
        rows=rows,
        threshold=threshold,
        shards=shards,
        seed=seed,
        filters=None if clean else {"default": ()},
        deduplicate=deduplicate,
    )
    files.write_json(
        folder / "result.json",
        {"input_bytes": funnel["input_bytes"], "sources": funnel["sources"]},
    )
