"""Which files are read: patterns, kinds, repositories, pieces, and a choice that is independent of
order, balanced and bounded."""

import json
import os
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import FAST, put

from data_beam.io import listing, readers
from data_beam.io.file_ref import FileRef
from data_beam.io.listing import fair_shares, glob_regex, list_folder, list_inputs, select
from data_beam.io.readers import ReadOptions
from internlm2_jax.errors import UserError


def some_files(code: int, text: int, size: int = 1000) -> list[FileRef]:
    return [FileRef("r", "/b", f"{n}.py", size, "plain", "code", "python") for n in range(code)] + [
        FileRef("r", "/b", f"{n}.md", size, "plain", "text") for n in range(text)
    ]


def total(files, source):
    return sum(file.size for file in files if file.source == source)


def paths(files) -> list[str]:
    return [file.path for file in files]


# --- choosing ---------------------------------------------------------------------------------


def test_fair_shares():
    assert fair_shares(100, {"a": 500, "b": 500}) == {"a": 50, "b": 50}
    assert fair_shares(100, {"a": 500, "b": 10}) == {"a": 90, "b": 10}
    assert fair_shares(100, {"a": 5, "b": 10, "c": 20}) == {"a": 5, "b": 10, "c": 20}


def test_half_code_half_text_if_there_is_enough():
    chosen = select(some_files(500, 500), 100_000, seed=0)
    assert total(chosen, "code") == total(chosen, "text") == 50_000
    chosen = select(some_files(500, 10), 100_000, seed=0)
    assert (total(chosen, "code"), total(chosen, "text")) == (90_000, 10_000)


def test_the_order_of_listing_does_not_matter_but_the_seed_does():
    files = some_files(200, 200)
    shuffled = random.Random(0).sample(files, len(files))
    assert select(files, 50_000, 0) == select(shuffled, 50_000, 0)
    assert select(files, 50_000, 0) != select(files, 50_000, 1)
    assert select(shuffled, None, 0) == sorted(files)


# --- folders ----------------------------------------------------------------------------------

NAMES = ("a.py", "b/c.MD", "b/Makefile", ".git/config", "x/__pycache__/y.py", "out/z.txt",
         "d.jsonl.gz", "e.rst.gz", ".hidden", "b/.secret/k.txt")  # fmt: skip


def test_list_folder(tmp_path):
    for name in NAMES:
        put(tmp_path, name, b"abc")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.py")
    found = {file.path: file for file in list_folder(tmp_path, exclude=[tmp_path / "out"])}
    assert set(found) == {"a.py", "b/c.MD", "b/Makefile", "d.jsonl.gz", "e.rst.gz"}
    assert (found["a.py"].source, found["a.py"].lang) == ("code", "python")
    assert found["b/Makefile"].source == "code" and found["b/c.MD"].source == "text"
    assert found["d.jsonl.gz"].kind == "records" and found["e.rst.gz"].size == 9
    assert found["a.py"].version == str(os.stat(tmp_path / "a.py").st_mtime_ns)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list_folder(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        list_folder(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is not a folder"):
        list_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "kind", "source", "code_source"),
    [
        ("a.txt", "plain", "text", "code"), ("a", "plain", "text", "code"),
        ("a.py", "plain", "code", "code"), ("a.json", "plain", "code", "code"),
        ("a.html", "html", "text", "code"), ("A.HTM.gz", "html", "text", "code"),
        ("a.jsonl", "records", "text", "code"), ("c4.00000.json.gz", "records", "text", "code"),
        ("a.ndjson.zst", "records", "text", "code"), ("a.arrayrecord", "records", "text", "code"),
        ("a.parquet", "parquet", "text", "code"), ("a.warc", "warc", "text", "code"),
        ("a.warc.gz", "warc", "text", "code"), ("a.warc.wet.gz", "warc", "text", "code"),
        ("a.wet", "warc", "text", "code"), ("a.zip", "archive", "code", "code"),
        ("a.tgz", "archive", "code", "code"), ("a.tar.zst", "archive", "code", "code"),
        ("a.tar", "archive", "code", "code"),
    ],
)  # fmt: skip
def test_kinds(tmp_path, name, kind, source, code_source):
    put(tmp_path, name, b"x")
    (file,) = list_inputs(str(tmp_path))
    assert (file.kind, file.source) == (kind, source)
    (file,) = list_inputs(str(tmp_path), ReadOptions(source="code"))
    assert file.kind == ("plain" if kind == "html" else kind) and file.source == code_source
    (file,) = list_folder(tmp_path)
    assert file.kind == ("plain" if kind == "html" else kind)


