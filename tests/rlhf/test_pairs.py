"""Pairs in packed rows: nothing leaks between them, none is lost, batches hold constant tokens."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from internlm2_jax import sharding
from internlm2_jax.data.preferences import DOMAINS, unconditional
from internlm2_jax.errors import UserError
from internlm2_jax.losses.preference import RewardLoss
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.rlhf.pairs import PairSource, reward_ids
from internlm2_jax.rlhf.scoring import Scorer
from internlm2_jax.stages import RewardTraining
from internlm2_jax.train.objectives import reward_model_loss

MESSAGES = [{"role": "user", "content": "What is 1 + 1?"}]
LENGTH = 320


def pair(domain, chosen, rejected, **more):
    return {"domain": domain, "messages": MESSAGES, "chosen": chosen, "rejected": rejected, **more}


PAIRS = [
    pair(domain, "two " * (1 + n % 3), "three " * (1 + n % 5), margin=float(1 + n % 3))
    for n, domain in enumerate([*DOMAINS, *DOMAINS])
]


@pytest.fixture(scope="module")
def source(vocabulary):
    return PairSource(PAIRS, vocabulary, LENGTH)


@pytest.fixture(scope="module")
def model(vocabulary):
    cfg = dataclasses.replace(
        preset("tiny"), vocab_size=vocabulary.vocab_size, initializer_range=0.2
    )
    model = build(cfg, head="scalar")
    return model, model.init(jax.random.key(0))


def batch_of(source):
    rows = [source[i] for i in range(len(source))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_every_pair_is_in_one_row_and_ends_in_the_reward_token(source, vocabulary):
    batch, found = batch_of(source), []
    assert batch["tokens"].shape == (len(source), LENGTH)
    for row in range(len(source)):
        segments = batch["segment_ids"][row]
        for place in np.flatnonzero(batch["pairs"][row]):
            sides = []
            for name in ("chosen_at", "rejected_at"):
                inside = segments == segments[batch[name][row, place]]
                ids = batch["tokens"][row][inside].tolist()
                assert np.flatnonzero(inside)[-1] == batch[name][row, place]
                assert ids[-1] == vocabulary.reward_id and ids.count(vocabulary.reward_id) == 1
                assert batch["positions"][row][inside].tolist() == list(range(len(ids)))
                sides.append(tuple(ids))
            found.append((*sides, float(batch["margins"][row, place])))
    expected = [
        (*(tuple(reward_ids(vocabulary, p["domain"], MESSAGES, p[side]))
           for side in ("chosen", "rejected")), p["margin"])
        for p in PAIRS
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)
    assert len(source) < len(PAIRS)  # they were packed


def test_a_packed_batch_has_the_loss_of_its_pairs_alone(source, model, vocabulary):
    network, params = model
    scores = Scorer(network, vocabulary, LENGTH // 2)(
        params, [(p["domain"], MESSAGES, p[side]) for side in ("chosen", "rejected") for p in PAIRS]
    )
    loss = RewardLoss(ranking="margin")
    margins = np.array([p["margin"] for p in PAIRS])
    expected, metrics = loss(*np.split(scores, 2), margins=margins)
    packed = jax.jit(reward_model_loss(network, loss))
    got, found = packed(params, batch_of(source))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert found["pairs"] == len(PAIRS)
    np.testing.assert_allclose(found["margin"], metrics["margin"], rtol=1e-4, atol=1e-6)


def test_eight_devices_give_the_same_loss(source, model):
    network, params = model
    batch = batch_of(source)
    batch = {name: np.concatenate([x] * 8)[:8] for name, x in batch.items()}
    loss = reward_model_loss(network, RewardLoss())
    alone = jax.jit(loss)(params, batch)[0]
    with sharding.use("data=2,fsdp=2,tensor=2"):
        placed = sharding.place(params, network.axes)
        together = jax.jit(loss)(placed, sharding.place_rows(batch))[0]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_too_long_pairs_are_counted_dropped_or_cut(vocabulary):
    rows = [pair("maths", "2", "3"), pair("maths", "2", "word " * 200)]
    source = PairSource(rows, vocabulary, LENGTH)
    assert (len(source.pairs), source.too_long) == (1, 1)
    cut = PairSource(rows, vocabulary, LENGTH, too_long="cut")
    assert (len(cut.pairs), cut.too_long) == (2, 1)
    longest = max(np.bincount(cut[row]["segment_ids"])[1:].max() for row in range(len(cut)))
    assert longest == LENGTH // 2
    with pytest.raises(UserError, match="no preference pair of 1 fits 160 tokens"):
        PairSource(rows[1:], vocabulary, LENGTH)
    # Cut to the same tokens, two answers are no pair.
    same = [pair("maths", "word " * 200 + "yes", "word " * 200 + "no")]
    with pytest.raises(UserError, match="no preference pair"):
        PairSource(same, vocabulary, LENGTH, too_long="cut")
    with pytest.raises(UserError, match="less than two sequences of max_length 200"):
        PairSource(rows, vocabulary, LENGTH, max_length=200)


def test_the_system_prompt_is_the_only_difference(vocabulary):
    with_prompt = reward_ids(vocabulary, "code", MESSAGES, "2")
    without = reward_ids(vocabulary, "code", MESSAGES, "2", unconditional())
    assert DOMAINS["code"] in vocabulary.decode(with_prompt)
    assert with_prompt[-len(without) + 1 :] == without[1:]
    with pytest.raises(UserError, match="no preference domain 'poetry'; this reward model has"):
        reward_ids(vocabulary, "poetry", MESSAGES, "2")


def test_a_patch_may_have_no_pair_that_fits(vocabulary):
    """Equal up to the cut: the stage asks before it makes a source, which refuses to be empty."""
    training = RewardTraining(
        learning_rate=1e-3, row_length=LENGTH, tokens_per_batch=LENGTH, too_long="cut"
    )
    same = pair("helpful", "two " * LENGTH + "a", "two " * LENGTH + "b")
    assert [training.fits(p, vocabulary, DOMAINS) for p in (same, PAIRS[0])] == [False, True]
    with pytest.raises(UserError, match="no preference pair of 1 fits"):
        training.source([same], vocabulary, DOMAINS)
