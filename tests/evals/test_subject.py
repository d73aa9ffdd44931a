"""Likelihoods against the full forward pass; answers; what is cut."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.evals.subject import Subject
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import Model

_logits = jax.jit(Model.logits, static_argnums=0)


def oracle(subject, head, tail):
    """Log-probability of a continuation from logits of all positions, in float64."""
    ids = np.zeros((1, 96), np.int32)
    ids[0, : len(head) + len(tail)] = [*head, *tail]
    logits = np.asarray(_logits(subject.model, subject.params, ids), np.float64)[0]
    shifted = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    at = range(len(head) - 1, len(head) + len(tail) - 1)
    greedy = all(logits[i].argmax() == ids[0][i + 1] for i in at)
    return sum(shifted[i, ids[0][i + 1]] for i in at), greedy


def _greedy(subject, head, count):
    ids = np.zeros((1, 96), np.int32)
    ids[0, : len(head)] = head
    for n in range(len(head), len(head) + count):
        ids[0, n] = np.argmax(_logits(subject.model, subject.params, ids)[0, n - 1])
    return ids[0, len(head) : len(head) + count].tolist()


def test_likelihoods_are_those_of_the_full_forward_pass(subject):
    heads = [subject.encode(text) for text in ("Question: why?\nAnswer:", "x", "def f():" * 4)]
    tails = [[subject.tokenizer.encode(t) for t in (" because it is", " no")],
             [[7], [8], [9]], [subject.tokenizer.encode("return " * 20)]]  # fmt: skip
    heads.append(heads[1])
    tails.append([_greedy(subject, heads[1], 3)])
    asked = list(zip(heads, tails, strict=True))
    found = dict(subject.likelihoods(asked))
    for i, (head, many) in enumerate(asked):
        for likely, tail in zip(found[i], many, strict=True):
            logprob, said = oracle(subject, head, tail)
            assert likely.logprob == pytest.approx(logprob, abs=2e-4) and likely.greedy == said
    assert found[3][0].greedy


def test_logprobs_of_texts(subject):
    asked = [("Question: why?\nAnswer:", [" because it is", " no"]), ("x", ["y"])]
    found = subject.logprobs(asked)
    for (text, tails), logprobs in zip(asked, found, strict=True):
        wanted = [
            oracle(subject, subject.encode(text), subject.tokenizer.encode(tail))[0]
            for tail in tails
        ]
        np.testing.assert_allclose(logprobs, wanted, rtol=1e-5)


def test_a_likelihood_is_the_same_in_any_company(subject):
    rng = np.random.default_rng(0)
    asked = [
        (rng.integers(3, 400, n).tolist(), [rng.integers(3, 400, m).tolist()])
        for n, m in zip(rng.integers(1, 48, 24), rng.integers(9, 16, 24), strict=True)
    ]
    together = dict(subject.likelihoods(asked))
    for i in (0, 5, 23):
        assert dict(subject.likelihoods([asked[i]]))[0] == together[i]


def test_answers_end_where_they_are_told_to(subject):
    prompt = subject.encode("def")
    ((_, whole),) = subject.answers([prompt], max_new_tokens=24, sampling=Sampling(0.0))
    assert not whole.finished and len(whole.tokens) == 24
    stop = whole.text[8:11]
    ((_, short),) = subject.answers(
        [prompt], max_new_tokens=24, sampling=Sampling(0.0), stop=[(stop,)]
    )
    assert short.text == whole.text[: whole.text.index(stop)] and short.finished


def test_any_part_of_an_evaluation_is_answered_as_the_whole_is(subject):
    prompts = [subject.encode(f"def f{i}(x):") for i in range(11)]  # more than the queue takes
    settings = {"max_new_tokens": 24, "sampling": Sampling(0.9)}
    sizes = (len(prompts), max(map(len, prompts)), 24)
    whole = dict(
        subject.answers(prompts, seeds=[(3, i) for i in range(11)], sizes=sizes, **settings)
    )
    assert sorted(whole) == list(range(11)) and len({said.text for said in whole.values()}) > 5
    part = [9, 2]
    again = dict(
        subject.answers(
            [prompts[i] for i in part], seeds=[(3, i) for i in part], sizes=sizes, **settings
        )
    )
    assert [again[n] for n in range(2)] == [whole[i] for i in part]


def test_long_prompts_lose_their_left_or_middle(subject):
    ids = list(range(2000))
    left, cut = subject.cut(ids, 24, "left")
    assert cut and len(left) == 1000 and left[:2] == [0, 1001] and left[-1] == 1999
    middle, _ = subject.cut(ids, 24, "middle")
    assert middle == [*range(500), *range(1500, 2000)]
    assert subject.cut(ids[:1000], 24, "left") == (ids[:1000], False)
    with pytest.raises(UserError, match="leave no room for a question"):
        subject.cut(ids, 1023, "left")


def test_a_length_that_the_model_has_not_is_refused(subject):
    if subject.model.cfg.length_limit is None:
        pytest.skip("this model's rotation has no limit")
    with pytest.raises(UserError, match="passes the model's"):
        Subject(subject.model, subject.params, subject.tokenizer, max_length=10**6)
