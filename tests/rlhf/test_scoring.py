"""Scores do not depend on batch-mates; how pairs, conflicts and confidence are counted."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from internlm2_jax.data.preferences import DOMAINS
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
        domains = DOMAINS

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


def test_confidence_is_held_against_the_share_right():
    """Four pairs of confidence 0.95 of which three are right, two of 0.55 of which one is."""

    def margins(confidence, *signs):
        return np.log(confidence / (1 - confidence)) * np.array(signs)

    margin = np.concatenate([margins(0.95, 1, 1, 1, -1), margins(0.55, 1, -1)])
    found = scoring.calibration(np.stack([margin, np.zeros(6)], axis=1))
    assert [(b["pairs"], b["accuracy"]) for b in found["bins"]] == [(2, 0.5), (4, 0.75)]
    assert [b["confidence"] for b in found["bins"]] == pytest.approx([0.55, 0.95])
    assert found["error"] == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)


def test_system_prompts_stay_with_their_model(tmp_path):
    assert scoring.load_domains(tmp_path) == DOMAINS
    scoring.save_domains(tmp_path, {"code": "Does it run?"})
    assert scoring.load_domains(tmp_path) == {"code": "Does it run?"}
