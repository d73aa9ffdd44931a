"""Choosing files: independent of order, balanced, bounded."""

import random

import pytest

from data_beam.io.listing import FileRef, fair_shares, list_folder, select
from internlm2_jax.errors import UserError


def some_files(code: int, text: int, size: int = 1000) -> list[FileRef]:
    return [FileRef("r", "/b", f"{n}.py", size, "plain", "code", "python") for n in range(code)] + [
        FileRef("r", "/b", f"{n}.md", size, "plain", "text") for n in range(text)
    ]


def total(files, source):
    return sum(file.size for file in files if file.source == source)


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


def test_list_folder(tmp_path):
    for name in ("a.py", "b/c.MD", "b/Makefile", ".git/config", "x/__pycache__/y.py", "out/z.txt",
                 "d.jsonl.gz", "e.rst.gz"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"abc")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.py")
    found = {file.path: file for file in list_folder(tmp_path, exclude=[tmp_path / "out"])}
    assert set(found) == {"a.py", "b/c.MD", "b/Makefile", "d.jsonl.gz", "e.rst.gz"}
    assert (found["a.py"].source, found["a.py"].lang) == ("code", "python")
    assert found["b/Makefile"].source == "code" and found["b/c.MD"].source == "text"
    assert found["d.jsonl.gz"].kind == "records" and found["e.rst.gz"].size == 9


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list_folder(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        list_folder(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is not a folder"):
        list_folder(tmp_path / "file")