def test_repositories(tmp_path):
    for name in (
        "top.py", "one/a.py", "one/src/b.py", "me/two/.git/config", "me/two/src/c.py",
        "me/two/notes.txt", "me/two/sub/.git", "me/two/sub/d.py", "me/three/e.py",
    ):  # fmt: skip
        put(tmp_path, f"in/{name}", b"x = 1\n")

    def found(folder, **options):
        files = list_inputs(str(tmp_path / folder), ReadOptions(**options))
        return {file.path: (file.repo, file.path_in_repo) for file in files if file.repo}

    assert found("in") == {
        "top.py": ("in", "top.py"), "one/a.py": ("one", "a.py"),
        "one/src/b.py": ("one", "src/b.py"),
        "me/two/src/c.py": ("me/two", "src/c.py"), "me/two/sub/d.py": ("me/two/sub", "d.py"),
        "me/three/e.py": ("me", "three/e.py"),
    }  # fmt: skip
    assert found("in", repo_depth=2)["me/three/e.py"] == ("me/three", "e.py")
    assert found("in", repo_depth=2)["one/src/b.py"] == ("one/src", "b.py")
    assert set(found("in/one", repo_depth=0).values()) == {("one", "a.py"), ("one", "src/b.py")}
    assert found("in/me/two")["src/c.py"] == ("two", "src/c.py")
    # In a job about code every plain file belongs to its repository.
    assert found("in", source="code")["me/two/notes.txt"] == ("me/two", "notes.txt")


def test_links(tmp_path):
    """Of data, as download caches make them; not of code, and not to folders."""
    put(tmp_path, "blobs/0", b'{"text": "x"}\n')
    put(tmp_path, "in/a.py", b"x")
    (tmp_path / "in/b.jsonl").symlink_to(tmp_path / "blobs/0")
    (tmp_path / "in/c.py").symlink_to(tmp_path / "in/a.py")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/gone.jsonl").symlink_to(tmp_path / "nowhere")
    assert paths(list_inputs(str(tmp_path / "in"))) == ["a.py", "b.jsonl"]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    put(tmp_path, "in/a.txt", b"x")
    put(tmp_path, "in/closed/b.txt", b"x")
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(listing.os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot list .*closed: Permission denied"):
        list_inputs(str(tmp_path / "in"))
    options = ReadOptions(exclude=(str(tmp_path / "in/closed"),))
    assert paths(list_inputs(str(tmp_path / "in"), options)) == ["a.txt"]


def test_a_file_name_that_is_not_utf8(tmp_path):
    raw = os.fsencode(tmp_path / "in") + b"/gr\xfcn.txt"
    os.makedirs(tmp_path / "in")
    try:
        with open(raw, "wb") as handle:
            handle.write(b"found")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    put(tmp_path, "in/\ufffdfc.txt", b"literal")
    files = list_inputs(str(tmp_path / "in"))
    assert all(file.path.encode() for file in files)  # Beam's coder needs it
    assert sorted(item.text for file in files for item in readers.read(file)) == [
        "found",
        "literal",
    ]


# --- patterns ---------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    for name in ("a.txt", "b.jsonl", "x/c.txt", "x/y/d.txt", "x/y/e.md", "z/[1].txt", "z/f,g.txt"):
        put(tmp_path, f"in/{name}", b"text\n")
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (
            ["{}"],
            ["a.txt", "b.jsonl", "x/c.txt", "x/y/d.txt", "x/y/e.md", "z/[1].txt", "z/f,g.txt"],
        ),
        (["{}/*.txt"], ["a.txt"]),
        (["{}/**/*.txt"], ["a.txt", "x/c.txt", "x/y/d.txt", "z/[1].txt", "z/f,g.txt"]),
        (["{}/*/*.txt"], ["x/c.txt", "z/[1].txt", "z/f,g.txt"]),
        (["{}/x/**"], ["c.txt", "y/d.txt", "y/e.md"]),
        (["{}/x/y/?.txt,{}/b.jsonl"], ["b.jsonl", "d.txt"]),
        (["{}/a.txt", "{}/*.txt", "{}/a.txt"], ["a.txt"]),
        (["{}/z/[1].txt"], ["[1].txt"]),
        (["{}/z/f,g.txt"], ["f,g.txt"]),
        (["{}/z/[[]*.txt"], ["[1].txt"]),
        (["{}/[!a].jsonl"], ["b.jsonl"]),
        (["{}/x/"], ["c.txt", "y/d.txt", "y/e.md"]),
    ],
)  # fmt: skip
def test_patterns(tree, patterns, expected):
    files = list_inputs([pattern.replace("{}", str(tree)) for pattern in patterns])
    assert sorted(paths(files)) == sorted(expected)
    assert all(os.path.isfile(file.location) for file in files)
    assert files == sorted(files, key=lambda f: (f.root, f.location))


