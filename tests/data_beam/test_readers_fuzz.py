"""Random bytes, cuts and flipped bits in files of every kind: reading never raises or hangs, what
stands before the damage is kept, memory stays bounded."""

import functools
import random
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import documents, every_kind, grown_by, letters, put, read_data

COUNT = 12
KINDS = sorted(every_kind(Path(tempfile.mkdtemp())))
# Kinds that are read from their front; the others keep an index at their end.
STREAMED = [name for name in KINDS if not name.endswith((".arrayrecord", ".parquet", ".html"))]
RELAXED = settings(
    max_examples=25, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@functools.cache
def valid() -> dict[str, bytes]:
    return every_kind(Path(tempfile.mkdtemp()), COUNT)


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


@functools.cache
def expected(name: str) -> tuple[str, ...]:
    return tuple(item.text for item in documents(read_data(folder(), name, valid()[name])))


def read_quickly(name: str, data: bytes):
    begin = time.monotonic()
    items = read_data(folder(), name, data)
    assert time.monotonic() - begin < 30
    assert all(letter.where.startswith(str(folder() / name)) for letter in letters(items))
    assert all(letter.to_bytes() and letter.reason for letter in letters(items))
    assert all(document.to_bytes() for document in documents(items))
    return items


@pytest.mark.parametrize("name", KINDS)
def test_whole_files_give_every_document_and_no_dead_letter(name):
    items = read_quickly(name, valid()[name])
    single = name.startswith("a.txt") or name == "a.html"
    assert len(documents(items)) == (1 if single else COUNT) and not letters(items)


@pytest.mark.parametrize("name", KINDS)
@RELAXED
@given(data=st.binary(max_size=3000))
def test_random_bytes(name, data):
    # None is a silent nothing.
    assert read_quickly(name, data)


@pytest.mark.parametrize("name", KINDS)
@RELAXED
@given(share=st.floats(0, 1))
def test_cut_files(name, share):
    whole = valid()[name]
    cut = int(share * (len(whole) - 1))
    items = read_quickly(name, whole[:cut])
    found = [item.text for item in documents(items)]
    if name in STREAMED and name not in ("a.txt",):
        assert found == list(expected(name)[: len(found)])
        # Documents are of about one size: nearly all before the cut must be there, but for the
        # last kilobyte of a compressed stream.
        if not name.startswith("a.txt") and not name.endswith((".xz", ".bz2", ".zst", ".tar.gz")):
            before = (cut - 1500) / len(whole) * COUNT - 2
            assert len(found) >= before
    if len(found) < len(expected(name)):
        # A cut between two lines or records cannot be seen; any other must be.
        seen = letters(items) or name in ("a.jsonl", "a.warc", "pkg.tar") or ".gz" in name
        assert seen, f"{len(found)} of {COUNT} and no dead letter"


@pytest.mark.parametrize("name", KINDS)
@RELAXED
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 5))
def test_flipped_bits(name, seed, flips):
    rng = random.Random(seed)
    data = bytearray(valid()[name])
    for _ in range(flips):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    items = read_quickly(name, bytes(data))
    lost = set(expected(name)) - {item.text for item in documents(items)}
    assert items
    # What is checked by a sum never changes in silence.
    if name.endswith((".gz", ".parquet", ".arrayrecord", ".xz", ".bz2")) and lost:
        assert letters(items)


@pytest.mark.parametrize("name", [name for name in KINDS if "txt" not in name])
@RELAXED
@given(seed=st.integers(0, 2**32))
def test_a_hole_in_the_middle(name, seed):
    """A few hundred bytes of noise: what stands well before is kept; for formats whose parts are
    found again, what stands well behind too."""
    rng = random.Random(seed)
    data = bytearray(valid()[name])
    size = min(200, len(data) // 20)
    at = rng.randrange(len(data) // 2, len(data) - 2 * size)
    data[at : at + size] = rng.randbytes(size)
    items = read_quickly(name, bytes(data))
    found = {item.text for item in documents(items)}
    before = (at - 1500) / len(data) * COUNT - 2
    kept = [text in found for text in expected(name)]
    if name in ("a.jsonl", "a.warc", "a.warc.gz", "a.warc.wet.gz", "pkg.tar", "pkg.zip"):
        assert all(kept[: max(0, int(before))])
    if name in ("a.jsonl", "a.warc", "a.warc.gz", "a.warc.wet.gz"):
        assert sum(kept) >= COUNT - 3


def test_memory_stays_bounded(tmp_path):
    """Damaged files of every kind, in a process of their own."""
    for name, data in valid().items():
        for number in range(8):
            rng = random.Random(f"{name}{number}")
            broken = bytearray(data)
            for _ in range(1 + number):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            put(tmp_path, f"{number}/{name}", bytes(broken))
    count, megabytes = grown_by(f"result = len(read_file({str(tmp_path)!r}))")
    assert int(count) > 500 and megabytes < 120
