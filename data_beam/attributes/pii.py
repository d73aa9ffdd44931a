"""Personal data that patterns can find: e-mail addresses, public IP addresses, telephone numbers.

The report says nothing of these; dolma and FineWeb mask e-mail and public IP addresses, which is
the default here.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pyarrow as pa

from data_beam.attributes.base import Examined
from internlm2_jax.errors import UserError

_KINDS = ("email", "ip", "phone")
# All ASCII: Chinese may stand right before and behind. RFC 5321 without quoted local parts;
# bounded, so that a long run of letters does not cost its square.
_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![\w-])",
    re.ASCII,
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])", re.ASCII)
# With a country code, as North America groups them, or as a Chinese mobile number.
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){2,4}"
    r"|(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"
    r"|1[3-9]\d{9})(?![\w-]|\.\d)",
    re.ASCII,
)


@dataclasses.dataclass(frozen=True)
class PersonalData:
    """Counts `emails`, `ips`, `phones` (of numbers that look like one). `removed` are the spans of
    the kinds in `cut`, for the edit "pii.removed" of the mix.

    An IP address counts when it is one of the public internet; "1.2.3.4" does, as a version number
    it may be wrong.
    """

    name: ClassVar[str] = "pii"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("emails", pa.int32()),
            ("ips", pa.int32()),
            ("phones", pa.int32()),
            ("removed", pa.list_(pa.int32())),
        ]
    )

    cut: tuple[str, ...] = ("email", "ip")

    def __post_init__(self):
        for kind in self.cut:
            if kind not in _KINDS:
                raise UserError(f"pii: cannot cut {kind!r}; known: {', '.join(_KINDS)}")

    def setup(self) -> None:
        pass

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        found = [list(find(examined.document.text)) for examined in batch]
        columns: dict[str, Sequence[Any]] = {
            kind + "s": [sum(one == kind for one, _, _ in spans) for spans in found]
            for kind in _KINDS
        }
        columns["removed"] = [
            [place for kind, *span in sorted(spans, key=_start) if kind in self.cut
             for place in span]
            for spans in found
        ]  # fmt: skip
        return columns


def _start(span: tuple[str, int, int]) -> int:
    return span[1]


def find(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of everything found, kind by kind."""
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield "email", *match.span()
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                public = ipaddress.ip_address(match.group()).is_global
            except ValueError:  # 300.1.2.3, too many groups
                continue
            if public:
                yield "ip", *match.span()
    for match in _PHONE.finditer(text):
        yield "phone", *match.span()