def test_relative_patterns(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert paths(list_inputs("x/*.txt")) == ["c.txt"]
    assert paths(list_inputs("**/d.txt")) == ["x/y/d.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}/gone.txt", "does not exist"), ("{}/*.zip", "matches no file"),
        ("{}/gone/*.txt", "there is no folder"), ("", "no input is given"),
        ("{}/a.txt,{}/gone", "does not exist"), ("nowhere://bucket/*.txt", "cannot list"),
        ("{}/[z-a].txt", "is no pattern of file names"),
    ],
)  # fmt: skip
def test_patterns_that_match_nothing(tree, pattern, message):
    with pytest.raises(UserError, match=message):
        list_inputs(pattern.replace("{}", str(tree)))


@given(st.text("ab/*?[]!.", max_size=8), st.text("ab/.", max_size=8))
def test_globs_never_raise_and_stars_stay_in_their_folder(pattern, path):
    try:
        matched = glob_regex(pattern).fullmatch(path)
    except re.error:
        pytest.fail(f"{pattern} is no regular expression")
    if matched and "**" not in pattern and "[" not in pattern:
        assert path.count("/") == pattern.count("/")


# --- pieces -----------------------------------------------------------------------------------


def test_pieces(tmp_path):
    put(tmp_path, "a.jsonl", b'{"text": "x"}\n' * 100)
    put(tmp_path, "a.jsonl.gz", b"x" * 5000)
    put(tmp_path, "a.txt", b"x" * 5000)
    files = list_inputs(str(tmp_path), ReadOptions(piece_bytes=500))
    pieces = [file for file in files if file.path == "a.jsonl"]
    assert [(f.start, f.end, f.size) for f in pieces] == [
        (0, 500, 500), (500, 1000, 500), (1000, 1400, 400),
    ]  # fmt: skip
    assert [(f.start, f.end) for f in files if f.path != "a.jsonl"] == [(0, 0), (0, 0)]
    assert len(set(files)) == 5


def test_the_output_of_the_job_is_no_input(tree):
    inside = put(tree, "out/corpus/part-00000-of-00001.arrayrecord", b"x").parents[1]
    put(tree, "outside.txt", b"x")
    wanted = {file.path for file in list_inputs(str(tree)) if not file.path.startswith("out/")}
    assert {file.path for file in list_inputs(str(tree), output=inside)} == wanted
    assert {file.path for file in list_inputs(f"{tree}/**", output=f"{inside}/")} == wanted
    assert "outside.txt" in wanted


