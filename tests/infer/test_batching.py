"""Continuous batching: who shares the batch, the cache and the weights changes no other request."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.infer.engine import Engine, EngineConfig, Request
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.models.rope_scaling import DynamicNTK

CFG = preset("tiny", initializer_range=0.2)
SIZES = EngineConfig(slots=4, max_length=96, page=8, prefill=((4, 8),), steps=8, steps_shared=3)
SEVERAL = dataclasses.replace(SIZES, prefill=((1, 8), (4, 8), (1, 16)))
RANDOM = np.random.default_rng(0)
KINDS = [
    Sampling(0.0),
    Sampling(1.0),
    Sampling(0.8, top_k=20, top_p=0.9),
    Sampling(1.2, min_p=0.02),
    Sampling(1.0, repetition_penalty=1.3),
]
REQUESTS = [
    Request(
        RANDOM.integers(0, 256, int(RANDOM.integers(1, 50))).tolist(),
        max_new_tokens=int(RANDOM.integers(1, 40)),
        sampling=KINDS[i % len(KINDS)],
        seed=i,
        row=i,
    )
    for i in range(14)
]


@pytest.fixture(scope="module")
def model():
    return build(CFG)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def alone(model, params):
    """Every request by itself, in an engine that has seen no other."""
    return [Engine(model, params, SIZES).run([request])[0] for request in REQUESTS]


def same(a, b):
    """Bit for bit: with one shape of prefill, a row's arithmetic is its own."""
    assert a.tokens == b.tokens
    assert a.logprobs == b.logprobs and a.drawn_logprobs == b.drawn_logprobs
    assert a.finish_reason == b.finish_reason


def close(a, b):
    """Two shapes of prefill may round apart."""
    assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
    np.testing.assert_allclose(a.drawn_logprobs, b.drawn_logprobs, atol=2e-5, rtol=0)


def test_batch_mates_slots_and_chunks_change_nothing(model, params, alone):
    together = Engine(model, params, SIZES).run(REQUESTS)
    backwards = Engine(model, params, SIZES).run(REQUESTS[::-1])[::-1]
    for a, b, c in zip(alone, together, backwards, strict=True):
        same(a, b)
        same(a, c)
        assert len(a.tokens) == len(a.versions) and set(a.versions) == {0}
    for a, b in zip(alone, Engine(model, params, SEVERAL).run(REQUESTS), strict=True):
        close(a, b)


def test_requests_join_and_leave_at_any_step(model, params, alone):
    engine, random = Engine(model, params, SIZES), np.random.default_rng(1)
    left, numbers, answers, cancelled = list(enumerate(REQUESTS)), {}, {}, 0
    responses = {}
    while left or engine.busy:
        if left and random.random() < 0.6:
            i, request = left.pop(int(random.integers(len(left))))
            numbers[engine.submit(request)] = i
            responses[i] = engine.response(max(numbers))
        if numbers and engine.busy and random.random() < 0.2:
            number = max(numbers)
            if number in engine._tracks:
                i = numbers[number]
                part = engine.cancel(number)
                assert part.finish_reason == "cancelled"
                assert part.tokens == alone[i].tokens[: len(part.tokens)]
                del responses[i]
                cancelled += 1
        for event in engine.step():
            answers.setdefault(numbers[event.request], []).extend(event.tokens)
    assert cancelled and len(responses) > 5
    for i, response in responses.items():
        same(alone[i], response)
        assert answers[i] == response.tokens
    assert engine.held_pages == 0


def test_steady_state_compiles_nothing(model, params):
    engine = Engine(model, params, SEVERAL)
    assert engine.warm_up() == 4
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: seen.append(event)
    )
    try:
        jax.jit(lambda x: x + 3)(jnp.ones(7))
        assert any("compile" in event for event in seen)  # the listener hears
        seen.clear()
        engine.run(REQUESTS)
        engine.update(params)
        engine.run(REQUESTS[:3])
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [event for event in seen if "compile" in event]


