"""A folder of text and code, or what this machine holds, -> a corpus: the demo's recipe.

The stages follow section 3.1.1 of the InternLM2 report: format, clean, de-duplicate (MinHash LSH,
word 5-grams, 128 hashes, threshold 0.7, newest kept).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_beam.attributes.fingerprints import Fingerprints
from data_beam.attributes.signals import TextSignals
from data_beam.dedup.near import NearDuplicates
from data_beam.io import harvest, listing
from data_beam.mix import rules, write
from data_beam.pipelines import build, ingest
from internlm2_jax.errors import UserError

# Enough text for a small model, little enough for a minute on two cores.
MACHINE_BYTES = 28_000_000
# A folder may be full of pictures; what of it is text still makes a corpus.
MAX_DEAD_SHARE = 0.98


def default_rules() -> dict[str, tuple[rules.Rule, ...]]:
    text, code = rules.load("internlm2_text"), rules.load("internlm2_code")
    return {"default": text["text"], "text": text["text"], "code": code["code"]}


def run(
    output: str | os.PathLike,
    *,
    corpus: str | Path | None = None,
    seed: int = 0,
    max_bytes: int | None = MACHINE_BYTES,
    min_bytes: int = 20_000_000,
    ngram: int = 5,
    num_perm: int = 128,
    bands: int = 16,
    rows: int = 8,
    threshold: float = 0.7,
    validation_fraction: float = 0.02,
    shards: int = 2,
    filters: Mapping[str, Sequence[rules.Rule]] | None = None,
    deduplicate: bool = True,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Builds OUTPUT/corpus and returns its funnel (also in OUTPUT/corpus/funnel.json).

    Reads every text and code file below `corpus`, or, when that is None, what the machine holds
    (`io.harvest`). At most about `max_bytes` of text are read, half of it code if possible (None =
    everything); a machine with less than `min_bytes` is a UserError. `filters` are rules per source
    instead of the presets; without `deduplicate` copies stay. Equal files, seed
    and settings give equal bytes.
    """
    near = NearDuplicates(
        ngram=ngram, num_perm=num_perm, bands=bands, rows=rows, threshold=threshold
    )
    if not 0 < validation_fraction < 1:
        raise UserError(
            f"validation_fraction {validation_fraction} is not between 0 and 1; try 0.02"
        )
    if shards < 1 or (max_bytes is not None and max_bytes < 1):
        raise UserError("shards and max_bytes must be at least 1")

    if corpus is not None:
        listed = listing.list_folder(Path(corpus), exclude=(Path(output),))
        files = listing.select(listed, max_bytes, seed)
    else:
        listed = harvest.list_machine()
        files = harvest.select_machine(listed, max_bytes or 1 << 62, seed)
        if (found := sum(file.size for file in listed)) < min_bytes:
            raise UserError(
                f"this machine holds only {found / 1e6:.1f} MB of readable text and code, "
                f"{min_bytes / 1e6:.0f} MB are needed; give a folder with --corpus DIR"
            )
    ingest.run(
        files, output, shards=shards, max_dead_share=MAX_DEAD_SHARE, beam_options=beam_options
    )
    recipe = build.Recipe(
        rules=filters or default_rules(),
        attributes=(TextSignals(), Fingerprints(ngram=ngram, num_perm=num_perm, seed=seed)),
        near=near if deduplicate else None,
        mix=write.Mix(seed=seed, validation_fraction=validation_fraction),
        max_removed_share=1,  # a person's own folder may be mostly copies
    )
    funnel = build.run(
        output, recipe, select=_selection(listed, files), settings={"max_bytes": max_bytes},
        beam_options=beam_options,
    )  # fmt: skip
    return {**funnel, "input_files": len(files)}


def _selection(
    listed: Sequence[listing.FileRef], files: Sequence[listing.FileRef]
) -> dict[str, Any]:
    """The head of the funnel: files that the budget left out."""
    selected = {(file.root, file.path) for file in files}
    unread = [file.size for file in listed if (file.root, file.path) not in selected]
    chosen = sum(file.size for file in files)
    return {
        "stage": "select", "unit": "file",
        "documents_in": len(files) + len(unread), "documents_out": len(files),
        "bytes_in": chosen + sum(unread), "bytes_out": chosen,
        "dropped": {"over_budget": {"documents": len(unread), "bytes": sum(unread)}} if unread
        else {},
    }  # fmt: skip
