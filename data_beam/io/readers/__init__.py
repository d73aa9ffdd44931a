"""Documents out of files of every kind.

`read` never raises for what a file contains: what cannot be read becomes a `DeadLetter` that says
where and why, and everything before the damage, and after it where the format allows, is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data_beam.io import storage
from data_beam.io.file_ref import FileRef
from data_beam.io.options import ReadOptions
from data_beam.io.readers import archives, html, parquet, plain, records, warc
from data_beam.io.readers.base import NO_TEXT_REASONS, Item, Unreadable, dead_letter, letter_of
from internlm2_jax.errors import UserError

__all__ = ["NO_TEXT_REASONS", "VERSION", "Item", "ReadOptions", "read"]

VERSION = 2  # raised whenever a file would give other documents or dead letters

_READERS: dict[str, Callable[[FileRef, ReadOptions], Iterator[Item]]] = {
    "plain": plain.read, "man": plain.read, "metadata": plain.read, "docstrings": plain.read,
    "html": html.read, "records": records.read, "parquet": parquet.read, "warc": warc.read,
    "archive": archives.read,
}  # fmt: skip


def read(file: FileRef, options: ReadOptions | None = None) -> Iterator[Item]:
    """The documents of one file, and a dead letter for each that could not be read.

    A file in which there is nothing at all gives a dead letter too ("empty"), unless it is a piece
    of one. An error of a remote file system is raised: the runner tries again.
    """
    options = options or ReadOptions()
    if file.kind not in _READERS:
        raise UserError(f"{file.location}: kind {file.kind!r} is unknown; choose one of "
                        f"{', '.join(_READERS)}")  # fmt: skip
    nothing = not file.end
    try:
        for item in _READERS[file.kind](file, options):
            nothing = False
            yield item
    except Unreadable as problem:
        nothing = False
        yield letter_of(file, problem)
    except OSError as error:
        if storage.is_remote(file.base):
            raise
        nothing = False
        yield dead_letter(file, "unreadable", error.strerror or error)
    except BaseException as error:
        # What a library in Rust raises where it should not; no Exception, and of no known module.
        if type(error).__name__ != "PanicException":
            raise
        nothing = False
        yield dead_letter(file, "parser_crash", f"the rest is lost: {error}")
    if nothing:
        yield dead_letter(file, "empty", "it holds no record", num_bytes=file.size)
