"""The comments at the top of a file, whatever its language: where licences are stated."""

from __future__ import annotations

import re
from collections.abc import Iterator

_MAX_CHARS = 20_000  # of a header; longer ones are no headers
# Directives of C, Rust and Swift that begin like a comment of a script.
_DIRECTIVE = (
    r"(?!!?\[|[ \t]*(?:include|define|undef|if|ifdef|ifndef|else|elif|endif|pragma|import|error"
    r"|warning|line)\b)"
)
_BLOCK = re.compile(
    r"\s*(?:<\?(?:php\b|xml[^>]*>)\s*)?"
    r"(?P<block>/\*.*?\*/|<!--.*?-->|\(\*.*?\*\)|\{-.*?-\}|\"\"\".*?\"\"\"|'''.*?'''|=begin\b.*?^=end\b"
    r"|(?:\#" + _DIRECTIVE + r"[^\n]*(?:\n[ \t]*|\Z))+"
    r"|(?://[^\n]*(?:\n[ \t]*|\Z))+|(?:--[^\n]*(?:\n[ \t]*|\Z))+|(?:[;%!][^\n]*(?:\n[ \t]*|\Z))+"
    r"|(?:\"[ \t][^\n]*(?:\n|\Z))+|(?:dnl\b[^\n]*(?:\n|\Z))+|(?:@?[rR][eE][mM]\b[^\n]*(?:\n|\Z))+"
    r"|(?:\.\.[ \t][^\n]*\n(?:[ \t]+[^\n]*\n|\n)*)|(?:\.\\\"[^\n]*(?:\n|\Z))+)",
    re.DOTALL | re.MULTILINE,
)  # fmt: skip
_LEGAL = re.compile(
    r"copyright|\(c\)\s*(?:19|20)\d\d|©|licen[cs]e|spdx|all rights reserved", re.IGNORECASE
)


def blocks(text: str) -> Iterator[re.Match[str]]:
    """The comments before the first code, in order; group "block" is the comment."""
    position = 0
    while match := _BLOCK.match(text, position, _MAX_CHARS):
        yield match
        position = match.end()


def legal_notice(text: str) -> str:
    """From the start of the file to the end of the last leading comment that speaks of a licence or
    a copyright; "" when none does."""
    end = 0
    for match in blocks(text):
        if _LEGAL.search(match["block"]):
            end = match.end("block")
    return text[:end]
