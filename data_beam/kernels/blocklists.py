"""Block lists of the user's: millions of domains in 8 bytes each, and words matched at the
boundaries of tokens.

InternLM2 drops pages by a list of 13 million domains and one of 36,289 words (report, section
3.1.1); neither is public, so lists are files, one entry a line.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from data_beam.kernels.tokens import WORD, character_classes, codepoints, hash_slices, tokenize

_CHUNK = 1 << 23  # bytes read at a time
_MAX_DOMAIN = 253  # characters of a name (RFC 1035)
_SURROGATE = re.compile("[\ud800-\udfff]")
_LF, _HASH, _DOT, _STAR = b"\n#.*"


class ListError(ValueError):
    """An entry that cannot be read; says which line."""


# Domains


@functools.cache
def _allowed() -> np.ndarray:
    """[256] bool: bytes of names in lower case; those of UTF-8 stand for internationalised ones."""
    allowed = np.zeros(256, bool)
    allowed[list(b"abcdefghijklmnopqrstuvwxyz0123456789-._")] = True
    allowed[128:] = True
    return allowed


class Domains:
    """A set of domain names, each kept as a 64-bit hash. With 13 million names a foreign host is
    taken for a listed one once in 10^12 look-ups."""

    def __init__(self, hashes: np.ndarray):
        """`hashes` [D] uint64 in any order; the array is sorted in place."""
        hashes.sort()
        self.hashes = hashes[np.append(True, hashes[1:] != hashes[:-1])] if len(hashes) else hashes

    def __len__(self) -> int:
        return len(self.hashes)

    @classmethod
    def read(cls, file: BinaryIO, digest: Any = None) -> Domains:
        """One domain a line. Comments begin with "#"; of several fields (hosts files) the last
        counts; "*." and dots around the name do not. Raises ListError. `digest`, an object of
        hashlib, is fed the bytes."""
        parts = [np.zeros(0, np.uint64)]
        first_line, rest = 1, b""
        while block := file.read(_CHUNK):
            if digest is not None:
                digest.update(block)
            lines, newline, rest = (rest + block).rpartition(b"\n")
            parts.append(_hash_lines(lines + newline, first_line))
            first_line += lines.count(b"\n") + len(newline)
        parts.append(_hash_lines(rest + b"\n", first_line))
        return cls(np.concatenate(parts))

    def match(self, hosts: Sequence[str | None]) -> list[str | None]:
        """For every host the listed name that it is or lies below, the longest of several."""
        owners: list[int] = []
        names: list[bytes] = []
        for owner, host in enumerate(hosts):
            name = host.encode() if host else b""
            while name:  # the host, then what it lies below
                owners.append(owner)
                names.append(name)
                name = name.partition(b".")[2]
        result: list[str | None] = [None] * len(hosts)
        if not names or not len(self.hashes):
            return result
        hashes = _hash_names(names)
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        for hit in np.flatnonzero(self.hashes[places] == hashes)[::-1].tolist():
            result[owners[hit]] = names[hit].decode()
        return result


def host_of(url: str) -> str | None:
    """The host of a URL in lower case, without port and final dot, internationalised names in
    ASCII; None where there is none."""
    try:
        host = urlsplit(url if "//" in url else "//" + url).hostname
        host = (host or "").rstrip(".")
        host = host if host.isascii() else host.encode("idna").decode()
    except ValueError:  # UnicodeError is one
        return None
    return host if 0 < len(host) <= _MAX_DOMAIN else None


def _hash_lines(data: bytes, first_line: int) -> np.ndarray:
    """[domains] uint64 of whole lines."""
    data = data.lower()
    points = np.frombuffer(data, np.uint8)
    stops = np.flatnonzero(points == _LF)
    begins = np.append(0, stops[:-1] + 1)
    text = points > 0x20
    comments = np.flatnonzero(points == _HASH)
    for line in np.unique(np.searchsorted(stops, comments)).tolist():
        text[data.index(b"#", begins[line]) : stops[line]] = False
    visible = np.flatnonzero(text)
    last = np.searchsorted(visible, stops) - 1
    filled = np.flatnonzero((last >= 0) & (visible[last] >= begins) if len(visible) else [])
    if not len(filled):
        return np.zeros(0, np.uint64)
    ends = visible[last[filled]] + 1
    # The last field begins after the last gap in what is visible.
    gaps = np.append(0, np.flatnonzero(np.diff(visible) > 1) + 1)
    starts = visible[gaps[np.searchsorted(gaps, last[filled], "right") - 1]]
    for _ in range(2):
        starts = starts + (
            (points[starts] == _STAR) & (points[np.minimum(starts + 1, ends)] == _DOT)
        )
        starts = starts + ((points[starts] == _DOT) & (ends - starts > 1))
    ends = ends - ((points[ends - 1] == _DOT) & (ends - starts > 1))

    def bad_name(one: int) -> ListError:
        name = data[starts[one] : ends[one]][:60].decode("utf-8", "replace")
        return ListError(f"line {first_line + int(filled[one])}: {name!r} is not a domain name")

    bad = np.flatnonzero(~_allowed()[points])
    wrong = np.searchsorted(bad, starts) < np.searchsorted(bad, ends)
    wrong |= (ends - starts > _MAX_DOMAIN) | (points[starts] == _DOT)
    if wrong.any():
        raise bad_name(int(np.argmax(wrong)))
    foreign = np.flatnonzero(points >= 0x80)
    if not len(foreign):
        return hash_slices(data, starts, ends)
    ascii_ = np.searchsorted(foreign, starts) == np.searchsorted(foreign, ends)
    encoded = []
    for one in np.flatnonzero(~ascii_).tolist():
        try:
            name = data[starts[one] : ends[one]].decode("utf-8")
            encoded.append(name.lower().encode("idna"))
        except UnicodeError as error:
            raise bad_name(one) from error
    return np.concatenate([hash_slices(data, starts[ascii_], ends[ascii_]), _hash_names(encoded)])


def _hash_names(names: list[bytes]) -> np.ndarray:
    lengths = np.array([len(name) for name in names], np.int64)
    ends = np.cumsum(lengths)
    return hash_slices(b"".join(names), ends - lengths, ends)


# Words


class Found(NamedTuple):
    """`occurrences` of entries in a text, of `distinct` entries, made of `words` words; `first` is
    the entry of the first."""

    occurrences: int = 0
    distinct: int = 0
    words: int = 0
    first: str | None = None


def _spelling(text: str) -> str:
    """Lower case, composed, every run of white space as one space."""
    if not text.isascii():  # the matcher takes no lone surrogates
        text = _SURROGATE.sub("\ufffd", unicodedata.normalize("NFC", text))
    return " ".join(text.lower().split())


class Phrases:
    """Words and phrases. A side of an entry that is a letter or digit of a script with spaces must
    lie at the boundary of a word, so that "ass" is not found in "class"; ideographs are words of
    their own, so Chinese entries are found anywhere."""

    def __init__(self, entries: Iterable[str]):
        from ahocorasick_rs import AhoCorasick

        self.entries = sorted({spelling for entry in entries if (spelling := _spelling(entry))})
        if not self.entries:
            raise ListError("it has no entries")
        self._matcher = AhoCorasick(self.entries, store_patterns=False)
        self._words = np.array([max(1, len(tokenize(e).hashes)) for e in self.entries])
        classes = character_classes()
        self._bound = np.array(
            [[classes[ord(e[0])] == WORD, classes[ord(e[-1])] == WORD] for e in self.entries]
        )

    @classmethod
    def read(cls, lines: Iterable[str]) -> Phrases:
        """One entry a line; a line that begins with "#" is a comment. Raises ListError."""
        return cls(line for line in lines if not line.lstrip().startswith("#"))

    def search(self, text: str) -> Found:
        """An occurrence inside a longer one does not count."""
        text = _spelling(text)
        matches = self._matcher.find_matches_as_indexes(text, overlapping=True)
        if not matches:
            return Found()
        entry, starts, ends = np.array(matches, np.int64).T
        # Spaces around the text, so that its ends are boundaries.
        inside = np.zeros(len(text) + 2, bool)
        np.equal(character_classes().take(codepoints(text)), WORD, out=inside[1:-1])
        left, right = self._bound[entry].T
        good = ~(left & inside[starts] | right & inside[ends + 1])
        entry, starts, ends = entry[good], starts[good], ends[good]
        if not len(entry):
            return Found()
        order = np.lexsort((-ends, starts))
        entry, ends = entry[order], ends[order]
        outer = np.ones(len(ends), bool)
        outer[1:] = ends[1:] > np.maximum.accumulate(ends)[:-1]
        entry = entry[outer]
        return Found(
            len(entry), len(np.unique(entry)), int(self._words[entry].sum()),
            self.entries[entry[0]],
        )  # fmt: skip


_LINE_ENDS = re.compile(rb"\r\n|\r|\n")


def text_lines(data: bytes) -> Iterator[str]:
    """The lines of a UTF-8 file, its byte-order mark left out. Raises ListError."""
    for number, line in enumerate(_LINE_ENDS.split(data.removeprefix(b"\xef\xbb\xbf")), 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ListError(f"line {number} is not UTF-8") from error
