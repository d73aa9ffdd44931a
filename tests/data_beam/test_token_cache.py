"""Text to tokens and back through the files, with a tokenizer of the Unicode code points."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from data_beam import cache
from data_beam.io import corpus_folder, writers
from data_beam.schema import DeadLetter, Document
from internlm2_jax.data.manifest import TokenReader, TokenSource
from internlm2_jax.data.records import unpack_record
from internlm2_jax.errors import UserError
from internlm2_jax.files import read_json, write_json


class CodePoints:
    """Stands in for the SentencePiece tokenizer: ids are code points + 3. It has no token for a
    text that holds "untokenizable"; `delay` seconds a batch, from the environment."""

    vocab_size, bos_id, eos_id, sha256 = 0x110003, 1, 2, "of the stand-in"

    @classmethod
    def load(cls, path: Path) -> CodePoints:
        if not path.is_file():
            raise UserError(f"cannot read the tokenizer {path}")
        return cls()

    def encode_batch(self, texts: list[str], *, threads: int) -> list[list[int]]:
        time.sleep(float(os.environ.get("TEST_DELAY", 0)))
        if any("untokenizable" in text for text in texts):
            raise ValueError("no token for this\ntext")
        return [[ord(character) + 3 for character in text] for text in texts]


TOKENIZER = "test_token_cache:CodePoints"  # by the name that a process of its own finds it under
SHARDS = [("train", "code", 0, 300), ("train", "code", 1, 1), ("train", "text", 0, 0)]


def write_corpus(folder: Path, extra: tuple[bytes, ...] = ()) -> Path:
    """A small corpus folder, as the corpus job leaves it; the third shard is empty, `extra` records
    end the first."""
    folder.mkdir(parents=True)
    rows = []
    for split, source, shard, count in [*SHARDS, ("validation", "code", 0, 2)]:
        name = writers.shard_name(split, source, shard, 2)
        texts = [f"{split} {source} {shard}:{n} 中文 " + "x" * (n * 37 % 900) for n in range(count)]
        records = [Document(f"{n:032x}", text, source).to_bytes() for n, text in enumerate(texts)]
        records += extra if name == writers.shard_name("train", "code", 0, 2) else []
        writers.write_array_record(folder / name, records, writers.DOCUMENTS_OPTIONS)
        rows.append({"name": name, "split": split, "source": source, "documents": len(records)})
    write_json(folder / "manifest.json", {"kind": "corpus", "fingerprint": "f", "shards": rows})
    return folder


if __name__ == "__main__":
    cache.run(*sys.argv[1:4], tokenizer=TOKENIZER)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(corpus: Path, output: Path, **options) -> dict:
    model = corpus.parent / "t.model"
    model.write_text("model")
    return cache.run(corpus, model, output, tokenizer=TOKENIZER, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("cache") / "corpus")


@pytest.fixture(scope="module")
def tokens(folder):
    run(folder, folder.parent / "tokens")
    return folder.parent / "tokens"


def test_tokens_are_the_documents_in_order(folder, tokens):
    manifest = read_json(tokens / "manifest.json")
    assert (manifest["tokenizer_sha256"], manifest["vocab_size"]) == ("of the stand-in", 0x110003)
    assert set(manifest["splits"]["train"]) == {"code"}  # no entry, no shard for no documents
    for split in ("train", "validation"):
        entry = manifest["splits"][split]["code"]
        records = []
        for name in entry["shards"]:
            reader = ArrayRecordReader(str(tokens / name))
            records += reader.read_all()
            reader.close()
            assert manifest["digests"][name] == writers.file_digest(tokens / name)
        found = [document for record in records for document in unpack_record(record)]
        texts = [document.text for document in corpus_folder.documents(folder, split, "code")]
        assert [d.tolist() for d in found] == [[1, *(ord(c) + 3 for c in t), 2] for t in texts]
        assert entry["documents"] == len(texts) and entry["records"] == len(records)
        assert entry["tokens"] == sum(map(len, found)) and entry["dead_letters"] == 0
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        sizes = [sum(map(len, unpack_record(r))) for r in records]
        assert max(sizes) <= cache.TOKENS_PER_RECORD
    assert manifest["rates"] == {"train": {"code": 1.0}, "validation": {"code": 1.0}}


def test_equal_inputs_give_equal_bytes(folder, tokens, tmp_path):
    run(folder, tmp_path / "again", threads=1)
    assert contents(tokens) == contents(tmp_path / "again")


def test_rates_are_shares_of_tokens(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    manifest = read_json(corpus / "manifest.json")
    manifest["shards"][1]["source"] = "text"
    write_json(corpus / "manifest.json", manifest)
    result = run(corpus, tmp_path / "out")
    counts = {name: entry["tokens"] for name, entry in result["splits"]["train"].items()}
    assert set(counts) == {"code", "text"}
    assert result["rates"]["train"] == {n: c / sum(counts.values()) for n, c in counts.items()}


# --- the index and its reader ------------------------------------------------------------------


def test_any_document_and_token_can_be_had_alone(tokens):
    whole = TokenSource(tokens, "train", "code")
    reader = TokenReader(tokens, "train", "code")
    assert (len(reader), reader.num_tokens) == (301, len(whole.tokens))
    assert sum(len(np.load(path)) - 1 for path in tokens.glob("train-code*.npy")) > 2
    for index in [*range(301), 150, 0, 300, -1, -301]:
        assert reader[index].tolist() == whole.doc(index).tolist()
    for start, end in ((0, 10), (70_000, 140_000), (len(whole.tokens) - 5, 10**9), (9, 9), (0, -1)):
        assert reader.tokens(start, end).tolist() == whole.tokens[start:end].tolist()
    with pytest.raises(IndexError):
        reader[301]
    (last,) = [path.name for path in tokens.glob("train-code-00001*.arrayrecord")]
    assert len(TokenReader(tokens, "train", "code", shards=[last])) == 1
    assert len(TokenReader(tokens, "train", "code", shards=[])) == 0


def test_grain_reads_the_same(tokens):
    import grain

    reader = TokenReader(tokens, "train", "code")
    dataset = grain.MapDataset.source(reader).shuffle(seed=1)
    lengths = sorted(len(dataset[i]) for i in range(len(dataset)))
    assert lengths == sorted(TokenSource(tokens, "train", "code").lengths.tolist())


def test_damage_is_named_by_its_file(tokens, tmp_path):
    import shutil

    def fails(name, content, match):
        broken = shutil.copytree(tokens, tmp_path / "broken", dirs_exist_ok=True)
        (path,) = broken.glob(f"validation*{name}")
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=match) as error:
            TokenReader(broken, "validation", "code")[0]
        assert "\n" not in str(error.value) and path.name in str(error.value)

    index = next(tokens.glob("validation*.npy")).read_bytes()
    shard = next(tokens.glob("train-code-00000*.arrayrecord")).read_bytes()
    fails(".npy", None, "is missing though")
    fails(".npy", index[:50], "is damaged")
    fails(".npy", b"", "is damaged")
    fails(".arrayrecord", None, "is missing though")
    fails(".arrayrecord", b"x" * 5000, "is damaged")
    fails(".arrayrecord", shard, "not as its index says")


# --- going on ----------------------------------------------------------------------------------


def test_a_shard_is_made_again_only_when_something_changed(folder, tmp_path):
    output = tmp_path / "out"
    run(folder, output)
    before = contents(output)
    times = {p: p.stat().st_mtime_ns for p in output.glob("*.arrayrecord")}

    def remade() -> list[str]:
        run(folder, output)
        assert contents(output) == before
        changed = [p.name for p, t in times.items() if p.stat().st_mtime_ns != t]
        times.update({p: p.stat().st_mtime_ns for p in times})
        return changed

    assert remade() == []
    first, second, _ = sorted(times)
    second.with_name(second.name + ".json").unlink()
    (output / (first.name + ".partial")).write_bytes(b"half")
    assert remade() == [second.name]
    first.with_name(first.name + ".index.npy").unlink()
    assert remade() == [first.name]
    sidecar = first.with_name(first.name + ".json")
    sidecar.write_text(sidecar.read_text().replace('"key": "', '"key": "0'))
    (output / "manifest.json").unlink()
    assert remade() == [first.name]


def test_a_changed_corpus_leaves_no_old_shard(folder, tmp_path):
    output = tmp_path / "out"
    corpus = write_corpus(tmp_path / "corpus")
    run(corpus, output)
    manifest = read_json(corpus / "manifest.json")
    manifest["shards"] = manifest["shards"][:1]
    write_json(corpus / "manifest.json", manifest)
    run(corpus, output)
    run(corpus, tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh")


def test_killed_at_any_moment_and_run_again(folder, tokens, tmp_path):
    """SIGKILL while the first file, the first shard is written, and after it; the end is the same
    bytes."""
    model = folder.parent / "t.model"
    model.write_text("model")
    command = [sys.executable, __file__, str(folder), str(model), str(tmp_path / "out")]
    for pattern in ("*.partial", "*.arrayrecord.partial", "*.arrayrecord.json"):
        slow = {**os.environ, "TEST_DELAY": "0.5", "PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(command, env=slow, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").glob(pattern)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out" / "manifest.json").exists()
    run(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tokens)


# --- bad input ---------------------------------------------------------------------------------


def test_records_are_filled_up_to_their_capacity():
    documents = [np.ones(n) for n in (3, 4, 3, 20, 1, 9)]
    sizes = [[len(d) for d in group] for group in cache.pack(documents, capacity=10)]
    assert sizes == [[3, 4, 3], [20], [1, 9]]
    assert list(cache.pack([], 10)) == []


def test_what_cannot_be_tokenized_is_a_dead_letter(folder, tokens, tmp_path):
    extra = (
        b"{not json", Document("a" * 32, "untokenizable \U0001f600" * 50, "code").to_bytes(),
        Document("b" * 32, "", "code").to_bytes(), b'{"id": "\xff"}',
        Document("c" * 32, "the last", "code").to_bytes(),
    )  # fmt: skip
    corpus = write_corpus(tmp_path / "corpus", extra)
    with pytest.raises(UserError, match=r"4 of 308 documents could not be tokenized.*dead_letters"):
        run(corpus, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = run(corpus, tmp_path / "out", max_dead_share=0.05)
    entry = manifest["splits"]["train"]["code"]
    assert (entry["documents"], entry["dead_letters"]) == (302, 4)
    name = writers.shard_name("train", "code", 0, 2)
    lines = writers.read_lines_zst(
        tmp_path / "out" / "dead_letters" / name.replace("arrayrecord", "jsonl.zst")
    )
    letters = [DeadLetter.from_bytes(line) for line in lines]
    assert {(letter.where, letter.reason) for letter in letters} == {
        (f"{name}#300", "not_a_document"), (f"{name}#301", "not_tokenized"),
        (f"{name}#302", "no_tokens"), (f"{name}#303", "not_a_document"),
    }  # fmt: skip
    by_reason = {letter.reason: letter for letter in letters}
    assert by_reason["not_tokenized"].detail == "no token for this text"
    assert len(by_reason["not_tokenized"].head) == 200
    found = TokenSource(tmp_path / "out", "train", "code")
    clean = TokenSource(tokens, "train", "code")
    assert found.doc(299).tolist() == clean.doc(299).tolist()
    assert found.doc(300).tolist() == [1, *(ord(c) + 3 for c in "the last"), 2]


def test_bad_input_is_one_line_and_leaves_no_manifest(folder, tmp_path):
    model = tmp_path / "t.model"
    model.write_text("model")

    def refused(match, corpus=folder, model=model, tokenizer=TOKENIZER, output=tmp_path / "out"):
        with pytest.raises(UserError, match=match) as error:
            cache.run(corpus, model, output, tokenizer=tokenizer)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out" / "manifest.json").exists()

    refused("cannot read the tokenizer", model=tmp_path / "none.model")
    refused("holds no complete corpus", corpus=tmp_path)
    refused("cannot be loaded", tokenizer="no.such.module:Tokenizer")
    with pytest.raises(UserError, match="must be at least 1"):
        run(folder, tmp_path / "out", tokens_per_record=0)
    assert not (tmp_path / "out").exists()
    refused("is the input folder itself", output=folder)
    refused("is a file", output=model)
    refused("holds no tokens", output=tmp_path)
    broken = write_corpus(tmp_path / "broken" / "corpus")
    shard = broken / "train-code-00000-of-00002.arrayrecord"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    refused("train-code-00000-of-00002.arrayrecord is not a whole", corpus=broken)
    manifest = json.loads((broken / "manifest.json").read_text())
    shard.write_bytes(whole)
    manifest["shards"][0]["documents"] = 7
    write_json(broken / "manifest.json", manifest)
    refused("holds 300 documents but its manifest says 7", corpus=broken)
    shard.unlink()
    refused("does not exist; run the job", corpus=broken)
