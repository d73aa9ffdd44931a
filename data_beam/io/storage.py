"""Files here or in a bucket, by one set of names.

A local path is handled by the operating system; "gs://...", "s3://...", "hdfs://..." go through
Beam's `FileSystems`, which is imported only then: readers of a local corpus need no Beam.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from internlm2_jax import files
from internlm2_jax.errors import UserError


class FileInfo(NamedTuple):
    """`version` changes whenever the file does."""

    path: str
    size: int
    version: str


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def _systems() -> Any:
    from apache_beam.io.filesystems import FileSystems

    return FileSystems


def join(folder: str | os.PathLike, *names: str) -> str:
    if is_remote(folder):
        return "/".join([os.fspath(folder).rstrip("/"), *names])
    return os.path.join(folder, *names)


def exists(path: str | os.PathLike) -> bool:
    return _systems().exists(os.fspath(path)) if is_remote(path) else os.path.exists(path)


def open_read(path: str | os.PathLike) -> BinaryIO:
    """The bytes of a file, not decompressed. Raises OSError."""
    if not is_remote(path):
        return open(path, "rb")
    from apache_beam.io.filesystem import CompressionTypes

    return _systems().open(os.fspath(path), compression_type=CompressionTypes.UNCOMPRESSED)


@contextlib.contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
    """The file itself, or a copy of a remote one for as long as the body runs."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, os.fspath(path).rsplit("/", 1)[-1])
        with open_read(path) as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        yield copy


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A local path to write to; its content becomes `path` when the body ends well, else nothing
    does. A retried bundle writes the same name again."""
    if not is_remote(path):
        with files.whole_file(path) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, "content")
        yield temporary
        partial = os.fspath(path) + files.TEMPORARY_SUFFIX
        from apache_beam.io.filesystem import CompressionTypes

        with (
            open(temporary, "rb") as source,
            _systems().create(partial, compression_type=CompressionTypes.UNCOMPRESSED) as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        if exists(path):
            delete(path)
        _systems().rename([partial], [os.fspath(path)])


def delete(path: str | os.PathLike) -> None:
    """Deletes a file; one that is not there is no error."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
    elif exists(path):
        _systems().delete([os.fspath(path)])


def delete_tree(folder: str | os.PathLike) -> None:
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        for info in list_files(folder):
            delete(info.path)


def list_files(pattern: str | os.PathLike) -> list[FileInfo]:
    """The files that a pattern matches (`**` crosses folders), or all below a folder, sorted."""
    text = os.fspath(pattern)
    if is_remote(text):
        if not glob.has_magic(text):
            found = _systems().match([text])[0].metadata_list
            text = text if found else text.rstrip("/") + "/**"
        rows = _systems().match([text])[0].metadata_list
        return sorted(
            FileInfo(row.path, row.size_in_bytes, str(row.last_updated_in_seconds)) for row in rows
        )
    if glob.has_magic(text) and not os.path.exists(text):
        paths = [path for path in glob.glob(text, recursive=True) if os.path.isfile(path)]
    elif os.path.isdir(text):
        paths = [os.path.join(top, name) for top, _, names in os.walk(text) for name in names]
    else:
        paths = [text] if os.path.isfile(text) else []
    return sorted(_info(path) for path in paths)


def _info(path: str) -> FileInfo:
    stat = os.stat(path)
    return FileInfo(path, stat.st_size, str(stat.st_mtime_ns))


def read_json(path: str | os.PathLike) -> Any:
    """Raises UserError for a file that is missing or damaged."""
    if not is_remote(path):
        return files.read_json(path)
    if not exists(path):
        raise UserError(f"{path} does not exist; check the path, or run the job that makes it")
    with open_read(path) as handle:
        return files.parse_json(handle.read(), os.fspath(path))


def write_json(path: str | os.PathLike, value: Any) -> None:
    with whole(path) as temporary:
        temporary.write_bytes(files.json_bytes(value, indent=True) + b"\n")


def digest(path: str | os.PathLike) -> str:
    """BLAKE2b-128 of a file's bytes, in hexadecimal."""
    import hashlib

    result = hashlib.blake2b(digest_size=16)
    with open_read(path) as handle:
        while block := handle.read(1 << 20):
            result.update(block)
    return result.hexdigest()
