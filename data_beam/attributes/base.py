"""The protocol of an attribute: named columns with one value per document.

Attributes are written beside the documents, never into them, so that a threshold can change, or an
attribute be added, without reading a web crawl again (the layout is dolma's, Soldaini et al. 2024).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from data_beam.kernels.textstats import Signals
from data_beam.schema import Document


class Examined:
    """A document, with what several attributes compute from it only once."""

    def __init__(self, document: Document):
        self.document = document

    @functools.cached_property
    def signals(self) -> Signals:
        return Signals(self.document.text)


class Attribute(Protocol):
    """A frozen dataclass whose fields are its settings.

    A document's values depend on that document and the settings alone. None and NaN say nothing: no
    rule drops a document for them.
    """

    name: ClassVar[str]  # of the folder below attributes/
    version: ClassVar[int]  # raised whenever the values would change
    schema: ClassVar[pa.Schema]  # of the columns, without `id`

    def setup(self) -> None:
        """Loads lists or models, once per worker."""
        ...

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        """One value per document for every column."""
        ...


def settings_of(attribute: Any) -> dict[str, Any]:
    """Name, version and fields, in JSON types: what a result of the attribute depends on."""
    fields = dataclasses.asdict(attribute)
    return {"attribute": attribute.name, "version": attribute.version, **fields}
