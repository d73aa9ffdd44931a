"""Parquet: columns, pieces, damage, memory."""

import dataclasses
import datetime
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import (
    FAST,
    documents,
    grown_by,
    letters,
    only_letter,
    parquet,
    put,
    read_data,
    read_file,
    text,
)

from data_beam.io import listing, readers
from data_beam.io.readers import ReadOptions
from data_beam.schema import Document, document_id


def table(folder, rows: dict, name: str = "a.parquet", options: ReadOptions = FAST, **settings):
    out = io.BytesIO()
    pq.write_table(pa.table(rows), out, **settings)
    return read_data(folder, name, out.getvalue(), options)


def test_the_columns_of_a_document(tmp_path):
    when = datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC)
    (item,) = table(tmp_path, {
        "text": ["Some text."], "id": ["<urn:1>"], "url": ["http://x.org"], "dump": ["CC-1"],
        "date": [when], "language": ["en"], "embedding": [[0.5] * 1000],
        "meta": [{"stars": 3, "tags": ["a"]}],
    })  # fmt: skip
    assert item == Document(
        document_id("text", "<urn:1>", "Some text.", dump="CC-1"), "Some text.", "text",
        url="http://x.org", dump="CC-1", timestamp=1704153600, lang="en",
        meta={"stars": 3, "tags": '["a"]', "original_id": "<urn:1>"},
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view(),
     pa.dictionary(pa.int32(), pa.string())],
)  # fmt: skip
def test_types_of_text(tmp_path, kind):
    column = pa.array(["Grüße", None, "", "b"], pa.string()).cast(kind)
    items = table(tmp_path, {"content": column})
    assert [item.text for item in documents(items)] == ["Grüße", "b"]
    assert [(i.where.partition("#")[2], i.reason) for i in letters(items)] == [
        ("row=1", "no_text"), ("row=2", "empty"),
    ]  # fmt: skip


def test_text_that_is_not_utf8(tmp_path):
    raw = pa.array([b"fine", "Größe über alles, schöne Grüße".encode("latin-1"), b"\0\1\2\3"])
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    items = table(tmp_path, {"text": column})
    assert [item.text for item in documents(items)] == ["fine", "Größe über alles, schöne Grüße"]
    assert items[1].meta == {"encoding": "cp1252"} and items[2].reason == "binary"


def test_a_file_without_text_is_one_dead_letter(tmp_path):
    letter = only_letter(table(tmp_path, {"title": ["a", "b"], "body": ["c", "d"]}))
    assert letter.reason == "no_text" and "title, body" in letter.detail
    options = ReadOptions(text_field="body", require_id=True, fields=("id=title",))
    items = table(tmp_path, {"title": ["a", ""], "body": ["c", "d"]}, options=options)
    assert [item.text for item in documents(items)] == ["c"]
    assert items[1].reason == "no_id"
    assert only_letter(table(tmp_path, {"text": pa.array([], pa.string())})).reason == "empty"


def test_a_large_value_is_not_decoded(tmp_path):
    options = dataclasses.replace(FAST, max_document_bytes=1000)
    items = table(tmp_path, {"text": ["a", "b" * 5000, "c"]}, options=options)
    assert [item.text for item in documents(items)] == ["a", "c"]
    assert (items[1].reason, items[1].num_bytes, items[1].head) == ("too_large", 5000, "b" * 200)


def test_pieces_are_the_file(tmp_path):
    path = put(tmp_path, "a.parquet", parquet(100, rows_per_group=7))
    whole = read_file(path)
    assert [item.text for item in whole] == [text(n) for n in range(100)]
    files = listing.list_inputs(str(path), dataclasses.replace(FAST, piece_bytes=3000))
    assert 5 < len(files) <= 15 and files[0].start == 0 and files[-1].end == 15
    assert [item for file in files for item in readers.read(file, FAST)] == whole


def damage(data: bytes, group: int) -> bytes:
    """Flips a byte in the middle of the text column of a row group."""
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(group).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    broken = bytearray(data)
    broken[start + column.total_compressed_size // 2] ^= 0xFF
    return bytes(broken)


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_a_damaged_row_group_costs_its_rows(tmp_path, compression):
    data = damage(
        parquet(60, rows_per_group=10, compression=compression, write_statistics=False), 3
    )
    items = read_data(tmp_path, "a.parquet", data)
    assert [item.text for item in documents(items)] == [
        text(n) for n in range(60) if n // 10 != 3
    ]  # fmt: skip
    (letter,) = letters(items)
    assert letter.reason == "corrupt_parquet" and letter.where.endswith("#row=30")
    assert "row group 3: 10 rows lost" in letter.detail
    # and the same in pieces
    options = dataclasses.replace(FAST, piece_bytes=1)
    files = listing.list_inputs(str(tmp_path / "a.parquet"), options)
    assert len(files) == 6
    assert [item for file in files for item in readers.read(file, options)] == items


@pytest.mark.parametrize("data", [b"", b"PAR1", b"garbage" * 100, parquet(20)[:-10]])
def test_no_parquet_at_all(tmp_path, data):
    letter = only_letter(read_data(tmp_path, "a.parquet", data))
    assert letter.reason == "corrupt_parquet" and letter.num_bytes >= len(data)
    # listing leaves it to the reader
    assert len(listing.list_inputs(str(tmp_path), ReadOptions(piece_bytes=1))) == 1


def test_memory_is_that_of_a_batch(tmp_path):
    """One row group of 120 MB."""
    path = tmp_path / "a.parquet"
    schema = pa.schema([("text", pa.string())])
    # A page is the least that can be decoded: here ten documents.
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 10}
    with pq.ParquetWriter(path, schema, **options) as writer:
        rows = [f"{k:09d} " * 10_000 for k in range(30)]
        writer.write_table(pa.table({"text": rows * 40}), row_group_size=1 << 20)
    count, megabytes = grown_by(
        f"(file,) = list_inputs({str(path)!r}, ReadOptions(piece_bytes=1 << 40))\n"
        "result = sum(len(document.text) for document in read(file))"
    )
    assert count == "120000000" and megabytes < 60
