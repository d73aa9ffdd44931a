"""Groups out of rollouts, dynamic sampling, and that the update raises what is rewarded."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.rlhf import rollout
from internlm2_jax.rlhf.grpo import Group, GroupUpdates, GRPOConfig, collect, grouped, to_batch
from internlm2_jax.rlhf.rollout import Rollout
from internlm2_jax.rlhf.verifiers import Verdict

RIGHT, WRONG, UNKNOWN = Verdict("pass", score=1.0), Verdict("fail"), Verdict("infrastructure")


def group(*verdicts: Verdict, name: int = 0, finished: bool = True) -> Group:
    """A group of responses of two tokens."""
    size, width = len(verdicts), 5
    mask = np.zeros((size, width - 1), bool)
    mask[:, 2:] = True
    return Group(
        {"name": name},
        np.full((size, width), name, np.int32),
        mask,
        np.zeros((size, width - 1), np.float32),
        np.full(size, finished),
        ["text"] * size,
        list(verdicts),
        np.array([v.score for v in verdicts], np.float32),
        np.array([v.reward is not None for v in verdicts]),
    )


def test_a_rollout_is_cut_into_its_groups():
    mask = np.arange(9)[None] < np.arange(1, 7)[:, None]
    sampled = Rollout(
        np.arange(60, dtype=np.int32).reshape(6, 10), mask, mask.astype(np.float32),
        np.array([True] * 5 + [False]), [[0]] * 6,
    )  # fmt: skip
    verdicts = [RIGHT, WRONG, UNKNOWN, WRONG, WRONG, RIGHT]
    config = GRPOConfig(overlong_buffer=2, overlong_weight=0.5)
    first, second = grouped([{"a": 1}, {"a": 2}], sampled, list("abcdef"), verdicts, config, 6)
    assert (first.row, second.texts) == ({"a": 1}, ["d", "e", "f"])
    assert first.lengths.tolist() == [1, 2, 3] and first.valid.tolist() == [True, True, False]
    np.testing.assert_allclose(first.rewards, [1, 0, 0])
    np.testing.assert_allclose(second.rewards, [0, -0.25, 0.5])  # lengths 4, 5, 6 of 6
    assert (first.solved, second.solved) == (0.5, pytest.approx(1 / 3))


def test_one_round_takes_every_group():
    pool = [group(RIGHT, RIGHT), group(RIGHT, WRONG)]
    chosen, drawn, rounds = collect(lambda n: pool[:n], 2, 1)
    assert chosen == drawn == pool and rounds == 1


def test_groups_that_fare_alike_are_drawn_again():
    stream = iter(
        [group(RIGHT, RIGHT, name=0), group(RIGHT, WRONG, name=1), group(WRONG, WRONG, name=2),
         group(UNKNOWN, RIGHT, name=3), group(WRONG, RIGHT, name=4), group(RIGHT, WRONG, name=5)]
    )  # fmt: skip
    asked = []

    def draw(count):
        asked.append(count)
        return [next(stream) for _ in range(count)]

    chosen, drawn, rounds = collect(draw, 3, 10)
    assert [g.row["name"] for g in chosen] == [1, 4, 5]
    assert asked == [3, 2, 1] and rounds == 3 and len(drawn) == 6


def test_drawing_again_has_an_end_and_the_rest_is_masked():
    names = iter(range(100))
    useful = group(RIGHT, WRONG, name=50)
    calls = []

    def draw(count):
        calls.append(count)
        found = [group(WRONG, WRONG, name=next(names)) for _ in range(count)]
        return [useful, *found[1:]] if len(calls) == 2 else found

    chosen, _, rounds = collect(draw, 3, 4)
    assert rounds == 4 and calls == [3, 3, 2, 2]
    assert chosen[0].row["name"] == 50 and len(chosen) == 3
    batch = to_batch(chosen, GRPOConfig())
    assert batch["mask"].any(axis=1).tolist() == [True, True, False, False, False, False]
    assert batch["tokens"].shape == (6, 5) and not batch["advantages"][2:].any()


def test_who_is_masked():
    chosen = [group(RIGHT, UNKNOWN, WRONG), group(RIGHT, WRONG, WRONG, finished=False)]
    heard = to_batch(chosen, GRPOConfig())["mask"].any(axis=1)
    assert heard.tolist() == [True, False, True, True, True, True]
    heard = to_batch(chosen, GRPOConfig(overlong="mask"))["mask"].any(axis=1)
    assert heard.tolist() == [True, False, True, False, False, False]
    alike = [group(RIGHT, RIGHT)]
    assert to_batch(alike, GRPOConfig(dynamic_rounds=1))["mask"].any()
    assert not to_batch(alike, GRPOConfig())["mask"].any()


def test_columns_that_nobody_reaches_are_left_out():
    short = [group(RIGHT, WRONG), group(RIGHT, WRONG)]
    for one in short:
        one.tokens = np.pad(one.tokens, ((0, 0), (0, 95)))
        one.mask, one.logprobs = (np.pad(x, ((0, 0), (0, 95))) for x in (one.mask, one.logprobs))
    batch = to_batch(short, GRPOConfig())
    assert batch["tokens"].shape == (4, 32) and batch["mask"].shape == (4, 31)
    assert batch["mask"].sum() == 8
    short[1].mask[0, 31] = True  # predicts token 32, the 33rd
    assert to_batch(short, GRPOConfig())["tokens"].shape == (4, 64)


def test_settings_are_checked():
    with pytest.raises(UserError, match="advantage_scale"):
        GRPOConfig(advantage_scale="variance")
    with pytest.raises(UserError, match="dynamic_rounds is 0"):
        GRPOConfig(dynamic_rounds=0)
    updates = GroupUpdates(None, GRPOConfig(minibatches=4), 8)
    with pytest.raises(UserError, match="6 responses do not divide into 4"):
        list(updates.minibatches({"tokens": np.zeros((6, 2))}, 0))


def test_minibatches_are_shuffled_and_cover_every_row_in_every_epoch():
    updates = GroupUpdates(None, GRPOConfig(epochs=2, minibatches=3), 8)
    batch = {"tokens": np.arange(12)[:, None], "advantages": np.arange(12)}
    parts = list(updates.minibatches(batch, 7))
    assert [len(p["tokens"]) for p in parts] == [4] * 6
    for epoch in (parts[:3], parts[3:]):
        rows = np.concatenate([p["advantages"] for p in epoch])
        assert sorted(rows) == list(range(12)) and rows.tolist() != list(range(12))
    again = list(updates.minibatches(batch, 7))
    np.testing.assert_array_equal(again[4]["tokens"], parts[4]["tokens"])


# ----------------------------------------------------------------------------------- learning

MODEL = build(preset("tiny"))
PARAMS = MODEL.init(jax.random.key(0))
PROMPTS = [[1, 5, 9], [1, 7], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(learning_rate=3e-2, dynamic_rounds=1),
        pytest.param(
            GRPOConfig(learning_rate=2e-2, dynamic_rounds=1, advantage_scale="none",
                       aggregate="fixed", kl_coefficient=1e-3, warmup=2, epochs=2, minibatches=2),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["GRPO", "Dr. GRPO with KL"],
)  # fmt: skip
def test_what_is_rewarded_becomes_likely(config):
    """Reward: the response begins with an even token. Chance is a half."""
    updates = GroupUpdates(MODEL, config, 2)
    state, rates = updates.init(PARAMS), []
    for step in range(16):
        sampled = rollout.sample(
            MODEL, state["params"], [p for p in PROMPTS for _ in range(8)], prompt_length=4,
            max_new_tokens=2, sampling=Sampling(temperature=1.0), seed=step, stop_ids=(), pad_id=2,
        )  # fmt: skip
        verdicts = [WRONG if r[0] % 2 else RIGHT for r in sampled.responses]
        found = grouped([{}] * 3, sampled, [""] * 24, verdicts, config, 2)
        batch = to_batch(found, config)
        if config.kl_coefficient:
            batch["reference"] = np.asarray(updates.logprobs(PARAMS, batch["tokens"]))
        for number, part in enumerate(updates.minibatches(batch, step)):
            state, metrics = updates.update(state, part)
            if number == 0:
                assert float(metrics["ratio"]) == pytest.approx(1, abs=1e-4)
        rates.append(np.mean([v is RIGHT for v in verdicts]))
    assert np.mean(rates[:2]) < 0.75 and np.mean(rates[-2:]) > 0.9
    assert np.isfinite(np.asarray(PARAMS["norm"]["weight"])).all()  # survives donation


def test_masked_groups_do_not_move_the_policy():
    config = dataclasses.replace(GRPOConfig(), learning_rate=1e-2)
    updates = GroupUpdates(MODEL, config, 2)
    batch = to_batch([group(RIGHT, RIGHT), group(WRONG, WRONG)], config)
    state, metrics = updates.update(updates.init(PARAMS), batch)
    assert float(metrics["grad_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, state["params"], PARAMS)


@pytest.mark.slow  # half a minute of compiling for eight devices
@pytest.mark.parametrize("layout", ["fsdp=2,tensor=4", "data=4,fsdp=2"])
def test_eight_devices_give_the_numbers_of_one(layout):
    """The same draws, the same log-probabilities, the same updates."""
    config = GRPOConfig(learning_rate=1e-3, dynamic_rounds=1, kl_coefficient=0.1, minibatches=2)
    model = build(preset("tiny", num_layers=1, num_heads=8, num_kv_heads=8))

    def run(layout):
        with sharding.use(layout):
            params = sharding.create(model.init, model.axes, jax.random.key(0))
            anchor = sharding.create(model.init, model.axes, jax.random.key(1))
            sampled = rollout.sample(
                model, params, [p for p in (*PROMPTS, [3]) for _ in range(4)], prompt_length=4,
                max_new_tokens=3, sampling=Sampling(temperature=1.0), seed=5, stop_ids=(), pad_id=2,
            )  # fmt: skip
            verdicts = [WRONG if r[0] % 2 else RIGHT for r in sampled.responses]
            batch = to_batch(grouped([{}] * 4, sampled, [""] * 16, verdicts, config, 3), config)
            updates = GroupUpdates(model, config, 3)
            batch["reference"] = updates.logprobs(anchor, batch["tokens"])
            state, found = updates.init(params), []
            for part in updates.minibatches(batch, 0):
                state, metrics = updates.update(state, part)
                found.append({k: float(v) for k, v in metrics.items()})
            norms = jax.tree.map(lambda x: float(jnp.sum(jnp.abs(x))), state["params"])
            return batch, found, jax.tree.leaves(norms)

    (alone, one, norms), (together, eight, theirs) = run(""), run(layout)
    np.testing.assert_array_equal(together["tokens"], alone["tokens"])
    assert np.ptp(alone["advantages"]) > 1
    for name in ("logprobs", "reference", "advantages"):
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-4, atol=1e-5)
    for a, b in zip(one, eight, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    assert theirs == pytest.approx(norms, rel=1e-5)
