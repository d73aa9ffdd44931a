"""Losses of whole batches: packing, padding and batch size change nothing."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from internlm2_jax import sharding
from internlm2_jax.data.mixture import TokenDocuments
from internlm2_jax.data.packing import PackedSource
from internlm2_jax.data.pipeline import first_batches
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.train import objectives
from internlm2_jax.train.step import init_state, make_train_step

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


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_loss_of_each_source(z_loss):
    batch = first_batches(PackedSource(SOURCE, 20), 10**6, 8)[0]
    sources = np.array([0, 2, 2, 0, 2, 0, 0, 0], np.int32)
    options = {"z_loss": z_loss, "num_sources": 3}
    loss_fn = objectives.language_model_loss(MODEL, **options)
    loss, metrics = loss_fn(PARAMS, {**batch, "source": sources})
    found = objectives.by_source(metrics, ["code", "absent", "text"])
    assert found.keys() == {"tokens", "loss/code", "loss/absent", "loss/text"}
    assert np.isnan(found["loss/absent"])
    total = 0.0
    for number, name in ((0, "code"), (2, "text")):
        alone = {n: a[sources == number] for n, a in batch.items()}
        mean, own = objectives.language_model_loss(MODEL, z_loss)(PARAMS, alone)
        assert float(found[f"loss/{name}"]) == pytest.approx(float(mean), rel=1e-5)
        total += float(mean) * float(own["tokens"])
    assert total / float(metrics["tokens"]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("accumulate", "layout"),
    [
        (4, None),
        (1, "fsdp=2,context=2,tensor=2"),
        (2, "data=2,fsdp=4"),
    ],
)
@pytest.mark.slow
def test_loss_of_each_source_in_parts_and_on_a_mesh(accumulate, layout):
    rows = PackedSource(SOURCE, 16)
    batch = first_batches(rows, 10**6, 8)[0] | {"source": np.arange(8, dtype=np.int32) % 3}
    # More rows than documents fill: the last are empty, and parts weigh differently.
    loss_fn = objectives.language_model_loss(MODEL, num_sources=3)
    names = ["a", "b", "c"]
    expected = objectives.by_source(loss_fn(PARAMS, batch)[1], names)
    step = make_train_step(loss_fn, optax.sgd(0.1), accumulate=accumulate)
    with sharding.use(layout or ""):
        params = sharding.create(MODEL.init, MODEL.axes, jax.random.key(0))
        state = init_state(params, optax.sgd(0.1))
        if accumulate > 1 and layout:  # every part must divide over the devices
            batch = {n: np.concatenate([a, a]) for n, a in batch.items()}
        _, metrics = step(state, sharding.place_rows(batch))
    found = objectives.by_source(metrics, names)
    for name in names:
        assert float(found[f"loss/{name}"]) == pytest.approx(
            float(expected[f"loss/{name}"]), rel=1e-4
        )
