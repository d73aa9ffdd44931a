"""Web archives: what a document carries, which records are none, and damage."""

import gzip

import pytest
import zstandard
from reading import (
    FAST,
    documents,
    http,
    letters,
    only_letter,
    page,
    put,
    read_data,
    read_file,
    text,
    warc_record,
    warc_records,
    wet_records,
)

from data_beam.io.readers import NO_TEXT_REASONS, ReadOptions
from data_beam.io.readers.warc import dump_of
from data_beam.schema import document_id


def packed(records) -> bytes:
    return b"".join(gzip.compress(record) for record in records)


def numbers(items) -> list[int]:
    return [int(item.url.rpartition("/")[2]) for item in documents(items)]


def test_a_page(tmp_path):
    name = "crawl-data/CC-MAIN-2023-50/segments/17/warc/CC-MAIN-20231128083443-00000.warc.gz"
    (item,) = read_data(tmp_path, name, packed(warc_records(1)))
    assert item.text.split() == (text(0) * 2).split()
    assert item.id == document_id("text", "http://example.com/0", item.text, dump=item.dump)
    assert (item.url, item.dump) == ("http://example.com/0", "CC-MAIN-2023-50")
    assert item.timestamp == 1701388800
    assert item.meta == {"kind": "warc", "extractor": "resiliparse", "title": "Page 0"}


@pytest.mark.parametrize("method", ["trafilatura", "resiliparse"])
def test_both_methods(tmp_path, method):
    options = ReadOptions(extractor=method, source="web")
    (item,) = read_data(tmp_path, "a.warc", warc_records(1)[0], options)
    assert "fox number 3 jumps" in item.text and item.source == "web"
    assert item.meta["extractor"] == method


@pytest.mark.parametrize(
    ("path", "dump"),
    [
        ("s3://commoncrawl/crawl-data/CC-MAIN-2023-50/segments/1/warc/CC-MAIN-20231128-1.warc.gz",
         "CC-MAIN-2023-50"),
        ("/x/CC-MAIN-20231128083443-20231128113443-00000.warc.gz", ""),
        ("/d/CC-MAIN-2008-2009/x.warc", "CC-MAIN-2008-2009"),
        ("CC-MAIN-2012/x.warc", "CC-MAIN-2012"),
        ("CC-MAIN-2023-50.warc.gz", "CC-MAIN-2023-50"),
        ("crawl-data/CC-NEWS/2016/08/CC-NEWS-20160826124520-00000.warc.gz", "CC-NEWS-2016-08"),
        ("/x/CC-NEWS-20160826124520-00000.warc.gz", "CC-NEWS-2016-08"),
        ("/plain/a.warc", ""),
    ],
)  # fmt: skip
def test_dumps_by_path(path, dump):
    assert dump_of(path) == dump


def test_dumps_by_option_and_by_the_archive_itself(tmp_path):
    info = warc_record(9, b"software: x\r\nisPartOf: CC-MAIN-2019-04\r\n", "warcinfo")
    data = info + warc_records(1)[0]
    assert read_data(tmp_path, "a.warc", data)[0].dump == "CC-MAIN-2019-04"
    options = ReadOptions(extractor="resiliparse", dump="mine")
    assert read_data(tmp_path, "a.warc", data, options)[0].dump == "mine"


def test_wet(tmp_path):
    records = wet_records(3)
    records[1] = warc_record(1, "Grüße".encode(), "conversion",
                             WARC_Identified_Content_Language="deu")  # fmt: skip
    items = read_data(tmp_path, "a.warc.wet.gz", packed(records))
    assert [item.text for item in items] == [text(0), "Grüße", text(2)]
    assert items[1].meta == {"kind": "warc", "identified_language": "deu"}
    assert items[1].url == "http://example.com/1" and items[1].timestamp == 1701388801


