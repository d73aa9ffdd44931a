"""Which encoding bytes are in."""

import gzip
from pathlib import Path

import pytest

from data_beam.io.encodings import NotText, decode

TEXTS = {
    "gb18030": "这是一个中文文档，包含很多常用的汉字和标点符号。",
    "big5": "這是一個繁體中文的文件，包含很多常用的漢字。",
    "cp932": "これは日本語の文書です。漢字とひらがなとカタカナを含みます。",
    "euc_jp": "これは日本語の文書です。漢字とひらがなとカタカナを含みます。",
    "iso2022_jp_2": "これは日本語の文書です。漢字とひらがなとカタカナを含みます。",
    "cp949": "이것은 한국어 문서입니다. 많은 글자가 있습니다.",
    "koi8-r": "Это русский документ с обычным текстом и знаками препинания.",
    "cp1251": "Это русский документ с обычным текстом и знаками препинания.",
    "cp1252": "Größe, Straße, über Äpfel und Übermut; später süß und gemütlich",
    "cp1250": "Zażółć gęślą jaźń, proszę bardzo źródło i święta",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_detection(encoding):
    assert decode((TEXTS[encoding] * 3).encode(encoding)) == (TEXTS[encoding] * 3, encoding)


@pytest.mark.parametrize("text", TEXTS.values())
@pytest.mark.parametrize("declared", [None, "iso-8859-1", "nonsense", "rot13"])
def test_valid_utf8_is_utf8_whatever_is_declared(text, declared):
    assert decode(text.encode(), declared) == (text, "utf-8")


@pytest.mark.parametrize(
    ("declared", "python"),
    [("ISO-8859-1", "cp1252"), (" 'GB2312' ", "gb18030"), ("EUC-KR", "cp949"), ("l2", "iso8859-2")],
)
def test_declared_names_are_read_as_browsers_do(declared, python):
    text = {"gb18030": TEXTS["gb18030"], "cp949": TEXTS["cp949"]}.get(python, "K\xf6nig \xe4")
    assert decode(text.encode(python), declared) == (text, python)


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(mark):
    text, name = decode(TEXTS["cp932"].encode(mark))
    assert text == TEXTS["cp932"] and name.startswith(mark.partition("-sig")[0])


def test_a_few_broken_characters_do_not_make_it_another_encoding():
    whole = TEXTS["gb18030"] * 20
    data = bytearray(whole.encode())
    data[300] ^= 0xFF
    text, name = decode(bytes(data))
    assert name == "utf-8-damaged" and text[:90] == whole[:90] and "�" in text
    # cut inside the last character
    assert decode(whole.encode()[:-1]) == (whole[:-1] + "�", "utf-8-damaged")
    assert decode("Käse und Brät".encode()[:-2]) == ("Käse und Br�", "utf-8-damaged")
    assert decode("ab".encode("utf-16")[:-1])[1] == "utf-16-le-damaged"


def test_few_foreign_bytes_are_western():
    assert decode(b"Herr M\xfcller") == ("Herr Müller", "cp1252")


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\0\0", b"ab\0cd", bytes(range(1, 32)) * 10])
def test_binary(data):
    with pytest.raises(NotText):
        decode(data)


OLD = {"zh_CN": "gb18030", "zh_TW": "big5", "ja": "euc_jp", "ko": "cp949", "ru": "koi8-r",
       "de": "cp1252", "fr": "cp1252"}  # fmt: skip


@pytest.mark.parametrize("language", OLD)
def test_manuals_of_this_machine(language):
    """As they are shipped, and in the encoding that they were shipped in before UTF-8."""
    folder = Path("/usr/share/man", language)
    pages = sorted(path for path in folder.glob("man*/*") if path.is_file())[:20]
    if not pages:
        pytest.skip(f"this machine has no manuals in {folder}")
    checked = 0
    for path in pages:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        text, name = decode(data)
        assert name == "utf-8", path
        old = text.encode(OLD[language], "ignore")
        if sum(byte > 127 for byte in old) >= 100:
            assert decode(old)[0] == old.decode(OLD[language]), path
            checked += 1
    assert checked or language in ("de", "fr")
