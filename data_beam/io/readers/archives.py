"""Repositories packed into one file: .zip, .tar and compressed .tar. One document a member.

Nothing is unpacked to disk. Names that lead out of the archive, links and devices are dead letters;
so is an archive that unpacks to more than it may. Hidden members and byte code are left out, as in
a folder.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from data_beam.code import languages
from data_beam.io.encodings import NotText, decode
from data_beam.io.file_ref import FileRef, hidden
from data_beam.io.options import ReadOptions
from data_beam.io.readers import zips
from data_beam.io.readers.base import (
    Item,
    Unreadable,
    Watched,
    dead_letter,
    document,
    letter_of,
    opened,
    whole_text,
)
from data_beam.io.readers.decompress import Damaged, format_of, open_stream
from data_beam.io.readers.zips import Member

_SUFFIX = re.compile(r"\.(?:zip|tar|tgz|tar\.\w+)$", re.IGNORECASE)
_DRIVE = re.compile(r"^[A-Za-z]:")
_MIN_LIMIT = 256 << 20  # an archive may always unpack to so much
_MAX_EXTENDED_HEADER = 1 << 20
_TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, ArithmeticError)


def read(file: FileRef, options: ReadOptions) -> Iterator[Item]:
    with opened(file) as handle:
        watched = Watched(handle)
        size = watched.seek(0, 2)
        limit = min(options.max_archive_bytes, max(_MIN_LIMIT, options.max_archive_ratio * size))
        is_zip = file.path.lower().endswith(".zip")
        members = zips.members if is_zip else _tar_members

        def each(wanted: bool) -> Iterator[Member | Unreadable]:
            watched.seek(0)
            most = options.max_document_bytes if wanted else 0
            return members(watched, file, most, limit)  # type: ignore[arg-type]

        # Which folder they share is known after the last member only.
        repo, top = repository(file.path, (m.name for m in each(False) if isinstance(m, Member)))
        for member in each(True):
            if isinstance(member, Unreadable):
                watched.raise_transport_error()
                yield letter_of(file, member)
            elif (item := _item(file, options, member, repo, top)) is not None:
                yield item


def repository(path: str, names: Iterable[str]) -> tuple[str, str]:
    """The name of the repository in the archive `path`, and the folder that all its members are in
    if that only repeats the name ("" = there is none).

    GitHub and package indices put everything below one folder named like the archive
    ("pkg-1.0.tar.gz" holds "pkg-1.0/") or like repository and version ("main.zip" holds
    "repo-main/").
    """
    tops = set()
    for name in names:
        if _unsafe(name) or hidden(inner := _clean(name)):
            continue
        parts = inner.split("/")
        tops.add(parts[0] if len(parts) > 1 else "")
        if len(tops) > 1:
            break
    folder, _, name = _SUFFIX.sub("", path).rpartition("/")
    top = tops.pop() if len(tops) == 1 else ""
    version = name[1:] if re.match(r"v\d", name) else name
    if top and top != name and top.endswith(f"-{version}"):
        name = top.removesuffix(f"-{version}")
    elif not (top == name or top.startswith(f"{name}-") or name.startswith(f"{top}-")):
        top = ""
    return (f"{folder}/{name}" if folder else name), top


def _clean(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _unsafe(name: str) -> bool:
    """Whether a name leads out of the folder that an archive is unpacked to."""
    parts = re.split(r"[/\\]", name)
    return name.startswith(("/", "\\")) or bool(_DRIVE.match(name)) or ".." in parts or "\0" in name


def _item(file: FileRef, options: ReadOptions, member: Member, repo: str, top: str) -> Item | None:
    name = whole_text(member.name)
    at = f"!{name}"
    if _unsafe(name):
        return dead_letter(file, "unsafe_name", "it leads out of the archive", at, member.size)
    path = _clean(name)
    if hidden(path):
        return None
    if member.problem:
        return dead_letter(file, member.problem, member.detail, at, member.size)
    if member.size > options.max_document_bytes or len(member.data) > options.max_document_bytes:
        size = max(member.size, len(member.data))
        detail = f"more than {options.max_document_bytes:,} bytes"
        return dead_letter(file, "too_large", detail, at, size, member.data[:800])
    try:
        text, encoding = decode(member.data)
    except NotText as error:
        return dead_letter(file, "binary", error, at, len(member.data), member.data[:800])
    path = path.removeprefix(f"{top}/") if top else path
    meta = {"kind": file.kind} | ({} if encoding == "utf-8" else {"encoding": encoding})
    return document(
        file, options, text, origin=path, at=at, repo=repo, path=path,
        lang=languages.language(path) or "und", meta=meta,
    )  # fmt: skip


# --- tar --------------------------------------------------------------------------------------


class _Header(tarfile.TarInfo):
    """Tells of headers that tarfile passes over in silence."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            if not getattr(archive, "damage", ""):
                archive.damage = f"near byte {archive.offset:,}: {error}"
            raise

    def _proc_member(self, archive: Any) -> Any:
        # These are read into memory whole, however long they say they are.
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
                    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)  # fmt: skip
        too_long = self.type in extended and self.size > _MAX_EXTENDED_HEADER
        if too_long or self.type == tarfile.GNUTYPE_SPARSE or self.size < 0:
            raise tarfile.InvalidHeaderError("a header that no source archive has")  # type: ignore[attr-defined]
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_gnusparse_10(self, *arguments: Any) -> None:
        raise tarfile.InvalidHeaderError("a sparse file")  # type: ignore[attr-defined]


