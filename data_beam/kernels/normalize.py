"""One spelling for the same text: Unicode NFC, `\\n` line ends, plain spaces, no controls."""

from __future__ import annotations

import re
import unicodedata

VERSION = 2  # raised whenever `normalize` would give another text

# C0 and C1 controls but \t and \n, DEL, the byte-order mark, non-characters, lone surrogates.
_REMOVED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\ud800-\udfff]"
)
_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")
# Spaces of typesetting, no-break and of fixed width: in HTML often every space is one, which no
# tokenizer has learnt. The ideographic space stays.
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")


def normalize(text: str) -> str:
    """NFC, `\\n` line ends, plain spaces, no controls, no blank lines at either end; "" for a text
    of white space."""
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    text = _REMOVED.sub("", _SPACES.sub(" ", _LINE_ENDS.sub("\n", text)))
    return text.strip("\n") + "\n" if text.strip() else ""
