"""Leaks that were planted are found, in losses, in a trained model and in a corpus; others not."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.evals.contamination import SPLITS, judge
from internlm2_jax.evals.intervals import student, welch
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.stages.contamination import contamination, sample_losses
from internlm2_jax.train.checkpoint import Checkpoints, save_model_json

PLACES = ["river", "school", "market", "bridge", "garden", "library", "station", "harbour"]
THINGS = ["apples", "books", "stamps", "marbles", "shells", "coins", "tickets", "flowers"]


def examples(count: int, seed: int) -> list[dict[str, str]]:
    """Word problems in many wordings, so that no run of 13 words is common to two of them."""
    rng = np.random.default_rng(seed)

    def some(items):
        return items[rng.integers(len(items))]

    rows = []
    for _ in range(count):
        a, b = rng.integers(11, 99, 2)
        words = rng.permutation(PLACES + THINGS)
        question = f"Near the {words[0]} and {words[1]} lay {a} {words[2]}, and {words[3]} with "
        question += f"{words[4]} brought {b} {words[5]} to the {words[6]} of {some(PLACES)}."
        rows.append({"question": question, "answer": f"{a} + {b} = {a + b} {words[7]}"})
    return rows


def losses(shift: dict[str, float], count: int = 300, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(1.5 + shift.get(name, 0), 0.4, count) for name in SPLITS}


def test_a_leak_is_found_and_by_how_much():
    found = judge(losses({"test": -0.5}))
    assert found.test_leak and not found.train_fit
    assert found.delta1.low < -0.5 < found.delta1.high
    found = judge(losses({"train": -0.4}))
    assert found.train_fit and not found.test_leak
    assert found.delta2.low < 0.4 < found.delta2.high


def test_the_clean_and_the_few_are_not_accused():
    for seed in range(60):
        found = judge(losses({}, count=40, seed=seed))
        assert not found.test_leak and not found.train_fit
    assert not judge(losses({"test": -0.3}, count=4)).test_leak


def test_a_hard_reference_set_accuses_nobody_once_a_baseline_is_known():
    hard = losses({"reference": 0.6})
    assert judge(hard).test_leak
    rng = np.random.default_rng(1)
    clean = {name: values - 0.2 + rng.normal(0, 0.05, len(values)) for name, values in hard.items()}
    assert not judge(clean, hard).test_leak
    clean["test"] = clean["test"] - 0.3
    assert judge(clean, hard).test_leak
    with pytest.raises(UserError, match="other examples in the test set"):
        judge(clean, {**hard, "test": hard["test"][1:]})
    with pytest.raises(UserError, match="reference set needs two"):
        judge({**clean, "reference": []})


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    drawn = [rng.normal(2.0, 1.0, 12) for _ in range(400)]
    held = [student(values) for values in drawn]
    assert 0.92 < np.mean([i.low < 2 < i.high for i in held]) < 0.98
    pairs = [welch(v, rng.normal(1.0, 3.0, 40)) for v in drawn]
    assert 0.92 < np.mean([i.low < 1 < i.high for i in pairs]) < 0.98
    assert student([3.0]).low == 3.0


# ------------------------------------------------------------------------- real losses


@pytest.fixture(scope="module")
def world(vocabulary, tmp_path_factory):
    """Files of the sets, the tokenizer's folder, and stages of a clean and a leaked model."""
    folder = tmp_path_factory.mktemp("contamination")
    rows = {name: examples(24, seed) for seed, name in enumerate(SPLITS)}
    for name, members in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in members))
    base = tmp_path_factory.getbasetemp()
    path = sorted(base.glob("vocabulary*/tokenizer.model"))[0]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(path.read_bytes())
    model = build(preset("tiny", vocab_size=vocabulary.vocab_size))
    other = examples(24, 77)
    for name, texts in {"clean": other, "leaked": rows["test"]}.items():
        params = _trained(model, vocabulary, [f"{r['question']} {r['answer']}" for r in texts])
        with Checkpoints(folder / name) as checkpoints:
            checkpoints.save(1, {"params": params})
        save_model_json(folder / name, model.cfg, "lm")
    return folder


def _trained(model, vocabulary, texts, steps=60, width=96):
    rows = [[vocabulary.bos_id, *vocabulary.encode(text)][:width] for text in texts]
    tokens = np.array([row + [0] * (width - len(row)) for row in rows])
    mask = np.arange(1, width)[None] < np.array([[len(row)] for row in rows])
    params = model.init(jax.random.key(0))
    state = ADAM.init(params)
    for _ in range(steps):
        params, state = _step(model, params, state, tokens, mask)
    return params


