"""The records that flow through the jobs: documents, the reason why one was dropped, and what could
not be read at all."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import orjson

from internlm2_jax.errors import UserError


class Document(NamedTuple):
    """One text with its origin.

    `id` is 32 hexadecimal digits derived from the content and its origin (`document_id`), so it
    depends neither on the order of reading nor on where the input lies or how it is divided into
    files. `source` is the part of the mixture ("code", "text"). `dump` and `timestamp` (seconds
    since 1970, 0 = unknown) say how new it is: de-duplication keeps the newest copy. `lang` is a
    programming language for code, a BCP 47 tag for text ("und" = not determined). `meta` holds
    strings, numbers, booleans.
    """

    id: str
    text: str
    source: str
    url: str = ""
    dump: str = ""
    timestamp: int = 0
    lang: str = "und"
    license: str = ""
    repo: str = ""
    path: str = ""
    meta: dict[str, Any] = {}  # noqa: RUF012  never mutated: documents are values

    def to_bytes(self) -> bytes:
        return orjson.dumps(self._asdict())

    @classmethod
    def from_bytes(cls, record: bytes) -> Document:
        """Raises UserError when `record` is not a document of this schema."""
        try:
            return cls(**orjson.loads(record))
        except (orjson.JSONDecodeError, TypeError) as error:
            raise UserError(
                f"a record is not a corpus document ({error}); point --input at a corpus folder"
            ) from error

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())


class Drop(NamedTuple):
    """Why a document was removed.

    `value` is the measured quantity that decided (a ratio, a count, an estimated Jaccard
    similarity). `of_id` names the surviving document when this one was its duplicate, else "".
    """

    id: str
    stage: str
    reason: str
    value: float = 0.0
    of_id: str = ""

    def to_bytes(self) -> bytes:
        return orjson.dumps(self._asdict())

    @classmethod
    def from_bytes(cls, record: bytes) -> Drop:
        return cls(**orjson.loads(record))


class DeadLetter(NamedTuple):
    """Input that gave no document, and why.

    `where` is the file, then "#record" or "!member" inside it; `detail` one line for people; `head`
    the first characters of what was found there.
    """

    where: str
    reason: str
    source: str
    detail: str = ""
    num_bytes: int = 0
    head: str = ""

    def to_bytes(self) -> bytes:
        return orjson.dumps(self._asdict())

    @classmethod
    def from_bytes(cls, record: bytes) -> DeadLetter:
        return cls(**orjson.loads(record))


def document_id(source: str, origin: str, text: str, repo: str = "", dump: str = "") -> str:
    """128-bit id of a document.

    `origin` is what the document calls itself: its own id, its URL, or its path inside the folder
    or archive. The first half is a hash of `repo` where there is one, so that the files of one
    repository share a shard and stand together in it; the second half is always of the content.
    """
    key = "\0".join((source, origin, dump, text)).encode("utf-8", "surrogatepass")
    content = hashlib.blake2b(key, digest_size=16).hexdigest()
    if not repo:
        return content
    return hashlib.blake2b(f"{source}\0{repo}".encode(), digest_size=8).hexdigest() + content[16:]


def shard_of(id: str, shards: int) -> int:
    """The shard of a document among `shards`."""
    return int(id[:16], 16) % shards


def hash63(text: str | bytes, seed: int = 0, purpose: str = "") -> int:
    """A uniform number in [0, 2^63), which Beam's integer coder holds; different `purpose`s give
    independent numbers."""
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    salt = hashlib.blake2b(f"{purpose}\0{seed}".encode(), digest_size=16).digest()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=salt).digest(), "big") >> 1
