"""How input is listed and read: one set of settings for both."""

from __future__ import annotations

import dataclasses

from internlm2_jax.errors import UserError

EXTRACTORS = ("trafilatura", "resiliparse")


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """`source` names every document's part of the mixture ("" = the record's own, else "code" or
    "text" by the file's name; "code" also reads .html files as code, not as web pages).

    Records: `text_field` holds the text ("" = text, then content); `fields` are pairs
    "document field=record field" for other spellings than the usual ones; `require_id` makes a
    record without an id a dead letter. `dump` is the crawl of web pages ("" = from the path or the
    archive itself). `repo_depth` is the number of folders between the input folder and its
    repositories: 0 = it is one, 1 = it holds one a folder, 2 = owner/name; a .git folder says it
    better and wins.

    Extraction: method, CPU seconds and bytes of memory one page may take. Limits:
    `max_document_bytes` for a record, page, member or file; `max_archive_bytes` for what an archive
    unpacks to, and `max_archive_ratio` times its size; `piece_bytes` for one part of a large file
    that can be divided.
    """

    source: str = ""
    text_field: str = ""
    fields: tuple[str, ...] = ()
    require_id: bool = False
    dump: str = ""
    repo_depth: int = 1
    exclude: tuple[str, ...] = ()
    extractor: str = "trafilatura"
    extraction_timeout: float = 20.0
    extraction_memory: int = 2 << 30
    max_document_bytes: int = 32 << 20
    max_archive_bytes: int = 64 << 30
    max_archive_ratio: int = 200
    piece_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.extractor not in EXTRACTORS:
            raise UserError(
                f"extractor {self.extractor!r} is unknown; choose one of {', '.join(EXTRACTORS)}"
            )
        for name in (
            "extraction_timeout", "extraction_memory", "max_document_bytes", "max_archive_bytes",
            "max_archive_ratio", "piece_bytes",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise UserError(f"{name} {getattr(self, name)} must be more than 0")
        if self.repo_depth < 0:
            raise UserError(f"repo_depth {self.repo_depth} must be 0, 1 or 2")
        for pair in self.fields:
            name, _, column = pair.partition("=")
            if name not in DOCUMENT_FIELDS or not column:
                raise UserError(
                    f"fields: {pair!r} is not FIELD=NAME with a field of "
                    f"{', '.join(DOCUMENT_FIELDS)}"
                )

    def renamed(self) -> dict[str, str]:
        """`fields` as a dictionary."""
        return dict(pair.split("=", 1) for pair in self.fields)


# What a record may say of a document besides its text, and how others spell it.
DOCUMENT_FIELDS = {
    "id": ("id",),
    "source": ("source",),
    "url": ("url",),
    "dump": ("dump",),
    "timestamp": ("timestamp", "date"),
    "lang": ("lang", "language"),
    "license": ("license",),
    "repo": ("repo", "repo_name", "max_stars_repo_name"),
    "path": ("path", "max_stars_repo_path"),
}
TEXT_FIELDS = ("text", "content")
