"""Pairs become padded rows that end in the reward token; scores do not depend on batch-mates."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from internlm2_jax.data.preferences import DOMAINS
from internlm2_jax.errors import UserError
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.rlhf import scoring

MESSAGES = [{"role": "user", "content": "What is 1 + 1?"}]
LENGTH = 160


def pair(domain, chosen, rejected, pair_id="p"):
    return {
        "domain": domain,
        "messages": MESSAGES,
        "chosen": chosen,
        "rejected": rejected,
        "pair_id": pair_id,
    }


@pytest.fixture(scope="module")
def model(vocabulary):
    cfg = dataclasses.replace(preset("tiny"), vocab_size=vocabulary.vocab_size)
    model = build(cfg, head="scalar")
    return model, model.init(jax.random.key(0))


def test_rows_end_in_the_reward_token(vocabulary):
    row = scoring.PairSource([pair("maths", "2", "three")], vocabulary, LENGTH)[0]
    for side in ("chosen", "rejected"):
        end = int(row[f"{side}_length"])
        assert row[side][end - 1] == vocabulary.reward_id
        assert (row[side][:end] == vocabulary.reward_id).sum() == 1
        text = vocabulary.decode(row[side][:end].tolist())
        assert DOMAINS["maths"] in text


def test_too_long_pairs_are_counted_and_none_left_is_an_error(vocabulary):
    rows = [pair("maths", "2", "3"), pair("maths", "2", "word " * 200)]
    source = scoring.PairSource(rows, vocabulary, LENGTH)
    assert (len(source), source.too_long) == (1, 1)
    with pytest.raises(UserError, match="no preference pair of 1 fits 160 tokens"):
        scoring.PairSource(rows[1:], vocabulary, LENGTH)


def test_scores_do_not_depend_on_batch_or_padding(model, vocabulary):
    network, params = model
    asked = [("helpful", MESSAGES, "two " * n) for n in range(1, 6)]
    whole = scoring.Scorer(network, vocabulary, LENGTH, batch_size=8)(params, asked)
    single = scoring.Scorer(network, vocabulary, LENGTH + 40, batch_size=2)(params, asked)
    np.testing.assert_allclose(whole, single, atol=1e-5)


def test_the_system_prompt_reaches_the_score(model, vocabulary):
    network, params = model
    scorer = scoring.Scorer(network, vocabulary, LENGTH)
    scores = scorer(params, [(domain, MESSAGES, "2") for domain in DOMAINS])
    assert len(set(scores.tolist())) == len(DOMAINS)


def test_an_over_long_response_is_cut_before_the_reward_token(model, vocabulary):
    network, params = model
    scorer = scoring.Scorer(network, vocabulary, LENGTH)
    long = scorer(params, [("maths", MESSAGES, "word " * 300)])
    assert np.isfinite(long).all()


def test_accuracy_counts_ties_half():
    assert scoring.accuracy(np.array([[1, 0], [0, 1], [2, 2], [3, 1]])) == 0.625


def test_flips_are_counted_only_where_both_prompts_are_right(vocabulary):
    """A scorer that always obeys the prompt on pair 0 and never listens on pair 1."""

    class Fixed:
        def pairs(self, params, rows):
            good = {("helpful", "0"): 1, ("harmless", "0"): 1, ("helpful", "1"): 1}
            return np.array([[good.get((r["domain"], r["pair_id"]), 0), 0.5] for r in rows])

    rows = [
        pair(domain, *(("yes", "no") if domain == "helpful" else ("no", "yes")), pair_id)
        for domain in ("helpful", "harmless")
        for pair_id in ("0", "1")
    ]
    rows.append(pair("helpful", "a", "b", "not a conflict"))
    measured = scoring.measure_domains(Fixed(), None, rows)
    assert measured["flip"] == {
        "pairs": 2,
        "flipped_share": 0.5,
        "accuracy_helpful": 1.0,
        "accuracy_harmless": 0.5,
    }
    assert measured["accuracy"]["harmless"] == 0.5