def test_records_that_are_no_documents(tmp_path):
    html = http(page(0))
    records = [
        warc_record(0, b"GET / HTTP/1.1\r\n\r\n", "request"),
        warc_record(1, html, "revisit"),
        warc_record(2, b"x: y", "metadata"),
        warc_record(3, http(b"\x89PNG", "image/png")),
        warc_record(4, http(page(0), status="404 Not Found")),
        warc_record(5, b"HTTP garbage"),
        warc_record(6, http(b"<html><body></body></html>")),
        warc_record(7, http(b"")),
        warc_record(8, http(b"plain words", "text/plain")),
        warc_record(9, page(9), "resource", Content_Type="text/html"),
        warc_record(10, http(b"\0\1\2" * 99)),
        warc_record(11, html, WARC_Truncated="length"),
    ]
    items = read_data(tmp_path, "a.warc", b"".join(records))
    assert [item.url for item in documents(items)] == [
        f"http://example.com/{n}" for n in (8, 9, 11)
    ]
    assert documents(items)[0].text == "plain words"
    assert documents(items)[2].meta["truncated"] == "length"
    found = [(letter.where.partition("#")[2], letter.reason) for letter in letters(items)]
    assert found == [
        ("record=3", "not_html"), ("record=4", "http_status"), ("record=5", "corrupt_http"),
        ("record=6", "extraction_empty"), ("record=7", "empty"), ("record=10", "binary"),
    ]  # fmt: skip
    assert "404" in letters(items)[1].detail and "image/png" in letters(items)[0].detail
    # What has no text is not what was lost.
    lost = [letter.reason for letter in letters(items) if letter.reason not in NO_TEXT_REASONS]
    assert lost == ["corrupt_http"]


def test_packed_and_chunked_bodies(tmp_path):
    body = gzip.compress(page(1))
    chunks = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n"
    blocks = [
        head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks,
        head + b"\r\n" + body,
        head + b"\r\n" + page(1),  # unpacked already, as some crawlers store it
        head.replace(b"\r\n", b"\n") + b"\n" + page(1),
        head + b"\r\n" + gzip.compress(b"a" * (80 << 20)),
    ]
    records = [warc_record(n, block) for n, block in enumerate(blocks)]
    items = read_data(tmp_path, "a.warc", b"".join(records))
    assert numbers(items) == [0, 1, 2, 3]
    assert len({item.text for item in documents(items)}) == 1
    assert [letter.reason for letter in letters(items)] == ["too_large"]


def test_encoding_by_the_header(tmp_path):
    html = "<p>这是一个关于锁和钥匙的故事，师傅把钥匙收了起来。</p>".encode("gb18030")
    data = warc_record(0, http(html, "text/html; charset=GB2312"))
    (item,) = read_data(tmp_path, "a.warc", data)
    assert "钥匙" in item.text and item.meta["encoding"] == "gb18030"


def test_large_records_are_not_read(tmp_path):
    options = ReadOptions(extractor="resiliparse", max_document_bytes=100_000)
    records = warc_records(3)
    records[1] = warc_record(1, http(b"<p>x</p>" * 40_000))
    items = read_data(tmp_path, "a.warc.gz", packed(records), options)
    assert numbers(items) == [0, 2]
    (letter,) = letters(items)
    assert (letter.reason, letter.where.partition("#")[2]) == ("too_large", "record=1")
    assert letter.num_bytes > 320_000 and "example.com/1" in letter.detail


# --- damage -----------------------------------------------------------------------------------


def damaged(tmp_path, name: str, data: bytes):
    items = read_data(tmp_path, name, data)
    return numbers(items), letters(items)


def test_a_flipped_bit_costs_one_record(tmp_path):
    records = [gzip.compress(record) for record in warc_records(20)]
    data = bytearray(b"".join(records))
    start = sum(map(len, records[:9]))
    data[start + 200] ^= 0x10
    found, (letter,) = damaged(tmp_path, "a.warc.gz", bytes(data))
    assert found == [n for n in range(20) if n != 9]
    assert (letter.reason, letter.where.partition("#")[2]) == ("corrupt_gzip", "record=9")
    end = start + len(records[9])
    assert f"bytes {start:,} to byte {end:,} lost" in letter.detail
    assert letter.num_bytes == len(records[9])


def test_junk_between_records(tmp_path):
    one, *rest = [gzip.compress(record) for record in warc_records(5)]
    for junk in (b"junk" * 30, b"\x1f\x8b\x08bc" * 24, b"junk" + gzip.compress(b"no record")):
        found, (letter,) = damaged(tmp_path, "a.warc.gz", one + junk + b"".join(rest))
        assert found == [0, 1, 2, 3, 4] and letter.num_bytes == len(junk)


