"""One spelling for the same text: Unicode NFC, `\\n` line ends, no control characters.

Decoding belongs here too. UTF-8 first, then a byte-order mark, then GB 18030 when the result
reads as Chinese, then Latin-1, which never fails; `decode` says which it was, so that the job can
count the fall-backs.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

VERSION = 1  # raised whenever `normalize` would give another text

# C0 and C1 controls but \t and \n, DEL, the byte-order mark, non-characters, lone surrogates.
_REMOVED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\ud800-\udfff]"
)
_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")
_HAN = re.compile("[\u4e00-\u9fa5]")
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


class NotText(ValueError):
    """The bytes are no text in any encoding we read."""


def decode(data: bytes) -> tuple[str, str]:
    """The text and the name of the encoding. Raises NotText for binary data: a NUL byte outside
    UTF-16/32, or more than a tenth of control characters."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding), encoding
            except UnicodeDecodeError as error:
                raise NotText(str(error)) from error
    head = data[:65536]
    controls = len(re.findall(rb"[\x00-\x08\x0e-\x1f]", head)) - head.count(b"\x1b")
    if b"\0" in head or controls > 0.1 * len(head):
        raise NotText("control characters")
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    try:
        text = data.decode("gb18030")
        foreign = sum(character > "\x7f" for character in text)
        if len(_HAN.findall(text)) > 0.7 * foreign:
            return text, "gb18030"
    except UnicodeDecodeError:
        pass
    return data.decode("latin-1"), "latin-1"


def normalize(text: str) -> str:
    """NFC, `\\n` line ends, no controls, no blank lines at either end; "" when nothing is left."""
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    text = _REMOVED.sub("", _LINE_ENDS.sub("\n", text))
    return text.strip("\n") + "\n" if text.strip() else ""


def text_hash(text: str) -> bytes:
    """16 bytes that are equal for texts that differ only in white space (the report removes code
    duplicates under normalised indentation)."""
    joined = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=16).digest()
