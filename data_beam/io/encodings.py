"""Bytes to text: which encoding they are in, and what to do when they are in none.

The order is that of confidence. A byte-order mark is believed; bytes that are valid UTF-8 are
UTF-8, whatever a header says (hardly any other text is valid UTF-8 by chance); then the declared
encoding; then UTF-8 with a few broken characters; then detection. The name that comes back says
which it was, so that a job can count them.
"""

from __future__ import annotations

import codecs
import re

from internlm2_jax.errors import UserError

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_MARK_BYTES = tuple(mark for mark, _ in _MARKS)
# All but tab, line ends, form feed and escape.
_CONTROLS = bytes({*range(32)} - {9, 10, 11, 12, 13, 27})
# Escape sequences of ISO 2022: text in these encodings is valid ASCII too.
_ISO_2022 = re.compile(rb"\x1b(?:\$[@AB]|\$\([CD]|\$\)[ACG]|\([BIJ])")
_HEAD = 65536
_REPLACED = "�"
# One broken character in so many good ones: damaged UTF-8, not another encoding.
_GOOD_PER_BROKEN = 10
_MULTIBYTE = ("gb", "big5", "shift", "euc", "iso2022")
_FOREIGN = re.compile(rb"[\x80-\xff]")
_MIN_FOREIGN = 8  # bytes; fewer tell one single-byte encoding from another by luck only
_HANGUL = re.compile("[가-힣]")


class NotText(ValueError):
    """The bytes are no text in any encoding we read."""


def is_binary(data: bytes) -> bool:
    """Whether the first 64 kB hold a NUL byte outside UTF-16/32, or more than a tenth of control
    characters."""
    head = data[:_HEAD]
    if head.startswith(_MARK_BYTES):
        return False
    controls = len(head) - len(head.translate(None, _CONTROLS))
    return b"\0" in head or controls > 0.1 * len(head)


def decode(data: bytes, declared: str | None = None) -> tuple[str, str]:
    """The text, and the name of its encoding.

    `declared` is what a header or the document itself says, in any spelling. A name that ends with
    "-damaged" means that characters were replaced by U+FFFD. Raises NotText for binary data.
    """
    if data.startswith(_MARK_BYTES):
        mark, encoding = next(row for row in _MARKS if data.startswith(row[0]))
        return _lossy(data[len(mark) :], encoding)
    if is_binary(data):
        raise NotText("control characters")
    if b"\x1b" in data[:_HEAD] and _ISO_2022.search(data, 0, _HEAD):
        for name in filter(None, (declared, "iso2022_jp_2", "iso2022_kr")):
            if (found := _strict(data, name)) is not None:
                return found, codecs.lookup(_web_name(name)).name
    if (text := _strict(data, "utf-8")) is not None:
        return text, "utf-8"
    if declared and (text := _strict(data, declared)) is not None:
        return text, codecs.lookup(_web_name(declared)).name
    text = data.decode("utf-8", "replace")
    broken = text.count(_REPLACED)
    good = sum(character > "\x7f" for character in text) - broken
    cut_short = good and len(data) - codecs.utf_8_decode(data, "ignore")[1] > 0
    if (cut_short and broken == 1) or good >= _GOOD_PER_BROKEN * broken:
        return text, "utf-8-damaged"
    return _lossy(data, _detect(data))


def _web_name(name: str) -> str:
    """Browsers read these three as their supersets, and so pages are written."""
    known = {"iso-8859-1": "cp1252", "latin-1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252",
             "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc-kr": "cp949",
             "x-sjis": "cp932", "ks_c_5601-1987": "cp949", "x-gbk": "gb18030"}  # fmt: skip
    return known.get(name.strip().strip("\"'").lower(), name.strip().strip("\"'"))


def _strict(data: bytes, encoding: str) -> str | None:
    """None when the bytes are not in `encoding`, or nobody knows it."""
    try:
        return data.decode(_web_name(encoding))
    except (LookupError, ValueError):
        return None


def _lossy(data: bytes, encoding: str) -> tuple[str, str]:
    name = codecs.lookup(encoding).name
    if (text := _strict(data, encoding)) is not None:
        return text, name
    return data.decode(encoding, "replace"), f"{name}-damaged"


def _detect(data: bytes) -> str:
    """The likeliest encoding of text that is not UTF-8; Windows 1252 when nothing speaks for any
    other."""
    try:
        from resiliparse.parse.encoding import detect_encoding
    except ImportError as error:
        raise UserError(
            f"cannot tell the encoding of text: {error}; pip install 'internlm2-jax[data]'"
        ) from error
    found = detect_encoding(data) or "cp1252"
    if found.startswith("utf"):  # what it says of Korean, which it does not know
        korean = _strict(data, "cp949") or ""
        foreign = sum(character > "\x7f" for character in korean)
        return "cp949" if len(_HANGUL.findall(korean)) > 0.7 * foreign else "cp1252"
    foreign = len(_FOREIGN.findall(data))
    if foreign < _MIN_FOREIGN and not found.startswith(_MULTIBYTE):
        return "cp1252"
    try:
        return codecs.lookup(_web_name(found)).name
    except LookupError:
        return "cp1252"