def test_a_cut(tmp_path):
    data = packed(warc_records(5))
    found, (letter,) = damaged(tmp_path, "a.warc.gz", data[:-50])
    assert found == [0, 1, 2, 3] and "to the end lost" in letter.detail
    data = b"".join(warc_records(5))
    found, (letter,) = damaged(tmp_path, "a.warc", data[:-50])
    assert found == [0, 1, 2, 3] and letter.reason == "corrupt_warc"


def test_padding_is_no_damage(tmp_path):
    assert damaged(tmp_path, "a.warc.gz", packed(warc_records(3)) + b"\0" * 999) == ([0, 1, 2], [])
    assert damaged(tmp_path, "b.warc", b"".join(warc_records(3)) + b"\r\n" * 9) == ([0, 1, 2], [])


@pytest.mark.parametrize("length", ["99999", "4000", "7", "x", "-5", "9" * 30])
def test_a_wrong_length_costs_its_record(tmp_path, length):
    """It must not swallow those behind it."""
    for name, join in (("a.warc", b"".join), ("a.warc.gz", packed)):
        records = warc_records(12)
        head, colon, rest = records[4].partition(b"Content-Length: ")
        records[4] = head + colon + length.encode() + rest[rest.index(b"\r\n") :]
        found, lost = damaged(tmp_path, name, join(records))
        assert found in ([0, 1, 2, 3, *range(5, 12)], list(range(12))), (name, length)
        assert lost or length == "7"
        if 4 in found:  # too short: what was read of it is not the page
            item = next(i for i in read_file(tmp_path / name) if i.url.endswith("/4"))
            assert "number 155 " not in item.text and "number 124 " in text(4)


def test_a_header_without_its_magic(tmp_path):
    records = warc_records(10)
    records[6] = records[6].replace(b"WARC/1.0", b"XXXX/1.0")
    for name, join in (("a.warc", b"".join), ("a.warc.gz", packed)):
        found, (letter, *_) = damaged(tmp_path, name, join(records))
        assert found == [n for n in range(10) if n != 6]
        assert letter.reason == "corrupt_warc" and "#record=" in letter.where


def test_several_damaged_parts(tmp_path):
    records = [gzip.compress(record) for record in warc_records(30)]
    for n in (5, 6, 20):
        records[n] = records[n][:100] + b"\xff" * 50 + records[n][150:]
    found, lost = damaged(tmp_path, "a.warc.gz", b"".join(records))
    assert found == [n for n in range(30) if n not in (5, 6, 20)]
    assert len(lost) == 3 and "+record=" in lost[-1].where


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_one_member_for_all_records(tmp_path, compress):
    name = "a.warc.gz" if compress is gzip.compress else "a.warc.zst"
    data = compress(b"".join(warc_records(200)))
    assert damaged(tmp_path, name, data) == (list(range(200)), [])
    found, (letter,) = damaged(tmp_path, name, data[: len(data) // 2])
    assert found == list(range(len(found))) and "to the end lost" in letter.detail
    if compress is gzip.compress:
        assert len(found) > 50


@pytest.mark.parametrize("data", [b"garbage" * 100, b"", b"\r\n\r\n", b"WARC/1.0\r\n"])
def test_no_archive_at_all(tmp_path, data):
    assert only_letter(read_data(tmp_path, "a.warc", data)).reason in ("corrupt_warc", "empty")
    letter = only_letter(read_data(tmp_path, "a.warc.gz", gzip.compress(data)))
    assert letter.reason in ("corrupt_warc", "empty")


def test_the_extractor_dies_on_a_page_and_the_rest_is_read(tmp_path):
    records = warc_records(4)
    records[2] = warc_record(2, http(b"<html><body>" + b"<div></x>" * 60_000))
    put(tmp_path, "a.warc", b"".join(records))
    options = ReadOptions(extractor="resiliparse", extraction_timeout=0.3)
    items = read_file(tmp_path / "a.warc", options)
    assert numbers(items) == [0, 1, 3]
    (letter,) = letters(items)
    assert letter.reason == "extraction_timeout" and letter.where.endswith("#record=2")
    assert FAST.extraction_timeout != options.extraction_timeout


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    import sys

    from internlm2_jax.errors import UserError

    monkeypatch.setitem(sys.modules, "fastwarc.warc", None)
    with pytest.raises(UserError, match=r"pip install 'internlm2-jax\[data\]'"):
        read_data(tmp_path, "a.warc", warc_records(1)[0])
