"""Documents of a corpus folder come back in order; a damaged shard is one line."""

from __future__ import annotations

import pytest
from raw_folder import write_folder

from data_beam.pipelines import corpus
from internlm2_jax.data import documents
from internlm2_jax.errors import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    corpus.run(folder / "out", corpus=write_folder(folder / "raw"))
    return folder / "out/corpus"


def test_every_document_of_a_split_once(built):
    rows = {split: list(documents.read(built, split)) for split in ("train", "validation")}
    assert {r.source for r in rows["train"]} >= {"code", "text"}
    paths = [r.path for split in rows.values() for r in split]
    assert len(paths) > 50
    texts = [r.text for split in rows.values() for r in split]
    assert len(set(texts)) == len(texts)
    assert rows["train"] == list(documents.read(built, "train"))


def test_a_damaged_shard_is_named(built, tmp_path):
    import shutil

    folder = shutil.copytree(built, tmp_path / "corpus")
    shard = sorted(folder.glob("train-text-*"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(UserError, match=r"train-text-.*is damaged; make the corpus again") as error:
        list(documents.read(folder, "train"))
    assert "\n" not in str(error.value)


def test_no_corpus(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json does not exist"):
        list(documents.read(tmp_path, "train"))
