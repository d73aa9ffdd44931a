"""Members of a .zip file. One whose directory, which stands at its end, is missing or damaged is
read from its front, member by member."""

from __future__ import annotations

import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from data_beam.io.readers.base import Unreadable, Watched

_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError,
    ValueError, OverflowError, struct.error, OSError, IndexError, KeyError,
)  # fmt: skip
_LOCAL = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2LH")
_LOCAL_MAGIC = b"PK\x03\x04"
_DIRECTORY_MAGIC = b"PK\x01\x02"
_UTF8_NAME, _ENCRYPTED, _SIZE_BEHIND = 0x800, 0x1, 0x8
_FEED = 1 << 12
_SCAN = 1 << 20


class Member(NamedTuple):
    """A file in an archive: its content, or the reason why it has none."""

    name: str
    size: int
    data: bytes
    problem: str = ""
    detail: str = ""


def members(handle: Watched, file: Any, most: int, limit: int) -> Iterator[Member | Unreadable]:
    """Members with at most `most` + 1 bytes of content each (0 = names alone), `limit` together."""
    try:
        archive = zipfile.ZipFile(handle)  # type: ignore[arg-type]
        infos = archive.infolist()
        if len(infos) < (stated := _stated_count(handle)):
            raise zipfile.BadZipFile(f"{len(infos):,} of {stated:,} entries in the directory")
    except _ERRORS as error:
        handle.raise_transport_error()
        yield Unreadable("corrupt_zip", f"read without its directory: {error}")
        yield from _from_front(handle, most, limit)
        return
    total = 0
    lost: dict[str, Member] = {}
    for info in infos:
        if info.is_dir():
            continue
        member = _member(archive, info, most)
        if member.problem == "corrupt_zip":
            handle.raise_transport_error()
            lost[member.name] = member
        else:
            yield member
        total += len(member.data)
        if total > limit:
            yield _bomb(limit, info.filename)
            return
    if lost:  # the directory may be wrong, and not they
        why = next(iter(lost.values())).detail
        yield Unreadable("corrupt_zip", f"{len(lost):,} read without its directory: {why}")
        for found in _from_front(handle, most, limit - total):
            if isinstance(found, Unreadable):
                yield found
            elif found.name in lost and not found.problem:
                del lost[found.name]
                yield found
    yield from lost.values()


def _stated_count(handle: Watched) -> int:
    """How many entries the end of the file says the directory has (0 = it does not say)."""
    size = handle.seek(0, 2)
    handle.seek(max(0, size - _END.size - 65535))
    tail = handle.read(_END.size + 65535)
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or len(tail) - place < _END.size:
        return 0
    count = _END.unpack_from(tail, place)[4]
    return 0 if count == 0xFFFF else count  # the real one stands in another place


def _bomb(limit: int, name: str) -> Unreadable:
    return Unreadable("archive_bomb", f"it unpacks to more than {limit:,} bytes", f"!{name}")


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> Member:
    mode = info.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if stat.S_ISLNK(mode):
        return Member(info.filename, info.file_size, b"", "link")
    if kind and not stat.S_ISREG(mode):
        return Member(info.filename, info.file_size, b"", "not_a_file")
    if info.flag_bits & _ENCRYPTED:
        return Member(info.filename, info.file_size, b"", "encrypted")
    if not most or info.file_size > most:
        return Member(info.filename, info.file_size, b"")
    try:
        with archive.open(info) as content:
            data = content.read(most + 1)
    except _ERRORS as error:
        detail = f"{type(error).__name__}: {error}"
        return Member(info.filename, info.file_size, b"", "corrupt_zip", detail)
    return Member(info.filename, info.file_size, data)


# --- without the directory --------------------------------------------------------------------


def _from_front(handle: Watched, most: int, limit: int) -> Iterator[Member | Unreadable]:
    """Members by the headers that stand before each. A member that says neither its length nor is
    compressed has no end that could be found; one that is damaged costs itself."""
    total, place = 0, 0
    while (found := _find(handle, place)) is not None:
        handle.seek(found)
        header = handle.read(_LOCAL.size)
        if len(header) < _LOCAL.size:
            return
        _, _, flags, method, _, _, crc, packed, size, name_length, extra = _LOCAL.unpack(header)
        raw = handle.read(name_length)
        name = raw.decode("utf-8" if flags & _UTF8_NAME else "cp437", "replace")
        begin = found + _LOCAL.size + name_length + extra
        place = begin + (0 if flags & _SIZE_BEHIND else packed)
        if not name or name.endswith("/"):
            continue
        if flags & _ENCRYPTED or method not in (0, 8):
            yield Member(name, size, b"", "encrypted" if flags & _ENCRYPTED else "corrupt_zip")
            continue
        if method == 0 and flags & _SIZE_BEHIND:
            yield Member(name, 0, b"", "corrupt_zip", "its length is unknown")
            continue
        handle.seek(begin)
        data, used, problem = _content(handle, method, packed, max(most, 1))
        if flags & _SIZE_BEHIND:
            place = begin + used
        elif not problem and len(data) <= most and zlib.crc32(data) != crc:
            problem = "wrong checksum"
        total += len(data)
        if problem:
            yield Member(name, size, b"", "corrupt_zip", problem)
        else:
            yield Member(name, max(size, len(data)), data if most else b"")
        if total > limit:
            yield _bomb(limit, name)
            return


def _content(handle: Watched, method: int, packed: int, most: int) -> tuple[bytes, int, str]:
    """At most `most` + 1 bytes of content, the packed bytes used, and what is wrong."""
    if method == 0:
        data = handle.read(min(packed, most + 1))
        return data, packed, "" if len(data) == min(packed, most + 1) else "it ends early"
    inflate = zlib.decompressobj(-15)
    out, used = bytearray(), 0
    while not inflate.eof and len(out) <= most:
        block = inflate.unconsumed_tail or handle.read(_FEED)
        if not block:
            return b"", used, "it ends early"
        try:
            out += inflate.decompress(block, most + 1 - len(out))
        except zlib.error as error:
            return b"", used, str(error)
        used += len(block) - len(inflate.unconsumed_tail) - len(inflate.unused_data)
    return bytes(out), used, ""


def _find(handle: Watched, offset: int) -> int | None:
    """Where the next member begins; None when the directory or the end comes first."""
    handle.seek(offset)
    buffer, base = b"", offset
    while block := handle.read(_SCAN):
        buffer += block
        found = re.search(re.escape(_LOCAL_MAGIC) + b"|" + re.escape(_DIRECTORY_MAGIC), buffer)
        if found:
            return base + found.start() if found[0] == _LOCAL_MAGIC else None
        base += len(buffer) - 3
        buffer = buffer[-3:]
    return None
