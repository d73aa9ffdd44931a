"""Measures of an arm: losses per byte against a plain sum, script, funnel, speed."""

from __future__ import annotations

import math
import shutil

import jax
import pytest

from internlm2_jax import files
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.stages import measure, tokenizer
from internlm2_jax.train.checkpoint import Checkpoints, save_model_json

TEXTS = {
    "text": ["A first document, of one line.", "Another\none.", "春眠不觉晓，处处闻啼鸟。"],
    "code": ["def f(x):\n    return x + 1\n"],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(vocabulary, tmp_path_factory):
    from data_beam.io import writers
    from data_beam.schema import Document

    folder = tmp_path_factory.mktemp("run")
    base = tmp_path_factory.getbasetemp()
    (folder / "tokenizer").mkdir()
    found = sorted(base.glob("vocabulary*/tokenizer.model"))[0]
    shutil.copyfile(found, folder / "tokenizer" / "tokenizer.model")
    rows = []
    for split in ("train", "validation"):
        for source, texts in TEXTS.items():
            name = writers.shard_name(split, source, 0, 1)
            records = [Document(f"{i:032x}", t, source).to_bytes() for i, t in enumerate(texts)]
            path = folder / "corpus" / "corpus" / name
            writers.write_array_record(path, records, writers.DOCUMENTS_OPTIONS)
            rows.append({"name": name, "split": split, "source": source, "documents": len(texts)})
    inner = folder / "corpus" / "corpus"
    files.write_json(
        inner / "manifest.json", {"kind": "corpus", "fingerprint": "f", "shards": rows}
    )
    stages = [
        {"stage": "read", "bytes_in": 100, "bytes_out": 100},
        {"stage": "filter", "bytes_in": 100, "bytes_out": 80},
        {"stage": "exact_dedup", "bytes_in": 80, "bytes_out": 60},
    ]
    files.write_json(inner / "funnel.json", {"stages": stages})
    cfg = preset("tiny", vocab_size=vocabulary.vocab_size, max_position_embeddings=64)
    with Checkpoints(folder / "model") as checkpoints:
        checkpoints.save(1, {"params": build(cfg).init(jax.random.key(0))})
    save_model_json(folder / "model", cfg, "lm")
    return folder


def measured(run, **options):
    given = {"corpus": run / "corpus", "arm": "a"}
    measure(
        run / "out", model=run / "model", tokenizer=run / "tokenizer", **{**given, **options}
    )  # fmt: skip
    return files.read_json(run / "out" / "result.json")["measures"]


def test_bits_per_byte_are_those_of_all_tokens(run):
    found = measured(run, funnel=run / "corpus")
    vocabulary = Tokenizer.load(run / "tokenizer" / "tokenizer.model")
    everything = [text for texts in TEXTS.values() for text in texts]
    tokens = sum(len(vocabulary.encode(text)) + 1 for text in everything)  # </s> is predicted too
    num_bytes = sum(len(text.encode()) for text in everything)
    assert found["bytes_per_token"] == pytest.approx(num_bytes / tokens)
    # A model that has learnt nothing gives each piece about the same probability.
    assert found["loss"] == pytest.approx(math.log(vocabulary.vocab_size), rel=0.01)
    wanted = found["loss"] * tokens / num_bytes / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(wanted)
    assert {"loss/text", "loss/code"} <= found.keys()
    assert (found["dropped/filter"], found["dropped/exact_dedup"]) == pytest.approx((0.2, 0.25))
    assert found["kept_bytes"] == 60 and "dropped/read" not in found


def test_scripts_and_speed(run):
    found = measured(run, by_script=True, decode=(2, 8, 4))
    assert {"loss/chinese", "loss/other"} <= found.keys() and "loss/text" not in found
    chinese = len(TEXTS["text"][2].encode())
    vocabulary = Tokenizer.load(run / "tokenizer" / "tokenizer.model")
    assert found["bytes_per_token/chinese"] == pytest.approx(
        chinese / (len(vocabulary.encode(TEXTS["text"][2])) + 1)
    )
    assert found["cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 4  # k and v, layers, heads, H, bytes
    assert found["decode_tokens_per_second"] > 0


def test_a_corpus_without_chinese_is_refused(run, monkeypatch):
    module = __import__("sys").modules["internlm2_jax.stages.measure"]
    monkeypatch.setattr(module, "_chinese", lambda text: 0.0)
    with pytest.raises(UserError, match="--corpus DIR"):
        measured(run, by_script=True)


def test_a_tokenizer_that_is_given_is_taken(run, tmp_path):
    given = run / "tokenizer" / "tokenizer.model"
    tokenizer(tmp_path, corpus=run / "corpus", model=run / "tokenizer")
    assert (tmp_path / "tokenizer.model").read_bytes() == given.read_bytes()
    manifest = files.read_json(tmp_path / "tokens" / "manifest.json")
    assert set(manifest["splits"]) == {"train", "validation"}
    with pytest.raises(UserError, match="one of them"):
        tokenizer(tmp_path, corpus=run / "corpus", model=run / "tokenizer", vocab_size=512)
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        tokenizer(tmp_path / "other", corpus=run / "corpus", model=tmp_path / "no.model")