def test_a_prefix_is_read_once_and_changes_nothing(model, params):
    """Many samples of one prompt, and prompts that begin alike: shared pages, equal tokens."""
    system = RANDOM.integers(0, 256, 40).tolist()
    asked = [Request(system, 12, Sampling(1.0), seed=3, row=row) for row in range(4)]
    asked += [Request([*system[:30], 7, 8, row], 12, Sampling(1.0), row=row) for row in range(4)]
    fresh = [Engine(model, params, SIZES).run([request])[0] for request in asked]
    engine, read = Engine(model, params, SIZES), []
    run = engine._run_prefill

    def counted(shape, chosen):
        read.append(sum(min(shape[1], t.goal - t.used) for t in chosen if t))
        return run(shape, chosen)

    engine._run_prefill = counted
    shared = engine.run(asked)
    for a, b in zip(fresh, shared, strict=True):
        same(a, b)
    assert len({tuple(r.tokens) for r in shared[:4]}) == 4
    # 40 once and the last page of 8 for each further sample; the others have 24 in common with it
    # and 32 with each other.
    assert sum(read) == 40 + 3 * 8 + (33 - 24) + 3 * (33 - 32)
    # More requests than pages for all of them: only possible because they share.
    few = dataclasses.replace(SIZES, pages=12)
    engine = Engine(model, params, few)
    for a, b in zip(fresh, engine.run(asked), strict=True):
        same(a, b)
    assert engine.held_pages == 0


def test_few_pages_make_requests_wait(model, params, alone):
    engine = Engine(model, params, dataclasses.replace(SIZES, pages=12))
    for a, b in zip(alone, engine.run(REQUESTS), strict=True):
        same(a, b)
    assert engine.held_pages == 0


def test_an_int8_cache_is_close(model, params, alone):
    engine = Engine(model, params, dataclasses.replace(SIZES, cache="int8"))
    assert engine.config.cache_bytes(CFG) < SIZES.cache_bytes(CFG) / 2
    prompt = REQUESTS[5].prompt
    exact = Engine(model, params, SIZES).run([Request(prompt, 1)])[0]
    close = engine.run([Request(prompt, 1)])[0]
    assert abs(exact.logprobs[0] - close.logprobs[0]) < 0.05
    assert exact.logprobs != close.logprobs


def test_partial_responses_go_on_under_new_weights(model, params):
    """Each token has the version that drew it and that version's log-probability."""
    new = jax.tree.map(lambda x: x * 1.02, params)
    request = Request(REQUESTS[3].prompt, 30, Sampling(1.0), seed=5)
    whole = Engine(model, params, SIZES).run([request])[0]

    engine = Engine(model, params, SIZES)
    number = engine.submit(request)
    while len(engine.response(number).tokens) < 8:
        engine.step()
    part = engine.cancel(number)
    engine.update(new)
    rest = dataclasses.replace(
        request,
        response=part.tokens,
        logprobs=part.logprobs,
        drawn_logprobs=part.drawn_logprobs,
        versions=part.versions,
    )
    done = engine.run([rest])[0]
    count = len(part.tokens)
    assert done.tokens[:count] == part.tokens == whole.tokens[:count]
    assert done.versions == [0] * count + [1] * (30 - count)

    # The same without stopping: weights change under a request in flight.
    engine = Engine(model, params, SIZES)
    number = engine.submit(request)
    flying = engine.response(number)
    while len(flying.tokens) < count:
        engine.step()
    engine.update(new)
    while engine.busy:
        engine.step()
    same(flying, done)
    assert flying.versions == done.versions

    ids = jnp.asarray([[*request.prompt, *done.tokens]])
    length = jnp.asarray([len(request.prompt) + 30])
    for version, weights in enumerate((params, new)):
        logits = model.logits(weights, ids, rope_length=length)[0]
        table = np.asarray(jax.nn.log_softmax(logits))[len(request.prompt) - 1 : -1]
        got = np.asarray(done.logprobs)
        mine = np.asarray(done.versions) == version
        want = table[np.arange(30), done.tokens]
        np.testing.assert_allclose(got[mine], want[mine], atol=1e-5)
        assert np.abs(got[~mine] - want[~mine]).max() > 1e-3

    # With the old weights again a response goes on exactly as it would have.
    engine.update(params)
    np.testing.assert_array_equal(engine.run([rest])[0].tokens, whole.tokens)


