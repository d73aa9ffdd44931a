"""Decoding never fails on text, refuses binary, and normalising has one result per text."""

import pytest

from data_beam.io.encodings import NotText, decode
from data_beam.kernels.labels import text_hash
from data_beam.kernels.normalize import normalize

CHINESE = "书生·浦语大模型，上海人工智能实验室。" * 5


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        (b"plain", "plain", "utf-8"),
        ("naïve 中文".encode(), "naïve 中文", "utf-8"),
        (b"\xef\xbb\xbfmarked", "marked", "utf-8"),
        ("é中".encode("utf-16"), "é中", "utf-16-le"),
        ("é中".encode("utf-32"), "é中", "utf-32-le"),
        (CHINESE.encode("gb18030"), CHINESE, "gb18030"),
        ("Grüße aus Köln, François".encode("latin-1"), "Grüße aus Köln, François", "cp1252"),
    ],
)
def test_decode(data, text, encoding):
    assert decode(data) == (text, encoding)


@pytest.mark.parametrize("data", [b"\x7fELF\0\0\1", bytes(range(1, 9)) * 30])
def test_binary_is_refused(data):
    with pytest.raises(NotText):
        decode(data)


def test_normalize():
    assert normalize("a\r\nb\rc\u2028d\x00\x07\x1b\x85\ufeffe\n\n\n") == "a\nb\nc\nd\ne\n"
    assert normalize("\n\n  e\u0301\tx\n") == "  é\tx\n"
    assert normalize(" \n\t\x00") == ""
    assert normalize("bad \ud800 surrogate") == "bad  surrogate\n"
    assert normalize("no\u00a0break, thin\u2009and\u202fnarrow\u3000wide") == (
        "no break, thin and narrow\u3000wide\n"
    )


def test_normalize_is_idempotent():
    text = "\r\n Å\u0301ngström \x0c\n\n" + "ﬁ e\u0301\u2029"
    assert normalize(normalize(text)) == normalize(text)
    normalize(text).encode()


def test_text_hash_ignores_white_space_only():
    assert text_hash("def f():\n\treturn 1") == text_hash("def f():\n    return  1\n")
    assert text_hash("def f(): return 1") != text_hash("def f(): return 2")
