"""Single documents and record files: what a document carries, and what becomes of bad input."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import random
import sys

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import (
    FAST,
    array_record,
    documents,
    grown_by,
    json_lines,
    letters,
    only_letter,
    put,
    read_data,
    read_file,
    text,
)

from data_beam.io import listing, readers
from data_beam.io.readers import ReadOptions, records
from data_beam.io.readers.decompress import Damaged, Decompressed
from data_beam.schema import Document, document_id
from internlm2_jax.errors import UserError

# --- one file, one document -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"\x89PNG\r\n\0\0binary", "binary"),
        ("a.py", b"", "empty"),
        ("a.md", b" \n\t\n", "empty"),
        ("a.txt.gz", b"no gzip at all", "corrupt_gzip"),
        ("a.txt.gz", b"", "corrupt_gzip"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-12], "corrupt_gzip"),
        ("a.txt.zst", b"no zstd at all", "corrupt_zstd"),
        ("a.txt.zst", zstandard.compress(b"text " * 1000)[:-4], "corrupt_zstd"),
        ("a.arrayrecord", b"no array record", "corrupt_arrayrecord"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"{broken\n", "bad_json"),
        ("a.jsonl", b"[1]\n", "bad_record"),
        ("a.jsonl", b'{"title": "x"}\n', "no_text"),
        ("a.jsonl", b'{"text": 12}\n', "no_text"),
        ("a.jsonl", b'{"text": " "}\n', "empty"),
        ("a.jsonl", b'{"text": "\\u0000\0"}\n', "bad_json"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "bad_encoding"),
        ("a.jsonl", b"[" * 200_000 + b"\n", "bad_json"),
        ("a.jsonl", b'[\n{"text": "x"},\n{"text": "y"}\n]\n', "not_json_lines"),
        (
            "a.json.gz",
            gzip.compress(b'{\r\n  "name": "x",\r\n  "text": "y"\r\n}', mtime=0),
            "not_json_lines",
        ),
        ("a.jsonl", b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "bad_json"),
    ],
)
def test_bad_input(tmp_path, name, data, reason):
    letter = only_letter(read_data(tmp_path, name, data))
    assert letter.reason == reason and letter.source in ("text", "code")
    assert letter.where.startswith(str(tmp_path / name)) and len(letter.detail) <= 200
    assert letter.to_bytes()


def test_a_damaged_first_line_is_one_dead_letter(tmp_path):
    items = read_data(tmp_path, "a.jsonl", b'{\n\n{"text": "x"}\n{"text": "y"}\n')
    assert [item.text for item in documents(items)] == ["x", "y"]
    assert only_letter(letters(items)).reason == "bad_json"


def test_a_file_that_is_gone(tmp_path):
    put(tmp_path, "gone.txt", b"x")
    (file,) = listing.list_inputs(str(tmp_path))
    (tmp_path / "gone.txt").unlink()
    letter = only_letter(list(readers.read(file)))
    assert letter.reason == "unreadable" and "No such file" in letter.detail


def test_text_and_code_documents(tmp_path):
    put(tmp_path, "notes/über.md", "Grüße aus Köln\n".encode("latin-1"))
    put(tmp_path, "repo/src/a.py", b"import os\n")
    note, code = sorted(documents(read_file(tmp_path)), key=lambda d: d.source, reverse=True)
    assert note == Document(
        document_id("text", "notes/über.md", "Grüße aus Köln\n"), "Grüße aus Köln\n", "text",
        path="notes/über.md", meta={"kind": "plain", "encoding": "cp1252"},
    )  # fmt: skip
    assert code == Document(
        document_id("code", "src/a.py", "import os\n", repo="repo"), "import os\n", "code",
        lang="python", repo="repo", path="src/a.py", meta={"kind": "plain"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "lang"),
    [
        ("a/b.h", "namespace x {\nclass Y { public: int z; };\n}\n", "c++"),
        ("a/b.h", "int add(int a, int b);\n", "c"),
        ("a/tool", "#!/usr/bin/env python3\nprint(1)\n", "python"),
        ("a/README.md", "# Words\n", "und"),
    ],
)
def test_the_language_of_code_is_told_by_what_it_looks_like(tmp_path, name, text, lang):
    put(tmp_path, name, text.encode())
    row = {"path": name, "text": text, "source": "code", "repo": "a"}
    put(tmp_path, "rows.jsonl", json.dumps(row | {"language": lang.upper()}).encode())
    found = documents(read_file(tmp_path, ReadOptions(source="code")))
    assert [document.lang for document in found] == [lang, lang]


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path):
    for name in ("one", "deep/two"):
        put(tmp_path, f"{name}/in/a.txt", b"hello")
        put(tmp_path, f"{name}/in/lib/b.py", b"import os")
        put(tmp_path, f"{name}/in/c.jsonl", b'{"text": "a record"}\n')
    one = [item.id for item in read_file(tmp_path / "one/in")]
    assert len(set(one)) == 3 and one == [i.id for i in read_file(tmp_path / "deep/two/in")]


def test_limits_of_size(tmp_path):
    options = dataclasses.replace(FAST, max_document_bytes=1 << 17)
    letter = only_letter(read_data(tmp_path, "a.txt", b"text " * 40_000, options))
    assert letter.reason == "too_large" and letter.num_bytes == 200_000
    data = gzip.compress(b"\0" * (64 << 20))
    assert only_letter(read_data(tmp_path, "a.txt.gz", data, options)).reason == "binary"
    data = gzip.compress(b"a" * (64 << 20))
    assert only_letter(read_data(tmp_path, "b.txt.gz", data, options)).reason == "too_large"


@pytest.mark.parametrize("kind", ["man", "metadata", "docstrings"])
def test_files_that_wrap_their_text(tmp_path, kind):
    data = {
        "man": b".TH X 1\n.SH NAME\nx \\- do \\fBmuch\\fR\n",
        "metadata": b"Name: x\n\n# X does much\n",
        "docstrings": b'"""X does much, and that for sixty characters and more than that."""\n',
    }[kind]
    put(tmp_path, "pkg/x.py", data)
    (file,) = listing.list_folder(tmp_path)
    (item,) = readers.read(file._replace(kind=kind, source="text", repo="", repo_parts=0))
    assert "much" in item.text and "\\fB" not in item.text and "Name:" not in item.text
    assert item.meta == {"kind": kind} and item.path == "pkg/x.py"
    if kind == "docstrings":
        assert item.text.startswith("pkg.x\n")


def test_python_that_does_not_parse(tmp_path):
    put(tmp_path, "old.py", b"print 'two'")
    (file,) = listing.list_folder(tmp_path)
    assert only_letter(list(readers.read(file._replace(kind="docstrings")))).reason == (
        "syntax_error"
    )


def test_a_library_in_rust_that_panics(tmp_path, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(*arguments):
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    monkeypatch.setattr(records, "from_json", panic)
    assert only_letter(read_data(tmp_path, "a.jsonl", json_lines(3))).reason == "parser_crash"
    monkeypatch.setattr(records, "from_json", lambda *arguments: sys.exit(3))
    with pytest.raises(SystemExit):
        read_data(tmp_path, "a.jsonl", json_lines(3))


def test_an_unknown_kind_is_an_error_of_the_caller(tmp_path):
    put(tmp_path, "a.txt", b"x")
    (file,) = listing.list_folder(tmp_path)
    with pytest.raises(UserError, match="tape"):
        list(readers.read(file._replace(kind="tape")))


# --- records ----------------------------------------------------------------------------------

ROW = {"text": "Some text.", "id": 7, "url": "http://x.org/7", "source": "Web Text",
       "timestamp": "2024-01-02", "lang": "en", "license": ["mit", "bsd"], "dump": "CC-1",
       "meta": {"stars": 3, "score": 0.5, "ok": True, "tags": ["a"], "huge": 2**70}}  # fmt: skip


def test_the_fields_of_a_record(tmp_path):
    (item,) = read_data(tmp_path, "a.jsonl", json.dumps(ROW).encode())
    assert item == Document(
        document_id("web_text", "7", "Some text.", dump="CC-1"), "Some text.", "web_text",
        url="http://x.org/7", dump="CC-1", timestamp=1704153600, lang="en", license="mit",
        meta={"stars": 3, "score": 0.5, "ok": True, "tags": '["a"]', "huge": pytest.approx(2**70),
              "original_id": "7"},
    )  # fmt: skip


def test_other_spellings_and_fields_of_ones_own(tmp_path):
    row = {
        "content": "x = 1", "max_stars_repo_name": "me/it", "max_stars_repo_path": "a/b.py",
        "language": "python", "date": "2013-05-18T07:24:15Z", "body": "Body.", "key": "k1",
    }  # fmt: skip
    data = json.dumps(row).encode()
    (item,) = read_data(tmp_path, "a.jsonl", data)
    assert (item.text, item.repo, item.path, item.lang) == ("x = 1", "me/it", "a/b.py", "python")
    assert item.timestamp == 1368861855
    assert item.id == document_id("text", "a/b.py", "x = 1", repo="me/it")
    options = ReadOptions(text_field="body", fields=("id=key",), source="forum", dump="D")
    (item,) = read_data(tmp_path, "a.jsonl", data, options)
    assert (item.text, item.source, item.dump) == ("Body.", "forum", "D")
    assert item.meta["original_id"] == "k1"
    with pytest.raises(UserError, match="colour=x"):
        ReadOptions(fields=("colour=x",))


def test_records_without_an_id(tmp_path):
    data = b'{"text": "same"}\n{"text": "same", "id": ""}\n{"text": "same", "id": "a"}\n'
    items = documents(read_data(tmp_path, "a.jsonl", data))
    # Nothing tells the first two apart, wherever they stand.
    assert items[0].id == items[1].id == document_id("text", "", "same") != items[2].id
    found = read_data(tmp_path, "a.jsonl", data, ReadOptions(require_id=True))
    assert [letter.reason for letter in letters(found)] == ["no_id", "no_id"]
    assert [item.meta["original_id"] for item in documents(found)] == ["a"]


def test_what_other_programs_write_as_json(tmp_path):
    lines = [
        b'{"text": "nan", "score": NaN}', b'{"text": "tab\there"}',
        b'{"text": "lone \\ud800 and pair \\ud83d\\ude00"}',
        '{"text": "Größe über alles, schöne Grüße"}'.encode("latin-1"),
        b'\xef\xbb\xbf{"text": "mark"}',
    ]  # fmt: skip
    items = documents(read_data(tmp_path, "a.jsonl", b"\r\n".join([lines[4], *lines[:4]])))
    assert [item.text for item in items] == [
        "mark", "nan", "tab\there", "lone � and pair 😀", "Größe über alles, schöne Grüße",
    ]  # fmt: skip
    assert [item.meta for item in items] == [
        {}, {"json": "lenient"}, {"json": "lenient"}, {"json": "lenient"},
        {"json": "lenient", "encoding": "cp1252"},
    ]  # fmt: skip
    assert all(item.to_bytes() for item in items)


def test_a_damaged_line_costs_itself_and_says_where(tmp_path):
    data = b'{"text": "one"}\n{broken}\n\n{"text": "two"}\n'
    items = read_data(tmp_path, "a.jsonl", data)
    assert [item.text for item in documents(items)] == ["one", "two"]
    (letter,) = letters(items)
    assert letter.where == f"{tmp_path}/a.jsonl#byte=16" and letter.head == "{broken}"
    items = read_data(tmp_path, "a.jsonl.gz", gzip.compress(data))
    assert letters(items)[0].where == f"{tmp_path}/a.jsonl.gz#line=2"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_lines(tmp_path, suffix):
    data = json_lines(300)
    packed = {
        "": data,
        ".gz": gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + b"\0" * 512,
        ".zst": zstandard.compress(data[:1000]) + zstandard.compress(data[1000:]),
    }[suffix]
    items = read_data(tmp_path, f"a.jsonl{suffix}", packed)
    assert [item.text for item in items] == [text(n) for n in range(300)]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_damage_costs_what_follows_it_and_one_dead_letter(tmp_path, kind):
    rows = [orjson.dumps({"text": gzip.compress(str(n).encode()).hex() * 4}) for n in range(5000)]
    data = b"\n".join(rows)
    packed = gzip.compress(data) if kind == "gz" else zstandard.compress(data)
    items = read_data(tmp_path, f"a.jsonl.{kind}", packed[: len(packed) // 2])
    *found, last = items
    assert last.reason in ("corrupt_gzip", "corrupt_zstd")
    assert last.where.endswith(f"#line={len(found) + 1}") and "compressed byte" in last.detail
    # zstd packs in blocks of 128 kB; gzip loses a kilobyte at most
    assert len(found) > (2400 if kind == "gz" else 1500)
    assert [item.text for item in found] == [
        orjson.loads(row)["text"] for row in rows[: len(found)]
    ]


PACK = {"gzip": gzip.compress, "zstd": zstandard.compress, "xz": lzma.compress,
        "bzip2": bz2.compress}  # fmt: skip


@pytest.mark.parametrize("kind", PACK)
@settings(max_examples=40, deadline=None, database=None)
@given(
    members=st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 256)), min_size=1, max_size=6),
    padding=st.integers(0, 600), sizes=st.sampled_from([1, 1000, 4096, 70_000]),
)  # fmt: skip
def test_members_of_every_size(kind, members, padding, sizes):
    """From a byte to more than is read at once, that pack well or not at all."""
    parts = [random.Random(size).randbytes(size)[:size] if noise > 200
             else (bytes(range(noise)) * (size * 9 // noise + 1))[: size * 9]
             for size, noise in members]  # fmt: skip
    packed = b"".join(PACK[kind](part) for part in parts) + b"\0" * padding
    stream = Decompressed(io.BytesIO(packed), kind)
    out = b"".join(iter(lambda: stream.read(sizes), b""))
    assert out == b"".join(parts)
    assert len(stream.starts) == len(parts) and stream.compressed == len(packed)


def test_a_stream_gives_what_stands_before_damage_then_raises():
    whole = bytes(range(256)) * 2000
    packed = bytearray(gzip.compress(whole, 1))
    packed[-3] ^= 1  # the length at the end
    stream, out = Decompressed(io.BytesIO(bytes(packed)), "gzip"), b""
    with pytest.raises(Damaged) as raised:
        while block := stream.read(1 << 20):
            out += block
    assert whole.startswith(out) and len(whole) - len(out) < 300_000
    assert raised.value.reason == "corrupt_gzip" and raised.value.member == 0


def test_a_huge_line_is_one_dead_letter_and_reading_goes_on(tmp_path):
    """200 MB without a line break, in no more memory than the largest document takes."""
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as handle:
        handle.write(b'{"text": "before"}\n{"text": "')
        for _ in range(200):
            handle.write(b"x" * (1 << 20))
        handle.write(b'"}\n{"text": "behind"}\n')
    size = (200 << 20) + 12
    expected = f"['before', '', 'behind'] [('{path}#byte=19', 'too_large', {size})]"
    for piece in (1 << 40, 16 << 20):
        found, megabytes = grown_by(
            f"items = read_file({str(path)!r}, ReadOptions(piece_bytes={piece}))\n"
            "result = [getattr(item, 'text', '') for item in items]\n"
            "result = f'{result} {[item[:2] + item[4:5] for item in letters(items)]}'"
        )
        assert found == expected and megabytes < 90


@pytest.mark.parametrize("piece", [1, 7, 100, 333, 5000])
def test_pieces_of_a_file_are_the_file(tmp_path, piece):
    lines = [orjson.dumps({"text": "word " * (n * 7 % 50)}) for n in range(60)]
    path = put(tmp_path, "a.jsonl", b"\n".join(lines))
    whole = read_file(path, dataclasses.replace(FAST, piece_bytes=1 << 40))
    files = listing.list_inputs(str(path), dataclasses.replace(FAST, piece_bytes=piece))
    assert sum(file.size for file in files) == path.stat().st_size
    assert len(files) == -(-path.stat().st_size // piece)
    pieces = [item for file in files for item in readers.read(file, FAST)]
    assert pieces == whole and {i.reason for i in letters(whole)} == {"empty"}


def test_lines_longer_than_the_limit_around_chunks(monkeypatch):
    monkeypatch.setattr(records, "_CHUNK", 10)
    data = b"a" * 25 + b"\n" + b"b" * 4 + b"\n\n" + b"c" * 40
    found = list(records.lines(io.BytesIO(data), 20))
    assert [(line.offset, line.number, line.size) for line in found] == [
        (0, 1, 25), (26, 2, 4), (31, 3, 0), (32, 4, 40),
    ]  # fmt: skip
    assert found[1].data == b"bbbb"


# --- ArrayRecord ------------------------------------------------------------------------------


def test_array_record_and_its_damage(tmp_path):
    data = array_record(tmp_path, 200, group=20)
    items = read_data(tmp_path, "a.arrayrecord", data)
    assert [item.text for item in items] == [text(n) for n in range(200)]
    assert items[3].meta == {"original_id": "3"}
    broken = bytearray(data)
    broken[len(data.rstrip(b"\0")) // 50] ^= 0xFF
    items = read_data(tmp_path, "b.arrayrecord", bytes(broken))
    lost = letters(items)
    assert {letter.reason for letter in lost} == {"corrupt_arrayrecord"}
    # a group, not the batch that is read at once
    assert len(items) == 200 and len(lost) == 20
    assert lost[0].where == f"{tmp_path}/b.arrayrecord#record={items.index(lost[0])}"


# --- real data --------------------------------------------------------------------------------


def test_shared_data(shared):
    expected = {"gsm8k/*.jsonl": "question", "ifeval/input_data.jsonl": "prompt",
                "humaneval/test.jsonl": "prompt"}  # fmt: skip
    for pattern, field in expected.items():
        files = listing.list_inputs(str(shared / "data" / pattern))
        options = ReadOptions(text_field=field)
        for file in files:
            items = list(readers.read(file, options))
            with open(file.location, "rb") as handle:
                rows = [json.loads(line) for line in handle]
            assert [item.text for item in items] == [row[field] for row in rows]
    poems = documents(read_file(shared / "data" / "chinese_poetry", ReadOptions(source="poetry")))
    assert len(poems) >= 20 and all(poem.meta == {"kind": "plain"} for poem in poems)


def test_documentation_of_this_machine():
    """Every file is a document or a dead letter; nothing is lost for an unknown encoding."""
    from data_beam.io import harvest

    files = [file for file in harvest.list_machine() if file.root in ("doc", "man")][::20]
    if len(files) < 20:
        pytest.skip("this machine has no documentation")
    items = [item for file in files for item in readers.read(file)]
    assert len(items) == len(files)
    assert {letter.reason for letter in letters(items)} <= {"empty", "binary"}
    assert len(documents(items)) > 0.95 * len(items)
