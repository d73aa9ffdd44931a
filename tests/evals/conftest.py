"""A tiny model under test, and small data sets in the formats of the public ones."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from internlm2_jax.evals.subject import Subject
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset


@pytest.fixture(scope="session")
def subject(vocabulary):
    cfg = dataclasses.replace(
        preset("tiny", initializer_range=0.2), vocab_size=vocabulary.vocab_size,
        max_position_embeddings=1024,
    )  # fmt: skip
    model = build(cfg)
    params = jax.jit(model.init)(jax.random.key(0))
    return Subject(model, params, vocabulary, row_tokens=1024, slots=4)
