"""Runs of words so common in the training text that they say nothing of an evaluation set: a
licence, a famous passage, a template. Counted from the attribute's tables, no text is read again.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from data_beam import tables
from data_beam.io import storage
from data_beam.stage import read_manifest
from internlm2_jax.errors import UserError


def write(output: str | os.PathLike, path: str | os.PathLike, *, more_than: int) -> dict[str, Any]:
    """Writes to `path` the matched runs that stand in more than `more_than` documents of the
    annotated corpus `output`; give the file to `Contamination.of(index, ignore=path)` and annotate
    again.

    Returns {"index": digest of the index, "corpus": digest of the documents, "more_than",
    "ngrams": [hashes, ascending], "documents": [how many hold each]}.
    """
    if more_than < 1:
        raise UserError(f"more_than is {more_than}; a run of words is common from 1 document on")
    manifest = read_manifest(tables.folder_of(output, "contamination"), "attribute")
    if manifest["settings"]["ignore"]:
        raise UserError(
            f"{output} was annotated with common runs already ignored; annotate it without first"
        )
    found = [np.zeros(0, np.uint64)]
    for shard in range(len(manifest["shards"])):
        column = tables.read_attribute(output, "contamination", shard, ["ngrams"])["ngrams"]
        found += [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    keys, counts = np.unique(np.concatenate(found), return_counts=True)
    common = counts > more_than
    result = {
        "index": manifest["settings"]["digest"], "corpus": manifest["upstream"]["documents"],
        "more_than": more_than, "ngrams": keys[common].tolist(),
        "documents": counts[common].tolist(),
    }  # fmt: skip
    storage.write_json(path, result)
    return result


def is_counted(path: str | os.PathLike, index: str, corpus: str, more_than: int) -> bool:
    """Whether `write` left the file for this index (digest), these documents and this limit."""
    if not storage.exists(path):
        return False
    value = storage.read_json(path)
    wanted = {"index": index, "corpus": corpus, "more_than": more_than}
    return isinstance(value, dict) and {**value, **wanted} == value
