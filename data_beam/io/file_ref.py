"""One input file, or a piece of one, and what its name says of it."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from data_beam.code import languages
from data_beam.io import storage
from data_beam.io.options import ReadOptions
from data_beam.schema import hash63

_RECORDS = re.compile(r"\.(?:jsonl|ndjson)(?:\.gz|\.zst)?$|\.json\.(?:gz|zst)$|\.arrayrecord$")
_ARCHIVES = re.compile(r"\.(?:zip|tar|tgz|tar\.(?:gz|zst|xz|bz2))$")
_WARC = re.compile(r"\.(?:warc|wet)(?:\.gz|\.zst)?$")
_HTML = re.compile(r"\.x?html?(?:\.gz|\.zst)?$")
_COMPRESSED = (".gz", ".zst", ".tgz", ".xz", ".bz2", ".zip", ".parquet")


class FileRef(NamedTuple):
    """One input file, or a piece of it: `path` below the folder `base` (a local folder or a URL),
    which goes by the name `root`.

    `kind` says how to read it: "plain", "records", "parquet", "warc", "html", "archive", "man",
    "metadata" or "docstrings"; `size` is the estimated number of bytes of text in it. `version`
    changes whenever the file does. [`start`, `end`) is the piece: bytes of uncompressed records,
    row groups of Parquet; 0, 0 = all. Code belongs to the repository `repo`, whose folder is the
    first `repo_parts` parts of `path`.
    """

    root: str
    base: str
    path: str
    size: int
    kind: str
    source: str
    lang: str = "und"
    version: str = ""
    start: int = 0
    end: int = 0
    repo: str = ""
    repo_parts: int = 0

    @property
    def location(self) -> str:
        """The local path or URL to open."""
        name = storage.join(self.base, self.path)
        return _real_name(name) if _ESCAPED in name else name

    @property
    def path_in_repo(self) -> str:
        return "/".join(self.path.split("/")[self.repo_parts :])

    def rank(self, seed: int) -> int:
        return hash63(f"{self.root}/{self.path}", seed, "select")


# A file name that is not valid UTF-8 cannot travel through Beam: each bad byte is written as this
# character and two hexadecimal digits.
_ESCAPED = "\ufffd"


def portable_name(path: str) -> str:
    if path.isascii():
        return path
    return re.sub("[\udc80-\udcff]", lambda m: f"{_ESCAPED}{ord(m[0]) - 0xDC00:02x}", path)


def _real_name(path: str) -> str:
    if storage.is_remote(path) or os.path.lexists(path):
        return path
    return re.sub(f"{_ESCAPED}([89a-f][0-9a-f])", lambda m: chr(0xDC00 + int(m[1], 16)), path)


def text_size(path: str, size: int) -> int:
    """Estimated bytes of text in a file: English in gzip is about a third of its length."""
    return size * 3 if path.lower().endswith(_COMPRESSED) else size


def file_ref(
    root: str, base: str, path: str, size: int, version: str, options: ReadOptions | None
) -> FileRef:
    """A file with its kind by its name. Without `options` .html is code, as in a repository."""
    name = path.lower()
    kind, source, lang = "plain", "text", "und"
    if _RECORDS.search(name):
        kind = "records"
    elif name.endswith(".parquet"):
        kind = "parquet"
    elif _WARC.search(name):
        kind = "warc"
    elif _ARCHIVES.search(name):
        kind, source = "archive", "code"
    elif options is not None and options.source != "code" and _HTML.search(name):
        kind = "html"
    elif language := languages.language(path):
        source, lang = "code", language
    if options is not None and options.source:
        source = options.source
    size = text_size(path, size)
    return FileRef(root, base, portable_name(path), size, kind, source, lang, version)


def is_data(name: str) -> bool:
    name = name.lower()
    patterns = (_RECORDS, _WARC, _ARCHIVES)
    return name.endswith(".parquet") or any(pattern.search(name) for pattern in patterns)


def hidden(path: str) -> bool:
    """Whether a relative path is left out of every listing: names with a dot, byte code."""
    return any(part.startswith(".") or part == "__pycache__" for part in path.split("/"))