def _a_corpus(folder, kind="corpus"):
    manifest = {"kind": kind, "shards": [{"name": "text.arrayrecord"}, {"name": "b.arrayrecord"}]}
    put(folder, "manifest.json", json.dumps(manifest).encode())
    for name in ("text.arrayrecord", "b.arrayrecord", "funnel.json", "old.arrayrecord"):
        put(folder, name, b"{}")


def test_of_a_corpus_its_documents_are_the_input(tmp_path):
    _a_corpus(tmp_path / "ours")
    assert paths(list_inputs(str(tmp_path / "ours"))) == ["b.arrayrecord", "text.arrayrecord"]
    assert len(list_inputs(f"{tmp_path}/ours/*.arrayrecord")) == 3  # what is asked for by name
    _a_corpus(tmp_path / "web", kind="of an extension")
    put(tmp_path, "other/manifest.json", b"no json")
    for name, count in (("web", 5), ("other", 1)):
        assert len(list_inputs(str(tmp_path / name))) == count


# --- remote -----------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    from bucket import Bucket

    monkeypatch.setattr(Bucket, "folder", str(tmp_path / "bucket"))
    return Bucket


def test_of_a_corpus_in_a_bucket_its_documents_are_the_input(tmp_path, remote):
    _a_corpus(tmp_path / "bucket/ours")
    for pattern in ("test://bucket/ours", "test://bucket/ours/"):
        assert paths(list_inputs(pattern)) == ["b.arrayrecord", "text.arrayrecord"]


def test_a_bucket(tmp_path, remote):
    from reading import documents, every_kind

    for name, data in every_kind(tmp_path).items():
        put(tmp_path, f"bucket/crawl/CC-MAIN-2023-50/{name}", data)
    put(tmp_path, "bucket/crawl/.hidden", b"x")
    put(tmp_path, "bucket/crawl/out/corpus/a.arrayrecord", b"x")
    files = list_inputs("test://bucket/crawl", FAST, "test://bucket/crawl/out")
    (tmp_path / "bucket/crawl/out/corpus/a.arrayrecord").unlink()
    local = list_inputs(str(tmp_path / "bucket/crawl"), FAST)
    assert paths(files) == paths(local) and len(files) == 18
    assert [f.size for f in files] == [f.size for f in local] and all(f.version for f in files)
    assert files[0].location.startswith("test://bucket/crawl/CC-MAIN-2023-50/")
    for there, here in zip(files, local, strict=True):
        found = list(readers.read(there, FAST))
        assert [i.id for i in documents(found)] == [
            i.id for i in documents(readers.read(here, FAST))
        ]  # fmt: skip
        assert documents(found)
    matched = list_inputs("test://bucket/crawl/**.warc.gz,test://bucket/crawl/*/a.txt")
    assert sorted(paths(matched)) == ["CC-MAIN-2023-50/a.txt", "CC-MAIN-2023-50/a.warc.gz"]
    (single,) = list_inputs("test://bucket/crawl/CC-MAIN-2023-50/a.txt")
    assert (single.root, single.path) == ("CC-MAIN-2023-50", "a.txt")
    with pytest.raises(UserError, match="matches no file"):
        list_inputs("test://bucket/none/**")


def test_an_error_of_the_network_is_no_dead_letter(tmp_path, remote, monkeypatch):
    """The runner tries again; a dead letter would lose the file for good."""
    from reading import every_kind

    for name, data in every_kind(tmp_path, 40).items():
        put(tmp_path, f"bucket/{name}", data)
    files = list_inputs("test://bucket", FAST)
    monkeypatch.setattr(remote, "broken", "bucket")
    for file in files:
        with pytest.raises(OSError, match="connection reset"):
            pytest.fail(f"{file.path} gave {list(readers.read(file, FAST))}")
