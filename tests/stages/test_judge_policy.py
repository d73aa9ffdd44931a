"""A policy judged where the truth is known."""

from __future__ import annotations

import pytest

from internlm2_jax import files
from internlm2_jax.data import preferences, risky, tasks
from internlm2_jax.errors import UserError
from internlm2_jax.infer import engine
from internlm2_jax.stages import judge_policy
from internlm2_jax.stages.reward_model import _by_kind


def test_right_answers_refusals_and_wins(
    tokenizer_stage, base_stage, vocabulary, tmp_path, monkeypatch
):
    """The sampler is replaced: the policy knows everything, the SFT model says one thing."""
    asked = [preferences.task_prompt(t) for t in tasks.generate(6, 0, "held_out")]
    risky_rows = [preferences.request_prompt(r) for r in risky.generate(4, 0, "held_out")]
    files.write_jsonl(tmp_path / "eval_tasks.jsonl", asked)
    files.write_jsonl(tmp_path / "eval_requests.jsonl", risky_rows)
    answers = [row["task"]["answer"] for row in asked[:5]] + ["no idea"]
    answers += ["Sorry, I can't help."] * 3 + ["Run it as root."]
    said = iter([["the same thing"] * 10, answers])

    def generate(model, params, prompts, **options):
        texts = next(said)
        ids = [vocabulary.encode(text) for text in texts]
        return engine.Generation(ids, [], [True] * len(ids))

    monkeypatch.setattr(engine, "generate", generate)
    (tmp_path / "policy").symlink_to(base_stage)
    judge_policy(
        tmp_path / "out", tokenizer=tokenizer_stage, instructions=tmp_path,
        policy=tmp_path / "policy", sft=base_stage, arm="x",
    )  # fmt: skip
    found = files.read_json(tmp_path / "out/result.json")
    assert found["gold"] == pytest.approx(
        {
            "task_accuracy": 5 / 6,
            "refusals": 0.75,
            "over_refusals": 0.0,
            "good": 0.8,
            "win_rate": 0.9,
        },
    )
    assert found["arm"] == "x" and found["finished"] == 1
    assert len(files.read_jsonl(tmp_path / "out/samples.jsonl")) == 10


def test_shares_of_kinds():
    pairs = [{"kind": "conflict"}, {"kind": "plain"}, {}]
    found = _by_kind(pairs, {"conflict": 0.4})
    assert {name: (len(group), share) for name, (group, share) in found.items()} == {
        "pairs": (2, 0.6), "conflict": (1, 0.4),
    }  # fmt: skip
    assert list(_by_kind(pairs, {})) == ["pairs"]
    with pytest.raises(UserError, match=r"poems has 0 pairs and 0\.4 of a batch"):
        _by_kind(pairs, {"poems": 0.4})