class _Bounded:
    """A stream that ends with an error after `limit` bytes."""

    def __init__(self, stream: BinaryIO, limit: int):
        self._stream, self._left, self._limit = stream, limit, limit

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise Unreadable("archive_bomb", f"it unpacks to more than {self._limit:,} bytes")
        return data


def _tar_members(
    handle: Watched, file: FileRef, most: int, limit: int
) -> Iterator[Member | Unreadable]:
    """Members with at most `most` bytes of content; what is wrong between them. Ends after damage
    of the compressed stream, behind which nothing can be found."""
    stream: Any = open_stream(handle, file.path)  # type: ignore[arg-type]
    last = ""
    try:
        if format_of(file.path):
            stream = _Bounded(stream, limit)
        with tarfile.open(
            fileobj=stream, mode="r|", bufsize=1 << 16, tarinfo=_Header,
            # to the end of the stream, whose checksum stands there, and on behind damage
            ignore_zeros=True,
        ) as archive:  # fmt: skip
            while (info := archive.next()) is not None:
                if damage := getattr(archive, "damage", ""):
                    yield Unreadable("corrupt_tar", damage, f"!{whole_text(last)}")
                    archive.damage = ""  # type: ignore[attr-defined]
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                last = info.name
                if not info.isdir():
                    yield _tar_member(archive, info, most)
            if damage := getattr(archive, "damage", ""):
                yield Unreadable("corrupt_tar", damage, f"!{whole_text(last)}" if last else "")
    except Unreadable as bomb:
        bomb.at = f"!{whole_text(last)}" if last else ""
        yield bomb
    except Damaged as damage:
        yield Unreadable(damage.reason, f"the rest is lost: {damage}", f"!{whole_text(last)}")
    except _TAR_ERRORS as error:
        handle.raise_transport_error()
        yield Unreadable("corrupt_tar", f"the rest is lost: {error}", f"!{whole_text(last)}")


def _tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo, most: int) -> Member:
    if info.issym() or info.islnk():
        return Member(info.name, 0, b"", "link", f"to {whole_text(info.linkname)}")
    if not info.isreg():
        return Member(info.name, 0, b"", "not_a_file", "a device, pipe or the like")
    content = archive.extractfile(info) if most and info.size <= most else None
    if content is None:
        return Member(info.name, info.size, b"")
    data = content.read()
    if len(data) < info.size:
        raise tarfile.ReadError(f"{info.name} ends early")
    return Member(info.name, info.size, data)
