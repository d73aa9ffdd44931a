"""Packed repositories: names, links, bombs, damage."""

import bz2
import dataclasses
import gzip
import io
import lzma
import os
import stat
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard
from reading import FAST, documents, letters, members, only_letter, put, read_data, tar, text, zip_

from data_beam.io import listing, readers
from data_beam.io.readers import archives
from data_beam.schema import Document, document_id

FILES = {
    "it-1.0/README.md": b"# It\n\nIt does it.\n",
    "it-1.0/src/it.py": b"import os\n",
    "it-1.0/.github/ci.yml": b"on: push\n",
    "it-1.0/src/__pycache__/it.pyc": b"\0\0",
    "it-1.0/logo.png": b"\x89PNG\r\n\0\0",
    "it-1.0/empty.py": b"",
    "it-1.0/latin.c": "/* Grüße über alles, später */\n".encode("latin-1"),
}
PACK = {
    ".zip": zip_,
    ".tar": tar,
    ".tar.gz": lambda files: gzip.compress(tar(files)),
    ".tgz": lambda files: gzip.compress(tar(files)),
    ".tar.zst": lambda files: zstandard.compress(tar(files)),
    ".tar.xz": lambda files: lzma.compress(tar(files)),
    ".tar.bz2": lambda files: bz2.compress(tar(files)),
}


def reasons(items) -> dict[str, str]:
    return {letter.where.partition("!")[2]: letter.reason for letter in letters(items)}


@pytest.mark.parametrize("suffix", PACK)
def test_members(tmp_path, suffix):
    items = read_data(tmp_path, f"in/it-1.0{suffix}", PACK[suffix](FILES))
    found = {item.path: item for item in documents(items)}
    assert set(found) == {"README.md", "src/it.py", "latin.c"}
    assert found["src/it.py"] == Document(
        document_id("code", "src/it.py", "import os\n", repo="it-1.0"), "import os\n", "code",
        lang="python", repo="it-1.0", path="src/it.py", meta={"kind": "archive"},
    )  # fmt: skip
    assert found["latin.c"].meta["encoding"] == "cp1252" and found["README.md"].lang == "und"
    assert reasons(items) == {"it-1.0/logo.png": "binary", "it-1.0/empty.py": "empty"}


@pytest.mark.parametrize(
    ("path", "names", "expected"),
    [
        # package index, GitHub branch, GitHub release, GitHub commit
        ("pkg-1.0.tar.gz", ["pkg-1.0/a.py", "pkg-1.0/b/c.py"], ("pkg-1.0", "pkg-1.0")),
        ("me/main.zip", ["repo-main/a.py", "repo-main/b.py"], ("me/repo", "repo-main")),
        ("v2.1.zip", ["repo-2.1/a.py"], ("repo", "repo-2.1")),
        ("repo.zip", ["repo-main/a.py"], ("repo", "repo-main")),
        ("repo-main.zip", ["repo/a.py"], ("repo-main", "repo")),
        # a folder that is part of the path
        ("repo.zip", ["src/a.py", "src/b.py"], ("repo", "")),
        ("repo.zip", ["src/a.py", "b.py"], ("repo", "")),
        ("repo.zip", ["a.py"], ("repo", "")),
        ("repo.zip", [], ("repo", "")),
        ("x/y/repo.tar.zst", ["./repo/a.py", ".hidden/z", "../z"], ("x/y/repo", "repo")),
    ],
)
def test_names_of_repositories(path, names, expected):
    assert archives.repository(path, names) == expected


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_names_links_and_devices_of_tar(tmp_path):
    files = {"r/a.py": b"a = 1\n", "../evil.py": b"x", "r/../../evil.py": b"x", "/etc/evil": b"x",
             "C:\\evil.py": b"x", "r\\..\\evil.py": b"x"}  # fmt: skip
    extra = [
        special("r/link.py", tarfile.SYMTYPE, "/etc/passwd"),
        special("r/hard.py", tarfile.LNKTYPE, "r/a.py"),
        special("r/dev", tarfile.CHRTYPE), special("r/pipe", tarfile.FIFOTYPE),
        special("r/folder", tarfile.DIRTYPE),
    ]  # fmt: skip
    items = read_data(tmp_path, "r.tar", tar(files, extra))
    assert [item.path for item in documents(items)] == ["a.py"]
    assert reasons(items) == {
        **dict.fromkeys([name for name in files if "evil" in name], "unsafe_name"),
        "r/link.py": "link", "r/hard.py": "link", "r/dev": "not_a_file", "r/pipe": "not_a_file",
    }  # fmt: skip
    assert not Path(tmp_path.parent, "evil.py").exists()


