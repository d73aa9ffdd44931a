"""Files are whole or absent, and what is wrong with them is said in one line."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from internlm2_jax import files
from internlm2_jax.errors import DiskError, UserError


def test_whole_file_replaces_only_when_the_body_ends_well(tmp_path):
    path = tmp_path / "a.txt"
    files.atomic_write(path, "old")
    with pytest.raises(RuntimeError), files.whole_file(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("killed")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_whole_folder_replaces_only_when_the_body_ends_well(tmp_path):
    target = tmp_path / "out"
    with files.whole_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), files.whole_folder(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError("killed")
    assert (target / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [target]


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write .*no space left on the disk; free some"):
        files.write_json(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []


def test_json_round_trip_of_arrays_and_paths(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": np.float32(0.5), "p": Path("a/b"), "s": {2, 1}})
    assert files.read_json(tmp_path / "a.json") == {"x": 0.5, "p": "a/b", "s": [1, 2]}


def test_missing_and_damaged_json_name_the_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"bad\.json is not valid JSON"):
        files.read_json(tmp_path / "bad.json")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        files.read_jsonl(tmp_path / "bad.jsonl")


def test_jsonl_keeps_unicode_line_separators(tmp_path):
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    files.write_jsonl(tmp_path / "a.jsonl", rows)
    assert files.read_jsonl(tmp_path / "a.jsonl") == rows


def test_fingerprint_sees_values_and_not_order():
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": 2})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), "its file system is gone"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "no folder any more"),
        (ValueError("UNKNOWN: Error writing: Input/output error [source ...]"), "the disk fails"),
    ],
)
def test_a_lost_disk_is_told_from_a_bug(error, message):
    with pytest.raises(DiskError, match=message), files.explain_disk_errors("x"):
        raise error
    with pytest.raises(ValueError, match="a bug"), files.explain_disk_errors("x"):
        raise ValueError("a bug")
