"""One reader for every compressed stream: it gives what stands before damage, then raises.

The standard library's readers lose a whole buffer when a stream is cut, or (zstandard's) take an
unfinished frame for an end. This one is fed a kilobyte at a time, which bounds both what damage
costs and what a bomb can unpack to at once.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections import deque
from typing import Any, BinaryIO

import zstandard

_READ = 1 << 16
_FEED = 1 << 10  # compressed bytes a call: 32 MB of output at the very worst (zstd)
_STEP = 1 << 12  # uncompressed bytes a call: what an error costs of what stands before it
_FULL = 1 << 16  # uncompressed bytes gathered before they are handed on
_XZ_MEMORY = 256 << 20

_MEMBERS = {
    "gzip": lambda: zlib.decompressobj(31),
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
    "xz": lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY),
    "bzip2": bz2.BZ2Decompressor,
}
_SUFFIXES = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError)


class Damaged(Exception):
    """A compressed stream cannot be read on. `reason` names the format, `offset` the byte of the
    compressed file near which it went wrong, `member` where the damaged member begins."""

    def __init__(self, reason: str, detail: str, offset: int, member: int):
        super().__init__(f"{detail} near compressed byte {offset}")
        self.reason, self.offset, self.member = reason, offset, member


def format_of(path: str) -> str:
    """The compression that a name stands for, "" for none."""
    name = path.lower()
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), "")


class Decompressed(io.RawIOBase):
    """The members of a gzip, zstd, xz or bzip2 stream, one after the other.

    The handle stays open. `starts` holds (uncompressed offset, compressed offset) of the members
    begun last, oldest first.
    """

    def __init__(self, handle: Any, kind: str, offset: int = 0):
        super().__init__()
        self.kind, self.compressed, self.given = kind, offset, 0
        self.starts: deque[tuple[int, int]] = deque(maxlen=1 << 16)
        self._handle, self._new = handle, _MEMBERS[kind]
        self._input = memoryview(b"")
        self._ready = bytearray()
        self._member: Any = None
        self._failed: Damaged | None = None
        self._ended = False

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.given

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, b"" at the end. Fewer may come: a reader that waits for more (as
        io.BufferedReader does) would lose them to damage that follows."""
        if size < 0:
            return self.readall()
        while not self._ready and not self._ended:
            if self._failed is not None:
                raise self._failed
            self._fill()
        data = bytes(self._ready[:size])
        del self._ready[:size]
        self.given += len(data)
        return data

    def _fill(self) -> None:
        try:
            while len(self._ready) < _FULL and not self._ended:
                self._step()
        except Damaged as damage:
            self._failed = damage  # after what stands before it

    def _step(self) -> None:
        if not self._input:
            self._input = memoryview(self._handle.read(_READ))
        if self._member is None or self._member.eof:
            self._begin()
            return
        member = self._member
        feed = self._input[:_FEED] if getattr(member, "needs_input", True) else b""
        try:
            # zstd has no bound but that of its blocks
            out = member.decompress(feed, *(() if self.kind == "zstd" else (_STEP,)))
        except _ERRORS as error:
            raise self._damaged(str(error)) from error
        if not self._input and not out and not member.eof:
            raise self._damaged("the stream ends early")
        # What was fed and not used; bzip2 and xz may have been fed it in an earlier call.
        rest = member.unused_data if member.eof else getattr(member, "unconsumed_tail", b"")
        if len(rest) <= len(feed):
            self._input = self._input[len(feed) - len(rest) :]
        else:
            self._input = memoryview(rest + bytes(self._input[len(feed) :]))
        self.compressed += len(feed) - len(rest)
        self._ready += out

    def _begin(self) -> None:
        """The next member, or the end: nothing but padding may stand there."""
        first = self._member is None
        if not first:
            padding = len(self._input) - len(bytes(self._input).lstrip(b"\0"))
            self._input = self._input[padding:]
            self.compressed += padding
        if self._input or first:
            self.starts.append((self.given + len(self._ready), self.compressed))
            self._member = self._new()
            if first and not self._input:
                raise self._damaged("the stream is empty")
        elif not self._handle_has_more():
            self._ended = True

    def _handle_has_more(self) -> bool:
        self._input = memoryview(self._handle.read(_READ))
        return bool(self._input)

    def _damaged(self, detail: str) -> Damaged:
        member = self.starts[-1][1]
        return Damaged(f"corrupt_{self.kind}", detail, self.compressed, member)


def open_stream(handle: BinaryIO, path: str) -> BinaryIO:
    """`handle` itself, or what it holds when the name of `path` says it is compressed. Its `read`
    may give less than it is asked for."""
    kind = format_of(path)
    return Decompressed(handle, kind) if kind else handle  # type: ignore[return-value]