def test_names_links_and_passwords_of_zip(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("r/a.py", "../evil.py", "/abs.py", "r/sub/"):
            archive.writestr(name, "a = 1\n" if not name.endswith("/") else "")
        link = zipfile.ZipInfo("r/link.py")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    data = bytearray(out.getvalue())
    items = read_data(tmp_path, "r.zip", bytes(data))
    assert [item.text for item in documents(items)] == ["a = 1\n"]
    assert reasons(items) == {
        "../evil.py": "unsafe_name", "/abs.py": "unsafe_name", "r/link.py": "link"
    }  # fmt: skip
    data = bytearray(zip_({"a.py": b"a = 1\n", "b.py": b"b = 2\n"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1  # in the directory: encrypted
    assert reasons(read_data(tmp_path, "s.zip", bytes(data))) == {"a.py": "encrypted"}


def test_a_name_that_is_not_utf8(tmp_path):
    data = tar({"r/gr\udcfcn.py": b"a = 1\n", "r/b.py": b"b = 2\n"})
    items = read_data(tmp_path, "r.tar", data)
    assert len(documents(items)) == 2 and all(item.to_bytes() for item in items)


# --- bombs ------------------------------------------------------------------------------------


def test_large_members_are_not_unpacked(tmp_path):
    files = {"r/a.py": b"a = 1\n", "r/big.py": b"x = 1\n" * 50_000, "r/z.py": b"z = 1\n"}
    options = dataclasses.replace(FAST, max_document_bytes=100_000)
    for suffix, pack in PACK.items():
        items = read_data(tmp_path, f"r{suffix}", pack(files), options)
        assert [item.path for item in documents(items)] == ["a.py", "z.py"]
        (letter,) = letters(items)
        assert (letter.reason, letter.num_bytes) == ("too_large", 300_000)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar.zst"])
def test_an_archive_may_unpack_to_so_much(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(archives, "_MIN_LIMIT", 1 << 20)
    files = {f"r/{n:03d}.py": b"x = 1\n" * 20_000 for n in range(100)}  # 12 MB
    options = dataclasses.replace(FAST, max_archive_ratio=1)
    items = read_data(tmp_path, f"r{suffix}", PACK[suffix](files), options)
    (letter,) = letters(items)
    assert letter.reason == "archive_bomb" and "1,048,576" in letter.detail
    assert 5 <= len(documents(items)) <= 9
    monkeypatch.undo()
    assert len(read_data(tmp_path, f"r{suffix}", PACK[suffix](files))) == 100


def test_members_that_overlap(tmp_path, monkeypatch):
    """A zip bomb of the non-recursive kind: many entries of the directory, one stream."""
    monkeypatch.setattr(archives, "_MIN_LIMIT", 1 << 20)
    data = zip_({"a.py": b"x = 1\n" * 40_000})
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry, many = data[start:end], 200
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, many, many, len(entry) * many, start, 0)
    items = read_data(tmp_path, "r.zip", data[:start] + entry * many + tail)
    # Python 3.13 refuses such entries itself
    assert letters(items)[-1].reason in ("archive_bomb", "corrupt_zip") and len(items) < 50


def test_a_header_that_claims_gigabytes(tmp_path):
    info = special("r/long", tarfile.GNUTYPE_LONGNAME)
    info.size = 4 << 30
    data = info.tobuf(tarfile.GNU_FORMAT) + tar({"r/a.py": b"a = 1\n"})
    items = read_data(tmp_path, "r.tar", data)
    assert [item.path for item in documents(items)] == ["a.py"]
    assert [letter.reason for letter in letters(items)] == ["corrupt_tar"]


# --- damage -----------------------------------------------------------------------------------

COUNT = 30


def parts(items) -> list[int]:
    return [int(item.path.partition("part")[2][:-3]) for item in documents(items)]


def test_a_damaged_tar_header_costs_its_member(tmp_path):
    data = bytearray(tar(members(COUNT)))
    at = data.index(b"pkg/src/part7.py")
    data[at : at + 8] = b"\xff" * 8
    items = read_data(tmp_path, "pkg.tar", bytes(data))
    assert parts(items) == [n for n in range(COUNT) if n != 7]
    (letter,) = letters(items)
    assert letter.reason == "corrupt_tar" and letter.where.endswith("!pkg/src/part6.py")
    assert f"near byte {at:,}" in letter.detail


def test_archives_one_behind_the_other(tmp_path):
    data = tar(members(3)) + tar({"pkg/src/part3.py": b"x = 3\n"})
    assert parts(read_data(tmp_path, "pkg.tar", data)) == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", PACK)
def test_a_cut_archive(tmp_path, suffix):
    data = PACK[suffix](members(COUNT))
    items = read_data(tmp_path, f"pkg{suffix}", data[: len(data) * 2 // 3])
    found = parts(items)
    assert found == list(range(len(found))) and letters(items)
    if suffix in (".zip", ".tar"):
        assert len(found) >= 15


def test_what_stands_at_the_end_of_a_stream_is_checked(tmp_path):
    """tar stops at its end mark; the checksum of gzip stands behind it."""
    data = bytearray(gzip.compress(tar(members(COUNT))))
    data[-6] ^= 1
    items = read_data(tmp_path, "pkg.tar.gz", bytes(data))
    assert parts(items) == list(range(COUNT))
    assert [letter.reason for letter in letters(items)] == ["corrupt_gzip"]


def test_zip_members_with_a_wrong_checksum(tmp_path):
    data = bytearray(zip_(members(COUNT), zipfile.ZIP_STORED))
    data[data.index(b"x = 4\n")] = ord("y")
    items = read_data(tmp_path, "pkg.zip", bytes(data))
    assert parts(items) == [n for n in range(COUNT) if n != 4]
    assert reasons(items) == {"": "corrupt_zip", "pkg/src/part4.py": "corrupt_zip"}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("what", ["cut", "directory", "count", "shifted"])
def test_zips_without_their_directory(tmp_path, what, streamed):
    out = io.BytesIO()
    target = out
    if streamed:  # sizes stand behind each member

        class Pipe(io.RawIOBase):
            def writable(self):
                return True

            def write(self, data):
                return out.write(data)

        target = Pipe()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members(COUNT).items():
            archive.writestr(name, data)
    data = bytearray(out.getvalue())
    directory = data.index(b"PK\x01\x02")
    if what == "cut":
        data = data[:directory]
    elif what == "directory":
        data[directory + 1] ^= 0xFF
    elif what == "count":  # the comment of one entry swallows four others
        entries = [directory]
        for _ in range(9):
            lengths = struct.unpack_from("<3H", data, entries[-1] + 28)
            entries.append(entries[-1] + 46 + sum(lengths))
        struct.pack_into("<H", data, entries[4] + 32, entries[9] - entries[5])
    else:
        first = data.index(b"PK\x03\x04", 10)
        data[first:first] = b"some bytes too many"
    items = read_data(tmp_path, "pkg.zip", bytes(data))
    assert sorted(parts(items)) == list(range(COUNT))
    assert all(text(n) in item.text for n, item in zip(parts(items), documents(items), strict=True))
    assert [letter.reason for letter in letters(items)] == ["corrupt_zip"]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("data", [b"", b"garbage" * 200])
def test_no_archive_at_all(tmp_path, suffix, data):
    assert only_letter(read_data(tmp_path, f"r{suffix}", data)).reason.startswith("corrupt_")


def test_an_empty_archive(tmp_path):
    for suffix, pack in PACK.items():
        assert only_letter(read_data(tmp_path, f"r{suffix}", pack({}))).reason == "empty"


# --- real data --------------------------------------------------------------------------------


def test_an_installed_package_packed_and_unpacked_is_the_same(tmp_path):
    """The sources of one package, read from its folder and from each kind of archive."""
    folder = Path(zstandard.__file__).parent.parent / "hypothesis"
    files = {}
    for path in sorted(folder.rglob("*.py"))[:60]:
        name = f"hypothesis/{path.relative_to(folder)}"
        files[name] = path.read_bytes()
        put(tmp_path / "plain", name, files[name])
    refs = listing.list_inputs(str(tmp_path / "plain"))
    plain = {item.id: item for ref in refs for item in documents(readers.read(ref))}
    assert len(plain) >= 50
    for suffix, pack in PACK.items():
        packed = documents(read_data(tmp_path, f"packed/hypothesis{suffix}", pack(files)))
        assert {i.id: i._replace(meta={}) for i in packed} == {
            id: i._replace(meta={}) for id, i in plain.items()
        }


def test_archives_of_python_itself():
    """Wheels and zips that the interpreter brings along, if any."""
    found = [path for path in Path(sys.prefix).rglob("*.zip") if os.path.getsize(path) < 5 << 20]
    found += Path(sys.base_prefix).rglob("ensurepip/_bundled/*.whl")
    if not found:
        pytest.skip("no archive on this machine")
    for path in found[:5]:
        ref = listing.FileRef("x", str(path.parent), path.name, 0, "archive", "code")
        if path.suffix == ".whl":
            ref = ref._replace(path=path.name)
            members_read = list(archives.zips.members(
                archives.Watched(open(path, "rb")), ref, 1 << 25, 1 << 30))  # noqa: SIM115  # fmt: skip
            assert len(members_read) > 100 and not any(m.problem for m in members_read)
        else:
            assert documents(readers.read(ref)) or letters(readers.read(ref))
