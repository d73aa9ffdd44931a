"""Reading never raises: bad bytes become drops that name the reason."""

import gzip
import random

import orjson
import pytest
import zstandard

from data_beam.io import readers, writers
from data_beam.io.listing import list_folder
from data_beam.schema import Document, Drop

LINES = [orjson.dumps({"text": f"document {n}", "id": n, "timestamp": "2024-01-02", "lang": "en",
                       "source": "Web Text"}) for n in range(500)]  # fmt: skip
JSONL = b"\n".join(LINES) + b"\n"


def read(folder, name: str, data: bytes) -> list[Document | Drop]:
    (folder / name).write_bytes(data)
    file = next(file for file in list_folder(folder) if file.path == name)
    return list(readers.read(file))


def reason(items: list[Document | Drop]) -> str:
    assert len(items) == 1 and isinstance(items[0], Drop) and items[0].stage == "read"
    return items[0].reason


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"\x89PNG\r\n\0\0binary", "binary"),
        ("a.py", b"", "empty"),
        ("a.md", b" \n\t\n", "empty"),
        ("a.txt.gz", b"no gzip at all", "corrupt_gzip"),
        ("a.txt.gz", gzip.compress(b"text " * 1000)[:-12], "corrupt_gzip"),
        ("a.txt.zst", b"no zstd at all", "corrupt_zstd"),
        ("a.txt.zst", zstandard.compress(b"text " * 1000)[:-4], "corrupt_zstd"),
        ("a.arrayrecord", b"no array record", "corrupt_arrayrecord"),
        ("a.jsonl", b"{broken\n", "bad_json"),
        ("a.jsonl", b"[1]\n", "bad_record"),
        ("a.jsonl", b'{"title": "x"}\n', "no_text"),
        ("a.jsonl", b'{"text": " "}\n', "empty"),
    ],
)
def test_bad_input(tmp_path, name, data, expected):
    assert reason(read(tmp_path, name, data)) == expected


def test_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1 << 17)
    assert reason(read(tmp_path, "a.txt", b"text " * 40_000)) == "too_large"


def test_unreadable(tmp_path):
    (tmp_path / "gone.txt").write_text("x")
    file = list_folder(tmp_path)[0]
    (tmp_path / "gone.txt").unlink()
    assert reason(list(readers.read(file))) == "unreadable"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", JSONL),
        ("x.jsonl.gz", gzip.compress(JSONL)),
        ("x.jsonl.gz", gzip.compress(LINES[0] + b"\n")
         + gzip.compress(b"\n".join(LINES[1:]))),  # two members
        ("x.jsonl.zst", zstandard.compress(JSONL)),
    ],
)  # fmt: skip
def test_record_files(tmp_path, name, data):
    items = read(tmp_path, name, data)
    assert [item.text for item in items] == [f"document {n}" for n in range(500)]
    first = items[0]
    assert (first.source, first.lang, first.timestamp) == ("web_text", "en", 1704153600)
    assert first.meta["original_id"] == "0" and len({item.id for item in items}) == 500


def test_damage_costs_what_follows_it_and_one_drop(tmp_path):
    noise = "".join(f"{n * 7919 % 10007:x}" for n in range(40_000)).encode()
    lines = b"\n".join(orjson.dumps({"text": noise[i : i + 400].decode()}) for i in range(20_000))
    items = read(tmp_path, "x.jsonl.gz", gzip.compress(lines)[:-3000])
    *documents, last = items
    assert isinstance(last, Drop) and last.reason == "corrupt_gzip"
    assert len(documents) > 1000 and all(isinstance(item, Document) for item in documents)
    assert last.id not in {document.id for document in documents}


def test_array_record_round_trip_and_damage(tmp_path):
    rng = random.Random(0)
    documents = [Document(f"{n:032x}", rng.randbytes(500).hex(), "code") for n in range(640)]
    path = tmp_path / "x.arrayrecord"
    options = "group_size:64"
    writers.write_array_record(path, [d.to_bytes() for d in documents], options)
    assert [Document.from_bytes(r) for r in writers.read_array_record(path)] == documents
    items = read(tmp_path, "x.arrayrecord", path.read_bytes())
    assert [item.text for item in items] == [document.text for document in documents]

    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    items = read(tmp_path, "x.arrayrecord", bytes(data))
    drops = [item for item in items if isinstance(item, Drop)]
    assert len(items) == 640 and 0 < len(drops) < 640
    assert {drop.reason for drop in drops} == {"corrupt_arrayrecord"}


def test_python_that_does_not_parse(tmp_path):
    (tmp_path / "old.py").write_text("print 'two'")
    file = list_folder(tmp_path)[0]._replace(kind="docstrings")
    assert reason(list(readers.read(file))) == "syntax_error"


def test_ids_depend_on_the_path_below_the_folder_only(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("hello")
    ids = {next(readers.read(list_folder(tmp_path / name)[0])).id for name in ("one", "two")}
    assert len(ids) == 1
