"""What a pipeline compiles, and the counter against the analytic figures on eight CPU devices."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import pytest

from internlm2_jax import config, stages
from internlm2_jax.errors import UserError
from internlm2_jax.models.config import preset
from internlm2_jax.plan import analytic, hlo, steps
from internlm2_jax.plan.planners import planned
from internlm2_jax.plan.steps import Choice
from internlm2_jax.rlhf.ppo import PPOConfig
from internlm2_jax.sharding import Layout
from internlm2_jax.stages import Pipeline

ROOT = Path(__file__).parents[2]
CFG = preset(
    "tiny", num_layers=3, embed_dim=64, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=160
)


def pipeline(path: str, function: str = "experiment", *assignments: str) -> Pipeline:
    return config.build(config.load(ROOT / path, list(assignments), function=function))


@pytest.fixture(scope="module")
def demo():
    return pipeline("experiments/demo/pipeline.py", "tiny")


def test_a_model_that_is_not_there_yet_is_planned_by_a_preset_s_name():
    path = "experiments/sft/internlm2_chat_7b.py"
    (found,) = planned(pipeline(path, "experiment", "base=tiny", "layout="), jax.devices()[:1])
    assert found.cfg == preset("tiny") and (found.rows, found.length) == (32, 32768)
    with pytest.raises(UserError, match=r"nowhere has no model.json.*preset.*internlm2_7b"):
        list(planned(pipeline(path, "experiment", "base=nowhere"), jax.devices()))


def test_a_stage_that_lacks_a_setting_is_named():
    made = Pipeline(ppo=functools.partial(stages.ppo, actor="tiny"))
    with pytest.raises(UserError, match="stage 'ppo' is given no 'config'"):
        list(planned(made, jax.devices()[:1]))


def test_prompts_longer_than_a_chunk_are_read_in_several_calls():
    made = Pipeline(
        ppo=functools.partial(
            stages.ppo, actor="tiny", reference="tiny", reward="tiny", config=PPOConfig(),
            batch_size=64, prompt_length=1024, max_new_tokens=16, iterations=3,
            reward_row_length=2048, tokenizer="none", pretrain_mixture={},
        )
    )  # fmt: skip
    found = {s.name: s for s in planned(made, jax.devices()[:1])}
    prefill = found["ppo/rollout/prefill"]
    assert (prefill.rows, prefill.length) == (64, 256)  # what the engine's program takes at once
    assert prefill.tokens == 64 * 256 and prefill.calls == 3 * 4
    # of each token all but the head, which reads the last one of a prompt
    each = preset("tiny").forward_flops(1024)
    head = 2 * 256 * 32
    assert each - head < prefill.model_flops / prefill.tokens < each


def test_every_loop_of_the_demo_is_planned(demo):
    found = {s.name: s for s in planned(demo, jax.devices()[:1])}
    assert list(found) == [
        "pretrain/short",
        "pretrain/long",
        "pretrain/enhancement",
        "sft/train",
        "reward_model/train",
        "ppo_round1/actor",
        "ppo_round1/critic",
        "ppo_round1/rollout/prefill",
        "ppo_round1/rollout/decode",
        "reward_patch/train",
        "ppo_round2/actor",
        "ppo_round2/critic",
        "ppo_round2/rollout/prefill",
        "ppo_round2/rollout/decode",
    ]
    # The tokenizer that the pipeline trains sets the vocabulary, and later stages inherit it.
    assert (
        found["ppo_round2/actor"].cfg.vocab_size == demo.stages["tokenizer"].keywords["vocab_size"]
    )
    for name in ("prefill", "decode"):
        assert [p.name for p in found[f"ppo_round1/rollout/{name}"].parts] == [name]
    short = found["pretrain/short"]
    assert (short.tokens, short.calls) == (8 * 64, 4)


def test_a_stage_or_a_step_can_be_asked_for(demo):
    one = jax.devices()[:1]
    assert [s.name for s in planned(demo, one, only=("sft",))] == ["sft/train"]
    assert [s.name for s in planned(demo, one, only=("ppo_round1/critic",))] == [
        "ppo_round1/critic"
    ]
    with pytest.raises(UserError, match="no such stage to plan; there are pretrain, sft"):
        planned(demo, one, only=("sfd",))
    with pytest.raises(UserError, match="no such step; there are pretrain/short, pretrain/long"):
        planned(demo, one, only=("pretrain/shirt",))


def test_an_experiment_without_a_stage_to_plan():
    nothing = Pipeline(corpus=functools.partial(stages.corpus, files_below="."))
    with pytest.raises(UserError, match=r"no stage .* can be planned \(it has corpus\)"):
        planned(nothing, jax.devices())


def test_a_layout_must_divide_devices_batch_and_model():
    seven = pipeline("experiments/pretraining/internlm2_7b.py", "tiny")
    with pytest.raises(UserError, match="needs 4 devices, there are 8"):
        planned(seven, jax.devices(), Choice(layout="fsdp=4"))
    # Of one phase, when it is asked for: the others may be planned.
    found = {s.name: s for s in planned(seven, jax.devices(), Choice(layout="fsdp=8"))}
    with pytest.raises(UserError, match="batch_size: 1 does not divide over data x fsdp = 8"):
        found["pretrain/long"].lower()
    by_tensor = planned(seven, jax.devices(), Choice(layout="tensor=8"))
    with pytest.raises(UserError, match="does not divide over tensor = 8"):
        by_tensor[0].lower()


def test_choices_take_the_place_of_settings():
    seven = pipeline("experiments/pretraining/internlm2_7b.py", "tiny")
    choice = Choice("fsdp=8", "minimal", batch=16)
    (step,) = planned(seven, jax.devices(), choice, ("pretrain/short",))
    assert (step.rows, step.accumulate, step.remat, step.layout) == (
        16,
        1,
        "minimal",
        Layout(fsdp=8),
    )
    assert step.overrides["layout"] == "pretrain.layout"


# ------------------------------------------------------- the counter against arithmetic


def compiled(layout: str, remat: str = "full", length: int = 64, rows: int = 16) -> hlo.Program:
    mesh = Layout.parse(layout).mesh(jax.devices())
    lowered = steps.train_step(CFG, mesh, rows, length, remat=remat)()
    return hlo.read(lowered.compile().as_text(), dict(mesh.shape))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp=8", "fsdp=4,tensor=2"])
def test_products_and_gathers_are_those_of_the_sizes(layout):
    program, where = compiled(layout), Layout.parse(layout)
    tokens = 16 * 64 / 8
    expected = tokens * (CFG.train_flops(64) + analytic.rematerialised_flops(CFG, 64, "full"))
    # Rows of 64 are attended as a whole square, twice the causal half, four times over: forward,
    # again, and two products for each backward.
    square = tokens * 4 * CFG.num_layers * 4 * CFG.num_heads * CFG.head_dim * (64 - 65 / 2)
    assert program.flops == pytest.approx(expected + square, rel=0.01)
    gathered = sum(
        t.payload for t in program.collectives() if (t.kind, t.axes) == ("all-gather", "fsdp")
    )
    head = analytic.width(CFG) * CFG.vocab_size * CFG.embed_dim / where.tensor
    ids = 4 * 16 * 64  # of all tokens, for the embedding
    assert gathered == analytic.gathered_weights(CFG, where) + head + ids


@pytest.mark.slow
def test_lowering_of_every_loop():
    """Actor, critic, rollout and reward model are traced with the arguments that stages give."""
    demo = pipeline("experiments/demo/pipeline.py", "tiny")
    wanted = ("sft", "reward_model", "ppo_round1")
    for step in planned(demo, jax.devices()[:4], Choice(layout="fsdp=2,tensor=2"), wanted):
        assert "func.func public @main" in step.lower().as_text(), step.name