def test_new_weights_must_fit(model, params):
    engine = Engine(model, params, SIZES)
    with pytest.raises(UserError, match="not of the old ones' shapes"):
        engine.update(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_a_row_past_the_trained_length_keeps_one_rotation():
    """Dynamic NTK is fixed by each request's own limit, and shared pages are of one rotation."""
    cfg = dataclasses.replace(CFG, rope_scaling=DynamicNTK(2.0), max_position_embeddings=24)
    model = build(cfg)
    params = jax.jit(model.init)(jax.random.key(0))
    prompt = REQUESTS[4].prompt[:17]
    assert len(prompt) == 17
    asked = [Request(prompt, new, Sampling(0.0)) for new in (4, 7, 30, 60)]
    for request, got in zip(asked, Engine(model, params, SIZES).run(asked), strict=True):
        ids = jnp.asarray([[*prompt, *got.tokens]])
        length = jnp.asarray([17 + request.max_new_tokens])
        table = np.asarray(jax.nn.log_softmax(model.logits(params, ids, rope_length=length)[0]))
        want = table[16:-1][np.arange(len(got.tokens)), got.tokens]
        np.testing.assert_allclose(got.logprobs, want, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_agrees_with_the_trainer():
    cfg = dataclasses.replace(CFG, dtype="bfloat16", initializer_range=0.05)
    model = build(cfg)
    params = jax.jit(model.init)(jax.random.key(0))
    asked = [dataclasses.replace(r, sampling=Sampling(1.0)) for r in REQUESTS[:6]]
    for request, got in zip(asked, Engine(model, params, SIZES).run(asked), strict=True):
        ids = jnp.asarray([[*request.prompt, *got.tokens]])
        table = np.asarray(jax.nn.log_softmax(model.logits(params, ids)[0]))
        rows = table[len(request.prompt) - 1 : -1]
        want = rows[np.arange(len(got.tokens)), got.tokens]
        apart = np.abs(np.asarray(got.logprobs) - want)
        assert apart.mean() < 1e-3 and apart.max() < 5e-3


@pytest.mark.slow
def test_layers_kept_apart_give_the_same(params, alone, monkeypatch):
    """What a CPU does with large weights, here with sliding windows among the layers."""
    cfg = dataclasses.replace(CFG, attention_pattern=("sliding", "full"), sliding_window=9)
    model = build(cfg)
    stacked = Engine(model, params, SIZES).run(REQUESTS[:4])
    monkeypatch.setattr("internlm2_jax.infer.engine.UNSTACKED", 0)
    engine = Engine(model, params, SIZES)
    assert isinstance(engine._weights["layers"], tuple)
    for a, b in zip(stacked, engine.run(REQUESTS[:4]), strict=True):
        close(a, b)
    assert stacked[1].tokens != alone[1].tokens  # the window is felt


def test_the_likeliest_tokens_are_told(model, params):
    engine = Engine(model, params, dataclasses.replace(SIZES, top_logprobs=3))
    engine.submit(Request(REQUESTS[0].prompt, 6))
    events = []
    while engine.busy:
        events += engine.step()
    for event in events:
        for token, logprob, top in zip(event.tokens, event.logprobs, event.top, strict=True):
            assert top[0][0] == token  # greedy
            assert top[0][1] == pytest.approx(logprob, abs=1e-6)
            assert len(top) == 3 and top[0][1] >= top[1][1] >= top[2][1]


def test_utilisation_of_a_long_tailed_mix(model, params):
    """Rows that decode calls compute beside the tokens they make: at least 90% are of use."""
    random = np.random.default_rng(2)
    lengths = np.minimum(np.exp(random.normal(3.2, 1.0, 48)).astype(int) + 1, 88)
    engine, calls = Engine(model, params, SIZES), 0
    for i, n in enumerate(lengths):
        engine.submit(Request([1, 2], int(n), Sampling(1.0), row=i))
    while engine.waiting:
        engine.step()
        calls += 1
    assert engine.decoded / engine.row_steps > 0.95
    assert engine.steps / calls > 3  # and not by looking after every token
    while engine.busy:
        engine.step()
    assert engine.decoded == lengths.sum() - len(lengths)  # the first are drawn by prefill
    # With nobody left to come, slots stand empty at the end.
    assert engine.decoded / engine.row_steps > 0.9


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1] * 60, 40), "can never fit: a request has at most 96 of this engine's 384"),
        (Request([], 4), "prompt is empty"),
        (Request([300], 4), "prompt has id 300"),
        (Request([1], 4, stop_ids=tuple(range(9))), "9 stop ids; the engine takes 8"),
        (Request([1], 4, stop=("x",)), "stop strings need an engine with a tokenizer"),
        (Request([1], 4, response=[1, 2]), "comes with its logprobs"),
        (
            Request(
                [1], 2, response=[1, 2], logprobs=[0, 0], drawn_logprobs=[0, 0], versions=[0, 0]
            ),
            "has 2 tokens already",
        ),
    ],
)
def test_bad_requests(model, params, request_, message):
    engine = Engine(model, params, SIZES)
    with pytest.raises(UserError, match=message):
        engine.submit(request_)
    assert not engine.busy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"prefill": ()}, "prefill is"),
        ({"cache": "int4"}, "no cache type 'int4'"),
        ({"weights": "int3"}, "no weight type 'int3'; there are auto, int8, int4"),
    ],
)
def test_bad_sizes(model, params, settings, message):
    with pytest.raises(UserError, match=message):
        Engine(model, params, dataclasses.replace(SIZES, **settings))


