"""Files that are either whole or absent.

Everything a run leaves behind is written under a temporary name in the same folder, flushed to the
disk and renamed. A process killed at any moment leaves the old file or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from internlm2_jax.errors import DiskError, UserError

TEMPORARY_SUFFIX = ".partial"


_DISK_ERRORS = {
    errno.ENOSPC: "no space left on the disk; free some and run the same command again",
    errno.EDQUOT: "disk quota exceeded; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose another --run-dir",
    errno.EACCES: "permission denied; choose another --run-dir or change its owner",
    errno.EIO: "the disk fails (input/output error); mend it or choose another --run-dir",
    errno.ESTALE: "its file system is gone (stale handle); mount it and run the same command again",
    errno.ENOTDIR: "a part of the path is no folder any more; put it back or choose another",
}


@contextlib.contextmanager
def explain_disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns a full, read-only, forbidden or lost disk into a DiskError that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _errno(error)
        if number not in _DISK_ERRORS:
            raise
        raise DiskError(f"cannot write {path}: {_DISK_ERRORS[number]}") from error


def _errno(error: Exception) -> int | None:
    """The error's number; array_record and tensorstore give the text of one instead."""
    number = getattr(error, "errno", None)
    if number is None:
        texts = {os.strerror(known): known for known in _DISK_ERRORS}
        number = next((known for text, known in texts.items() if text in str(error)), None)
    return number


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path; renames it to `path` when the body ends well, else deletes it."""
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty temporary folder; it takes the place of `path` when the body ends well."""
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with explain_disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def atomic_write(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes `content` (text as UTF-8) to `path`, whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def _plain(value: Any) -> Any:
    """JSON forms of what orjson does not know: paths, sets, array scalars."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS


def json_bytes(value: Any, indent: bool = False) -> bytes:
    """Canonical JSON: keys sorted, numpy and paths accepted."""
    return orjson.dumps(value, _plain, _OPTIONS | (orjson.OPT_INDENT_2 if indent else 0))


def write_json(path: str | os.PathLike, value: Any) -> None:
    atomic_write(path, json_bytes(value, indent=True) + b"\n")


def parse_json(data: bytes, where: str) -> Any:
    """Parses JSON bytes; damaged ones are a UserError that names `where`."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error}); mend or delete it") from error


def _read(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; check the path, or run the stage that makes it"
        ) from error


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file. A missing or damaged one is a UserError that names it."""
    return parse_json(_read(path), str(path))


def write_jsonl(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """Writes one JSON object a line, the file whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "wb") as handle:
        for row in rows:
            handle.write(json_bytes(row) + b"\n")


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """Reads a JSONL file. A bad line is a UserError with its number."""
    lines = _read(path).split(b"\n")
    return [parse_json(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that change whenever the JSON form of `value` does."""
    return hashlib.blake2b(json_bytes(value), digest_size=8).hexdigest()
