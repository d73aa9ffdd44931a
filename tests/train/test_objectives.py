"""Losses of whole batches: packing, padding and batch size change nothing."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from internlm2_jax.data.mixture import TokenDocuments
from internlm2_jax.data.packing import PackedSource
from internlm2_jax.data.pipeline import first_batches
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.train import objectives

MODEL = build(preset("tiny"))
PARAMS = MODEL.init(jax.random.key(0))
RNG = np.random.default_rng(0)
LENGTHS = np.array([5, 17, 9, 30, 12, 3])
SOURCE = TokenDocuments(RNG.integers(3, 250, LENGTHS.sum()), LENGTHS)


def loss_of(row_length, batch_size):
    batches = first_batches(PackedSource(SOURCE, row_length), 10**6, batch_size)
    return objectives.evaluate_loss(MODEL)(PARAMS, batches)


def test_packed_equals_each_document_alone():
    total = weight = 0.0
    start = 0
    for length in LENGTHS:
        alone = TokenDocuments(SOURCE.tokens[start : start + length], np.array([length]))
        batches = first_batches(PackedSource(alone, 32), 10**6, 1)
        total += objectives.evaluate_loss(MODEL)(PARAMS, batches) * (length - 1)
        weight += length - 1
        start += length
    assert loss_of(64, 2) == pytest.approx(total / weight, abs=1e-5)


def test_row_length_and_batch_size_change_nothing():
    assert loss_of(40, 1) == pytest.approx(loss_of(80, 8), abs=1e-5)


def test_training_loss_is_the_evaluation_loss():
    batch = first_batches(PackedSource(SOURCE, 40), 10**6, 8)[0]
    loss, metrics = objectives.language_model_loss(MODEL)(PARAMS, batch)
    assert float(loss) == pytest.approx(loss_of(40, 8), abs=1e-5)
    assert float(metrics["tokens"]) == (LENGTHS - 1).sum()


def test_scores_are_read_at_the_last_token():
    model = build(preset("tiny"), head="scalar")
    params = model.init(jax.random.key(1))
    tokens = RNG.integers(3, 250, (3, 12)).astype(np.int32)
    lengths = np.array([4, 12, 7], np.int32)
    scores = objectives.scores_at(model, params, tokens, lengths)
    for row, length in enumerate(lengths):
        alone = model.scores(params, tokens[row : row + 1, :length])[0, -1]
        assert float(scores[row]) == pytest.approx(float(alone), abs=1e-5)
