"""Documents -> attributes: one pass over the document shards computes every attribute that is not
there yet. Nothing is shuffled, and each shard of each attribute is a unit of resumption."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from data_beam import progress, runners, tables  # runners first: it imports Beam without its noise
from data_beam.attributes.base import Attribute, Examined, settings_of
from data_beam.attributes.facts import Facts
from data_beam.io import storage
from data_beam.stage import Documents, Output, open_documents
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

beam = runners.beam
# What an attribute sees at a time: at most so many documents, and about so many characters, of
# which each may take 150 bytes while it is examined.
_BATCH_DOCUMENTS, _BATCH_CHARS = 64, 1 << 20


def output_of(output: str | os.PathLike, attribute: Attribute, documents: Documents) -> Output:
    """The folder of an attribute. A shard's key changes with the settings or its documents."""
    settings = settings_of(attribute)
    keys = tuple(fingerprint([settings, digest]) for digest in documents.digests)
    return Output(tables.folder_of(output, attribute.name), "attribute", tables.SUFFIX, keys)


def run(
    output: str | os.PathLike,
    attributes: Sequence[Attribute],
    *,
    beam_options: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Computes `attributes`, and always `Facts`, for the documents below `output`.

    Returns the manifest of each by name.
    """
    documents = open_documents(output)
    wanted: list[Attribute] = [Facts(), *attributes]
    names = [attribute.name for attribute in wanted]
    if len(set(names)) < len(names):
        raise UserError(f"an attribute is asked for twice among {', '.join(names)}")
    outputs = [output_of(output, attribute, documents) for attribute in wanted]
    work: dict[int, list[int]] = {}
    for index, (attribute, target) in enumerate(zip(wanted, outputs, strict=True)):
        if not target.is_complete(settings_of(attribute), {"documents": documents.digest}):
            target.start()
            for shard in target.pending():
                work.setdefault(shard, []).append(index)
    pending, annotate = sorted(work.items()), _Annotate(documents, wanted, outputs)
    count = sum(documents.counts[shard] for shard in work)
    runners.run_over(
        pending, "Annotate", annotate, beam_options, shown="attributes", documents=count
    )
    return {
        attribute.name: target.complete(settings_of(attribute), {"documents": documents.digest})
        for attribute, target in zip(wanted, outputs, strict=True)
    }


class _Annotate(beam.DoFn):
    """(shard, indices of the attributes to compute) -> their shards, written."""

    def __init__(self, documents: Documents, attributes: list[Attribute], outputs: list[Output]):
        super().__init__()
        self.documents, self.attributes, self.outputs = documents, attributes, outputs

    def setup(self):
        self.ready: set[int] = set()

    def process(self, element):
        shard, indices = element
        for index in indices:
            if index not in self.ready:
                self.attributes[index].setup()
                self.ready.add(index)
        with contextlib.ExitStack() as stack:
            writers = {}
            for index in indices:
                path = stack.enter_context(storage.whole(self.outputs[index].path(shard)))
                writers[index] = tables.Writer(path, self.attributes[index].schema)
                stack.callback(writers[index].close)
            batch: list[Examined] = []
            chars = 0
            for document in self.documents.read(shard):
                batch.append(Examined(document))
                chars += len(document.text)
                if len(batch) == _BATCH_DOCUMENTS or chars >= _BATCH_CHARS:
                    self._write(batch, writers)
                    batch, chars = [], 0
            if batch:
                self._write(batch, writers)
        for index in indices:
            self.outputs[index].finish(shard, writers[index].rows)

    def _write(self, batch: list[Examined], writers: dict[int, tables.Writer]) -> None:
        ids = [examined.document.id for examined in batch]
        for index, writer in writers.items():
            writer.write(ids, self.attributes[index].compute(batch))
        progress.bump(len(batch), sum(len(examined.document.text) for examined in batch))