ADAM = optax.adam(1e-2)


# Compiled at a level that pays where many steps are taken; conftest.py asks for none.
@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 1}
)
def _step(model, params, state, tokens, mask):
    def loss(params):
        logprobs = jax.nn.log_softmax(model.logits(params, tokens[:, :-1]))
        picked = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(picked * mask) / mask.sum()

    updates, state = ADAM.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


def measure(world, stage, out, **options):
    sets = {name: world / f"{name}.jsonl" for name in SPLITS}
    contamination(
        world / out, model=world / stage, tokenizer=world / "tokenizer", **sets, **options
    )
    return files.read_json(world / out / "result.json")


def test_losses_are_those_of_a_plain_forward_pass(vocabulary):
    model = build(preset("tiny", vocab_size=vocabulary.vocab_size))
    params = model.init(jax.random.key(3))
    texts = ["def f(x):", "a much longer line " * 9, "", "x"]
    found = dict(sample_losses(model, params, vocabulary, texts))
    assert found[2] == 0.0
    rows = [[vocabulary.bos_id, *vocabulary.encode(text)] for text in texts]
    tokens = np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    logprobs = np.asarray(
        jax.jit(lambda p, t: jax.nn.log_softmax(model.logits(p, t)))(params, tokens)
    )
    for i, row in enumerate(rows):
        wanted = -sum(logprobs[i, t, row[t + 1]] for t in range(len(row) - 1)) / len(row)
        np.testing.assert_allclose(found[i], wanted, rtol=1e-5)


def test_a_leaked_model_is_found_and_a_clean_one_is_not(world):
    leaked, clean = measure(world, "leaked", "a"), measure(world, "clean", "b")
    assert leaked["test_leak"] and not clean["test_leak"] and not clean["train_fit"]
    assert leaked["delta1"]["mean"] < -0.1
    with_baseline = measure(world, "leaked", "c", baseline=world / "clean")
    assert with_baseline["test_leak"] and with_baseline["baseline"]


def test_a_killed_measurement_goes_on(world, monkeypatch):
    whole = measure(world, "clean", "d")
    path = world / "d" / "losses.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:30]) + lines[30][:9])
    assert measure(world, "clean", "d") == whole
    assert len(files.read_jsonl(path)) == len(lines)


def test_examples_in_a_corpus_are_counted_and_named(world):
    from data_beam.io import writers
    from data_beam.schema import Document

    test = files.read_jsonl(world / "test.jsonl")
    texts = ["Nothing of the kind is said in this document at all. " * 3]
    texts += [f"An introduction. {row['question']} {row['answer']} And so on." for row in test[:5]]
    records = [Document(f"{i:032x}", t, "web", path=f"page {i}").to_bytes()
               for i, t in enumerate(texts)]  # fmt: skip
    corpus = world / "corpus"
    name = writers.shard_name("train", "web", 0, 1)
    writers.write_array_record(corpus / name, records, writers.DOCUMENTS_OPTIONS)
    files.write_json(
        corpus / "manifest.json",
        {"kind": "corpus", "shards": [{"name": name, "documents": len(records)}]},
    )
    found = measure(world, "clean", "e", corpus=corpus)["overlap"]
    assert (found["test"]["found"], found["test"]["indexed"]) == (5, 24)
    assert found["train"]["found"] == found["reference"]["found"] == 0
    assert found["test"]["samples"][0] == {
        "example": "test#0", "document": "page 1", "most_of_one": 1.0,
    }  # fmt: skip


def test_what_cannot_be_measured_is_said(world, vocabulary):
    with pytest.raises(UserError, match=r"no row of .* has a text in"):
        (world / "odd.jsonl").write_text('{"colour": "red"}\n')
        contamination(
            world / "f", model=world / "clean", tokenizer=world / "tokenizer",
            **{**{name: world / f"{name}.jsonl" for name in SPLITS}, "test": world / "odd.jsonl"},
        )  # fmt: skip
    model = build(preset("tiny", vocab_size=vocabulary.vocab_size, max_position_embeddings=8))
    with pytest.raises(UserError, match="more than the model's 8 positions"):
        dict(sample_losses(model, {}, vocabulary, ["one two three four five six seven eight"]))
