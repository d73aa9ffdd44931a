"""Tokens come back as written; every kind of damage is one line that names its file."""

from __future__ import annotations

import os

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from internlm2_jax.data.manifest import TokenSource, load_split
from internlm2_jax.data.records import pack_record, record_arrays, unpack_record
from internlm2_jax.errors import UserError
from internlm2_jax.files import read_json, write_json

SHA = "ab" * 32


def write_cache(folder, shards, *, vocab_size=1000, split="train", source="code"):
    """A token cache: `shards` is a list of shards, each a list of records of documents."""
    folder.mkdir(exist_ok=True)
    names = []
    for number, records in enumerate(shards):
        names.append(f"{split}-{source}-{number:05d}-of-{len(shards):05d}.arrayrecord")
        writer = ArrayRecordWriter(str(folder / names[-1]), "group_size:1")
        for record in records:
            writer.write(record if isinstance(record, bytes) else pack_record(record))
        writer.close()
    documents = [d for records in shards for r in records if isinstance(r, list) for d in r]
    path = folder / "manifest.json"
    manifest = read_json(path) if path.exists() else {"splits": {}}
    manifest |= {"tokenizer_sha256": SHA, "vocab_size": vocab_size}
    manifest["splits"].setdefault(split, {})[source] = {
        "shards": names,
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "bytes": 7 * len(documents),
    }
    write_json(path, manifest)
    return documents


def random_documents(count, vocab_size=1000, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(2, 500)).tolist() for _ in range(count)]


@given(st.lists(st.lists(st.integers(0, 2**32 - 1))))
def test_record_round_trip(documents):
    assert [d.tolist() for d in unpack_record(pack_record(documents))] == documents


def test_record_layout_is_the_contract():
    words = np.frombuffer(pack_record([[7, 8, 9], [], [70_000]]), "<u4")
    assert words.tolist() == [3, 3, 0, 1, 7, 8, 9, 70_000]


@pytest.mark.parametrize("damaged", [b"", b"\1\0", pack_record([[1, 2]])[:-4], b"\xff" * 8])
def test_damaged_record(damaged):
    with pytest.raises(ValueError):
        record_arrays(damaged)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, np.uint16), (92544, np.uint32)])
def test_source_returns_every_document(tmp_path, vocab_size, dtype):
    docs = random_documents(150, vocab_size)
    # More records than one read, and a shard that Beam left empty.
    shards = [[docs[:50], docs[50:51]], [], [[d] for d in docs[51:]]]
    write_cache(tmp_path, shards, vocab_size=vocab_size)
    source = TokenSource(tmp_path, "train", "code", tokenizer_sha256=SHA)
    assert len(source) == 150 and source.tokens.dtype == dtype and source.num_bytes == 1050
    assert source.lengths.tolist() == [len(d) for d in docs]
    assert all(source.doc(i).tolist() == d for i, d in enumerate(docs))
    assert source.doc(-1).tolist() == docs[-1]


def test_load_split_gives_all_sources(tmp_path):
    for source in ("text", "code"):
        write_cache(tmp_path, [[[[1, 5, 2]]]], source=source)
    write_cache(tmp_path, [[[[1, 2]]]], split="validation")
    assert list(load_split(tmp_path, "train")) == ["code", "text"]
    assert load_split(tmp_path, "validation")["code"].doc(0).tolist() == [1, 2]


def test_wrong_names_and_tokenizer(tmp_path):
    write_cache(tmp_path, [[[[1, 2]]]])
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        TokenSource(tmp_path, "test", "code")
    with pytest.raises(UserError, match="has no source 'web'; it has code"):
        TokenSource(tmp_path, "train", "web")
    with pytest.raises(UserError, match=r"another tokenizer \(sha256 abababababab, yours is cd"):
        TokenSource(tmp_path, "train", "code", tokenizer_sha256="cd" * 32)
    with pytest.raises(UserError, match="does not exist"):
        load_split(tmp_path / "absent", "train")
    write_json(tmp_path / "manifest.json", {"splits": {}})
    with pytest.raises(UserError, match="has no 'tokenizer_sha256'"):
        load_split(tmp_path, "train")


def test_damaged_shards_name_the_file(tmp_path):
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, 60_000, 5_000).tolist() for _ in range(20)]
    write_cache(tmp_path, [[[d] for d in docs]], vocab_size=60_000)
    shard = next(tmp_path.glob("*.arrayrecord"))
    whole = shard.read_bytes()

    def fails(match):
        with pytest.raises(UserError, match=match) as caught:
            TokenSource(tmp_path, "train", "code")
        assert "\n" not in str(caught.value)

    flipped = bytearray(whole)
    flipped[30_000] ^= 255
    for content in (bytes(flipped), whole[: len(whole) // 2], b"", os.urandom(1000)):
        shard.write_bytes(content)
        fails(rf"{shard.name} is damaged .*tokenize the corpus again")
    shard.unlink()
    fails(rf"{shard.name} is missing")


def test_contents_that_contradict_the_manifest(tmp_path):
    write_cache(tmp_path, [[[[1, 2], [3, 4]]]])
    manifest = read_json(tmp_path / "manifest.json")

    def fails(match, **changed):
        entry = manifest["splits"]["train"]["code"] | changed
        write_json(tmp_path / "manifest.json", manifest | {"splits": {"train": {"code": entry}}})
        with pytest.raises(UserError, match=match):
            TokenSource(tmp_path, "train", "code")

    fails("2 documents and 4 tokens but its manifest says 3 and 4", documents=3)
    fails("2 documents and 4 tokens but its manifest says 2 and 5", tokens=5)
    fails("is damaged", tokens=3)
    write_cache(tmp_path, [[[[1, 5000]]]])
    with pytest.raises(UserError, match="token past the vocabulary 1000"):
        TokenSource(tmp_path, "train", "code")
    write_cache(tmp_path, [[b"abc"]])
    with pytest.raises(UserError, match="not whole 4-byte words"):
        TokenSource(tmp_path, "train", "code")
