"""Block lists as attributes: the domain a page comes from, the words it uses.

The lists are the user's files. What is in them is part of the settings, by a digest: a changed list
is computed again, and a worker that reads another content than the job was started with fails.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_beam.attributes.base import Examined
from data_beam.io import storage
from data_beam.kernels.blocklists import Domains, Found, ListError, Phrases, host_of, text_lines
from internlm2_jax.errors import UserError

_LOADING = threading.Lock()  # of the threads of a worker, one reads the list and the others wait


class _Lists:
    """Of an attribute with the fields `lists` and `digest`."""

    lists: tuple[str, ...]
    digest: str
    name: ClassVar[str]

    def __post_init__(self):
        if not self.lists or isinstance(self.lists, str):
            raise UserError(f"{self.name} needs the files of its lists, as a tuple of paths")
        hashes = []
        for path in self.lists:
            try:
                hashes.append(storage.digest(path))
            except OSError as error:
                raise UserError(_unreadable(path, error)) from error
        digest = _combined(hashes)
        if self.digest not in ("", digest):
            raise UserError(
                f"{self.lists[0]}: the block list has changed since the job was started"
            )
        object.__setattr__(self, "digest", digest)


@dataclasses.dataclass(frozen=True)
class BlockedDomains(_Lists):
    """`blocked` is 1 when the host of the document's URL, or a domain above it, is on a list;
    `domain` is the entry. Null without a URL. Lists: see `kernels.blocklists.Domains.read`."""

    name: ClassVar[str] = "blocked_domains"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema([("blocked", pa.int32()), ("domain", pa.string())])

    lists: tuple[str, ...]
    digest: str = ""  # of the lists; found out, never given

    def setup(self) -> None:
        with _LOADING:
            _domains(self.lists, self.digest)

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        hosts = [host_of(examined.document.url) for examined in batch]
        with _LOADING:
            domains = _domains(self.lists, self.digest)
        found = domains.match(hosts)
        return {
            "blocked": [host and int(entry is not None)
                        for host, entry in zip(hosts, found, strict=True)],
            "domain": found,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BlockedWords(_Lists):
    """`count` occurrences of entries of the lists, `distinct` entries, the `share` of the words
    that belong to one (NaN for a text without words), and the `first` entry that occurs. How they
    match: `kernels.blocklists.Phrases`."""

    name: ClassVar[str] = "blocked_words"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("count", pa.int32()),
            ("distinct", pa.int32()),
            ("share", pa.float32()),
            ("first", pa.string()),
        ]
    )

    lists: tuple[str, ...]
    digest: str = ""  # of the lists; found out, never given

    def setup(self) -> None:
        with _LOADING:
            _phrases(self.lists, self.digest)

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        with _LOADING:
            phrases = _phrases(self.lists, self.digest)
        found = [phrases.search(examined.document.text) for examined in batch]
        return {
            "count": [one.occurrences for one in found],
            "distinct": [one.distinct for one in found],
            "share": [_share(one, examined) for one, examined in zip(found, batch, strict=True)],
            "first": [one.first for one in found],
        }


def _share(found: Found, examined: Examined) -> float:
    words = len(examined.signals.words.hashes)
    return min(1.0, found.words / words) if words else math.nan


@functools.lru_cache(maxsize=2)
def _domains(lists: tuple[str, ...], digest: str) -> Domains:
    parts, hashes = [], []
    for path in lists:
        seen = hashlib.blake2b(digest_size=16)
        try:
            with storage.open_read(path) as file:
                parts.append(Domains.read(file, seen).hashes)
        except OSError as error:
            raise UserError(_unreadable(path, error)) from error
        except ListError as error:
            raise UserError(f"{path}, {error}; mend or remove it") from error
        hashes.append(seen.hexdigest())
    _check(lists, hashes, digest)
    return Domains(parts[0] if len(parts) == 1 else np.concatenate(parts))


@functools.lru_cache(maxsize=2)
def _phrases(lists: tuple[str, ...], digest: str) -> Phrases:
    entries: list[str] = []
    hashes = []
    for path in lists:
        try:
            with storage.open_read(path) as file:
                data = file.read()
            entries.extend(text_lines(data))
        except OSError as error:
            raise UserError(_unreadable(path, error)) from error
        except ListError as error:
            raise UserError(f"{path}, {error}; save it as UTF-8") from error
        hashes.append(hashlib.blake2b(data, digest_size=16).hexdigest())
    _check(lists, hashes, digest)
    try:
        return Phrases.read(entries)
    except ListError as error:
        raise UserError(f"{lists[0]}: {error}; write one a line") from error
    except ImportError as error:
        raise UserError(
            "word block lists need ahocorasick-rs: pip install 'internlm2-jax[data]'"
        ) from error


def _check(lists: tuple[str, ...], hashes: list[str], digest: str) -> None:
    if _combined(hashes) != digest:
        raise UserError(f"{lists[0]}: the block list has changed since the job was started")


def _combined(hashes: list[str]) -> str:
    return hashlib.blake2b("".join(sorted(hashes)).encode(), digest_size=16).hexdigest()


def _unreadable(path: str, error: OSError) -> str:
    return f"cannot read the block list {path}: {error.strerror or error}; check the path"
