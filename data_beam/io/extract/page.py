"""The main text of one web page, in this process, for as long as it takes: `web` adds the limits.

trafilatura is what the InternLM2 report uses (section 3.1.1); resiliparse is many times as fast.
Neither is asked for comments, links or images: the report wants the main text.
"""

from __future__ import annotations

import html
import itertools
import re
from typing import Any

from data_beam.io.encodings import NotText, decode

# libxml2 cuts off what lies deeper, and no browser goes beyond 512.
MAX_DEPTH = 255
_SUSPECT_TAGS = 1000  # so many nested tags, roughly counted, are worth a closer look
_META = re.compile(rb"<meta\b[^>]{0,1000}?charset\s*=\s*[\"']?\s*([-\w.:]{1,40})", re.IGNORECASE)
_XML = re.compile(rb"^\s*<\?xml\b[^>]{0,200}?encoding\s*=\s*[\"']([-\w.:]{1,40})")
_TITLE = re.compile(r"<title\b[^>]{0,200}>([^<]{0,2000})</title", re.IGNORECASE)
# Tags that end by themselves, or whose end is often left out, say nothing of depth.
_TAG = re.compile(
    r"<(/?)(?!(?:p|li|br|hr|img|input|meta|link|wbr|area|col|embed|source|track|option|td|tr|th|dt"
    r"|dd)\b)[a-zA-Z]",
    re.IGNORECASE,
)


class PageError(Exception):
    """A page that gives no text. `reason` is that of the dead letter."""

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, str(detail)


def main_text(
    page: bytes | str, url: str = "", method: str = "trafilatura", charset: str = ""
) -> tuple[str, dict[str, str]]:
    """The main text ("" = none found) and metadata: the title, the encoding if it was not UTF-8.

    `charset` is what the HTTP header says. Raises PageError.
    """
    metadata = {}
    if isinstance(page, bytes):
        head = page[:4096]
        declared = _META.search(head) or _XML.search(head)
        try:
            page, encoding = decode(page, charset or (declared[1].decode() if declared else None))
        except NotText as error:
            raise PageError("binary", error) from error
        if encoding != "utf-8":
            metadata["encoding"] = encoding
    page = page.replace("\0", "")
    if title := _TITLE.search(page, 0, 1 << 16):
        metadata["title"] = " ".join(html.unescape(title[1]).split())[:300]
    text = _trafilatura(page, url) if method == "trafilatura" else _resiliparse(page)
    return text, metadata


def _trafilatura(page: str, url: str) -> str:
    import trafilatura
    from trafilatura.utils import HTML_PARSER

    tree = trafilatura.load_html(page, 1 << 40)  # the size is limited elsewhere
    if tree is None:
        return ""
    if any(entry.type_name == "ERR_RESOURCE_LIMIT" for entry in HTML_PARSER.error_log):
        raise PageError("too_deep", f"more than {MAX_DEPTH} nested elements")
    text = trafilatura.extract(
        tree, url=url or None, config=_config(), output_format="txt", include_comments=False,
        include_tables=True, include_links=False, include_images=False,
        # `deduplicate` remembers earlier pages: what it gives depends on the order of reading
        deduplicate=False, with_metadata=False,
    )  # fmt: skip
    return text or ""


_settings: Any = None


def _config() -> Any:
    """trafilatura's own settings, without its limit of 20 MB a page."""
    global _settings
    if _settings is None:
        from trafilatura.settings import use_config

        _settings = use_config()
        _settings.set("DEFAULT", "MAX_FILE_SIZE", str(1 << 40))
    return _settings


def _resiliparse(page: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    # Its time grows with the square of the depth.
    if page.count("<") > _SUSPECT_TAGS and _looks_deep(page) and _is_deep(page):
        raise PageError("too_deep", f"more than {MAX_DEPTH} nested elements")
    return extract_plain_text(
        page, main_content=True, preserve_formatting=True, alt_texts=False, links=False,
        form_fields=False, noscript=False, comments=False,
    )  # fmt: skip


def _looks_deep(page: str) -> bool:
    steps = (-1 if slash else 1 for slash in _TAG.findall(page))
    return any(depth > _SUSPECT_TAGS for depth in itertools.accumulate(steps))


def _is_deep(page: str) -> bool:
    from lxml import etree

    parser = etree.HTMLParser(encoding="utf-8", collect_ids=False)
    try:
        etree.fromstring(page.encode("utf-8", "replace"), parser)
    except (etree.LxmlError, ValueError):
        return False
    return any(entry.type_name == "ERR_RESOURCE_LIMIT" for entry in parser.error_log)
