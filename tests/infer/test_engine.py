"""The engine against the plain forward pass, and its promises: rows, buckets, limits, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.infer import cache as kv
from internlm2_jax.infer import engine, programs
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.models.rope_scaling import DynamicNTK

CFG = preset("tiny", initializer_range=0.2)
PROMPTS = [[5, 6, 7], [9] * 11, [1], [200, 100, 50, 25, 12]]
GREEDY, PLAIN = Sampling(0.0), Sampling(1.0)


@pytest.fixture(scope="module")
def model():
    return build(CFG)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def logprobs_of(model):
    """Trainer's view: log-probabilities of a row's tokens, from one full forward pass."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, params, row, length):
        logits = model.logits(params, row[None], rope_length=length[None])
        return jax.nn.log_softmax(logits[0])

    def get(params, prompt, response, model=model, length=32):
        row = np.zeros(32, np.int32)
        whole = [*prompt, *response]
        row[: len(whole)] = whole
        table = run(model, params, row, jnp.int32(length))
        return np.asarray(table)[len(prompt) - 1 : len(whole) - 1]

    return get


@pytest.mark.parametrize(
    "sampling", [GREEDY, PLAIN, Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8)]
)
def test_logprobs_equal_the_forward_pass(model, params, logprobs_of, sampling):
    out = engine.generate(model, params, PROMPTS, max_new_tokens=16, sampling=sampling, seed=4)
    for prompt, tokens, logprobs, done in zip(
        PROMPTS, out.tokens, out.logprobs, out.finished, strict=True
    ):
        assert len(tokens) == len(logprobs) == 16 and not done
        table = logprobs_of(params, prompt, tokens)
        np.testing.assert_allclose(logprobs, table[np.arange(16), tokens], atol=1e-5, rtol=0)
        if sampling.greedy:
            assert tokens == table.argmax(axis=1).tolist()
        if sampling.top_k:
            ranks = (table > table[np.arange(16), tokens][:, None]).sum(axis=1)
            assert ranks.max() < sampling.top_k


def test_dynamic_ntk_is_pinned_to_the_longest_length(logprobs_of):
    """A row that crosses max_position_embeddings has one rotation throughout: its limit's."""
    cfg = preset(
        "tiny", initializer_range=0.2, rope_scaling=DynamicNTK(2.0), max_position_embeddings=8
    )
    model = build(cfg)
    params = model.init(jax.random.key(0))
    out = engine.generate(model, params, PROMPTS, max_new_tokens=14, sampling=GREEDY)
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        table = logprobs_of(params, prompt, tokens, model, len(prompt) + 14)
        assert tokens == table.argmax(axis=1).tolist()
        np.testing.assert_allclose(logprobs, table.max(axis=1), atol=1e-5, rtol=0)


def test_batch_mates_change_nothing(model, params):
    settings = {"max_new_tokens": 16, "sampling": PLAIN, "seed": 11}
    together = engine.generate(model, params, PROMPTS, **settings)
    wide = engine.generate(model, params, PROMPTS, pad_to=40, **settings)
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate(model, params, [prompt], rows=[i], **settings)
        for other in (together, wide):
            assert alone.tokens[0] == other.tokens[i]
            np.testing.assert_allclose(alone.logprobs[0], other.logprobs[i], atol=1e-5)
    shorter = engine.generate(model, params, PROMPTS, **{**settings, "max_new_tokens": 5})
    assert shorter.tokens == [tokens[:5] for tokens in together.tokens]


def test_seeds_and_rows_differ(model, params):
    def run(seed, prompts):
        return engine.generate(
            model, params, prompts, max_new_tokens=16, sampling=PLAIN, seed=seed
        ).tokens

    same = run(0, [[3, 4]] * 4)
    assert len({tuple(tokens) for tokens in same}) == 4
    assert run(0, [[3, 4]] * 4) == same
    assert run(1, [[3, 4]] * 4) != same


def test_stopping(model, params):
    free = engine.generate(model, params, PROMPTS, max_new_tokens=16, sampling=PLAIN)
    stops = (free.tokens[0][4], free.tokens[1][7])
    out = engine.generate(model, params, PROMPTS, max_new_tokens=16, sampling=PLAIN, stop_ids=stops)
    for full, tokens, logprobs, done in zip(
        free.tokens, out.tokens, out.logprobs, out.finished, strict=True
    ):
        at = next((i for i, token in enumerate(full) if token in stops), None)
        assert tokens == (full if at is None else full[: at + 1])
        assert len(logprobs) == len(tokens) and done == (at is not None)
    assert out.finished[0] and out.finished[1]


def test_steady_state_compiles_nothing(model, params):
    def run(prompts, sampling, limit, seed, stops):
        return engine.generate(
            model,
            params,
            prompts,
            max_new_tokens=limit,
            sampling=sampling,
            seed=seed,
            stop_ids=stops,
        )

    run(PROMPTS, Sampling(1.0, top_p=0.9), 16, 0, ())
    before = programs.num_compiled()
    run(PROMPTS[:3], Sampling(0.5, top_p=0.7), 9, 1, (2,))  # 3 rows use the program for 4
    run([[7] * 15, *PROMPTS[1:]], Sampling(2.0, top_p=0.5), 12, 2, (2, 3, 4))
    assert programs.num_compiled() == before
    run([[7] * 17, *PROMPTS[1:]], Sampling(2.0, top_p=0.5), 12, 2, (2, 3, 4))
    # the next bucket of prompt lengths: another program
    assert programs.num_compiled() > before


def test_buckets():
    assert [kv.bucket(n) for n in (1, 16, 17, 24, 25, 33, 1000)] == [16, 16, 24, 24, 32, 48, 1024]
    assert [kv.bucket(n, smallest=1) for n in (1, 2, 3, 4, 5, 64)] == [1, 2, 3, 4, 6, 64]
    for kind in kv.KINDS:
        cache = kv.empty(CFG, 10, jnp.zeros(3, jnp.int32), kind)
        assert sum(x.nbytes for x in cache.pages) == 30 * kv.bytes_per_token(CFG, kind)


@pytest.mark.parametrize(
    ("prompts", "limit", "message"),
    [
        ([[1], []], 4, "prompt 1 is empty"),
        ([[1], [256]], 4, "prompt 1 has id 256, outside the vocabulary of 256"),
        ([[-1]], 4, "prompt 0 has id -1"),
        ([[1]], 0, "max_new_tokens is 0"),
        ([[1] * 500], 13, "500 tokens; with 13 new .* 512 positions; shorten"),
    ],
)
def test_bad_requests(model, params, prompts, limit, message):
    with pytest.raises(UserError, match=message):
        engine.generate(model, params, prompts, max_new_tokens=limit, sampling=GREEDY)


def test_no_prompts(model, params):
    out = engine.generate(model, params, [], max_new_tokens=4, sampling=GREEDY)
    assert (out.tokens, out.logprobs, out.finished) == ([], [], [])
