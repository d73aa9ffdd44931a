"""Text to tokens and back through the files, with a tokenizer of the Unicode code points."""

import json
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordReader

from data_beam import cache
from data_beam.io import corpus_folder, writers
from data_beam.schema import Document
from internlm2_jax.data.records import unpack_record
from internlm2_jax.errors import UserError
from internlm2_jax.files import write_json


class CodePoints:
    """Stands in for the SentencePiece tokenizer: ids are code points + 3."""

    vocab_size, bos_id, eos_id, sha256 = 0x110003, 1, 2, "of the stand-in"

    @classmethod
    def load(cls, path: Path) -> "CodePoints":
        if not path.is_file():
            raise UserError(f"cannot read the tokenizer {path}")
        return cls()

    def encode(self, text: str) -> list[int]:
        return [ord(character) + 3 for character in text]


TOKENIZER = f"{__name__}:CodePoints"


def write_corpus(folder: Path) -> Path:
    """A small corpus folder, as the corpus job leaves it; the third shard is empty."""
    folder.mkdir()
    rows = []
    shards = [("train", "code", 0, 300), ("train", "code", 1, 1), ("train", "text", 0, 0)]
    for split, source, shard, count in [*shards, ("validation", "code", 0, 2)]:
        name = writers.shard_name(split, source, shard, 2)
        texts = [f"{split} {source} {shard}:{n} 中文 " + "x" * (n * 37 % 900) for n in range(count)]
        records = [Document(f"{n:032x}", text, source).to_bytes() for n, text in enumerate(texts)]
        writers.write_array_record(folder / name, records, writers.DOCUMENTS_OPTIONS)
        rows.append({"name": name, "split": split, "source": source, "documents": count})
    write_json(folder / "manifest.json", {"kind": "corpus", "fingerprint": "f", "shards": rows})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("cache") / "corpus")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "t.model"
    path.write_text("model")
    return path


def test_tokens_are_the_documents_in_order(folder, model, tmp_path):
    output = tmp_path / "tokens"
    manifest = cache.run(folder, model, output, tokenizer=TOKENIZER)
    assert manifest == json.loads((output / "manifest.json").read_text())
    assert (manifest["tokenizer_sha256"], manifest["vocab_size"]) == ("of the stand-in", 0x110003)
    assert set(manifest["splits"]["train"]) == {"code"}  # no entry, no shard for no documents
    for split in ("train", "validation"):
        entry = manifest["splits"][split]["code"]
        records = []
        for name in entry["shards"]:
            reader = ArrayRecordReader(str(output / name))
            records += reader.read_all()
            reader.close()
        tokens = [document for record in records for document in unpack_record(record)]
        texts = [document.text for document in corpus_folder.documents(folder, split, "code")]
        assert [d.tolist() for d in tokens] == [[1, *CodePoints().encode(t), 2] for t in texts]
        assert entry["documents"] == len(texts)
        assert entry["tokens"] == sum(map(len, tokens))
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert all(sum(map(len, unpack_record(r))) <= cache.TOKENS_PER_RECORD for r in records)
    again = tmp_path / "again"
    cache.run(folder, model, again, tokenizer=TOKENIZER)
    for path in output.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_records_are_filled_up_to_their_capacity():
    documents = [[1] * n for n in (3, 4, 3, 20, 1, 9)]
    sizes = [[len(d) for d in unpack_record(r)] for r in cache.pack(documents, capacity=10)]
    assert sizes == [[3, 4, 3], [20], [1, 9]]
    assert cache.pack([]) == []


def test_bad_input_is_one_line_and_leaves_nothing(folder, model, tmp_path):
    def refused(match, corpus=folder, model=model, tokenizer=TOKENIZER):
        with pytest.raises(UserError, match=match) as error:
            cache.run(corpus, model, tmp_path / "out", tokenizer=tokenizer)
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("out*"))

    refused("cannot read the tokenizer", model=tmp_path / "none.model")
    refused("holds no corpus", corpus=tmp_path)
    refused("cannot be loaded", tokenizer="no.such.module:Tokenizer")
    broken = write_corpus(tmp_path / "broken")
    shard = broken / "train-code-00000-of-00002.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:1000])
    refused("train-code-00000-of-00002.arrayrecord is not a whole", corpus=broken)
    shard.unlink()
    refused("does not exist; run the job", corpus=broken)
