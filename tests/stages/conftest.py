"""Stage folders that several stages start from: a tokenizer with tokens, a tiny model."""

from __future__ import annotations

import shutil

import jax
import pytest
from token_folder import random_documents, write_tokens

from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.train.checkpoint import save_model


@pytest.fixture(scope="session")
def tokenizer_stage(vocabulary, tmp_path_factory):
    """A finished tokenizer stage; the sources code, text and stem."""
    folder, size = tmp_path_factory.mktemp("tokenizer_stage"), vocabulary.vocab_size
    sources = {
        "code": random_documents(0, 100, 60, size),
        "text": random_documents(1, 60, 200, size),
        "stem": random_documents(2, 40, 30, size),
    }
    validation = {"code": random_documents(3, 10, 60, size)}
    write_tokens(
        folder / "tokens", {"train": sources, "validation": validation},
        vocab_size=size, sha256=vocabulary.sha256,
    )  # fmt: skip
    base = tmp_path_factory.getbasetemp()
    path = next(  # the `vocabulary` fixture keeps the file
        p
        for p in base.glob("vocabulary*/tokenizer.model")
        if Tokenizer.load(p).sha256 == vocabulary.sha256
    )
    shutil.copyfile(path, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def base_stage(vocabulary, tmp_path_factory):
    """A tiny model as the stage before would have left it."""
    cfg = preset("tiny", vocab_size=vocabulary.vocab_size, initializer_range=0.2)
    folder, model = tmp_path_factory.mktemp("base_stage"), build(cfg)
    save_model(folder, cfg, "lm", model.init(jax.random.key(0)))
    return folder