def test_requests_that_are_over(model, params):
    engine = Engine(model, params, SIZES)
    with pytest.raises(UserError, match="request 7 is not under way"):
        engine.cancel(7)


def test_stop_strings_end_a_response(vocabulary):
    cfg = dataclasses.replace(CFG, vocab_size=vocabulary.vocab_size)
    model = build(cfg)
    params = jax.jit(model.init)(jax.random.key(0))
    free = Engine(model, params, SIZES).run([Request([1, 5], 30, Sampling(1.0))])[0]
    text = vocabulary.decode(free.tokens)
    stop = text[len(text) // 2 :][:2]
    engine = Engine(model, params, SIZES, vocabulary)
    got = engine.run([Request([1, 5], 30, Sampling(1.0), stop=(stop,))])[0]
    assert got.finish_reason == "stop" and len(got.tokens) < 30
    assert got.tokens == free.tokens[: len(got.tokens)]
    assert stop in vocabulary.decode(got.tokens)
    assert stop not in vocabulary.decode(got.tokens[:-1])


def test_weights_of_few_bits(model, params, alone):
    """Who shares the batch changes no bit; new weights are made as small as the old ones."""
    sizes = dataclasses.replace(SIZES, weights="int4")
    engine = Engine(model, jax.tree.map(lambda x: x * 1.1, params), sizes)
    engine.update(params)
    together = engine.run(REQUESTS[:5])
    same(together[2], Engine(model, params, sizes).run([REQUESTS[2]])[0])
    firsts = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(alone, together, strict=False)]
    assert 0 < max(firsts) < 2
