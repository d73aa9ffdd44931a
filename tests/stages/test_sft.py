"""Fine-tuning through the stage itself: LoRA and full, data of one's own, kills, mistakes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.models.config import LoRA
from internlm2_jax.stages import Conversations, sft
from internlm2_jax.train import loop
from internlm2_jax.train.checkpoint import load_model


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A ShareGPT file in which each question is answered by its own words, the other way round."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("chats") / "chats.jsonl"
    words = ["red", "blue", "green", "one", "two", "three", "up", "down"]
    with open(path, "w") as handle:
        for _ in range(160):
            asked = rng.sample(words, 2)
            turns = [("human", " ".join(asked)), ("gpt", " ".join(reversed(asked)))]
            row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
            handle.write(json.dumps(row) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def tune(tokenizer_stage, base_stage, chats):
    def run(folder, **options):
        settings = {
            "tokenizer": tokenizer_stage,
            "base": base_stage,
            "data": Conversations([chats], validation_share=0.1),
            "batch_size": 4,
            "row_length": 128,
            "learning_rate": 2e-2,
            "warmup": 0,
            "validation_batches": 1,
            "validate_every": 5,
            "checkpoint_every": 5,
            "log_every": 1,
        }
        sft(folder, **{**settings, **options})
        return files.read_json(folder / "result.json")

    return run


@pytest.fixture(scope="module")
def with_lora(tune, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "lora"
    tune(folder, steps=10, lora=LoRA(rank=4))
    return folder


def test_adapters_learn_and_later_stages_find_the_merged_model(with_lora, base_stage):
    rows = files.read_jsonl(with_lora / "metrics.jsonl")
    validation = [row["loss"] for row in rows if row["split"] == "validation"]
    assert validation[-1] < rows[0]["loss"] - 1
    result = files.read_json(with_lora / "result.json")
    model, merged = load_model(with_lora)
    _, before = load_model(base_stage)
    assert model.cfg.lora is None
    assert result["trained_params"] < model.cfg.num_params() / 2
    np.testing.assert_array_equal(merged["embed"]["weight"], before["embed"]["weight"])
    moved = merged["layers"]["mlp"]["up"]["weight"] - before["layers"]["mlp"]["up"]["weight"]
    assert np.linalg.matrix_rank(np.asarray(moved[0])) == 4


def test_a_run_that_was_cut_ends_in_the_same_numbers(tune, with_lora, tmp_path, monkeypatch):
    real, calls = loop.Checkpoints.save, []

    def killed(self, step, *args):
        real(self, step, *args)
        calls.append(step)
        if len(calls) == 1:
            self.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "cut", steps=10, lora=LoRA(rank=4))
    tune(tmp_path / "cut", steps=10, lora=LoRA(rank=4))
    for name in ("metrics.jsonl", "result.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (with_lora / name).read_bytes()
    got, expected = (load_model(folder)[1] for folder in (tmp_path / "cut", with_lora))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_all_weights_with_long_documents_in_the_mix(tune, tmp_path):
    result = tune(
        tmp_path, steps=4, pretrain_mixture={"long/text": 2, "code": 1}, pretrain_share=0.5
    )
    assert result["shares"] == pytest.approx({"sft": 0.5, "long/text": 1 / 3, "code": 1 / 6})
    rows = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert {"loss/sft", "loss/long/text", "loss/code"} <= rows[0].keys()
    assert result["conversations"] + 16 == pytest.approx(160, abs=12)
    assert load_model(tmp_path)[0].cfg.lora is None


def test_steps_follow_from_epochs(tune, tmp_path):
    result = tune(tmp_path, epochs=1.0)
    assert result["epochs"] == pytest.approx(1.0, abs=4 / result["rows"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"row_length": 1024}, "row_length is 1024 and the model of .* has 512 positions"),
        ({"pretrain_share": 0.5}, "pretrain_share is 0.5 and pretrain_mixture names 0 sources"),
        (
            {"pretrain_share": 0.5, "pretrain_mixture": {"books": 1}},
            "names books but the corpus has",
        ),
        ({"data": None}, "give data, or the stage instructions"),
        ({"data": Conversations(["absent"])}, "cannot read absent"),
    ],
)
def test_mistakes(tune, tmp_path, options, match):
    with pytest.raises(UserError, match=match):
        tune(tmp_path, steps=1, **options)


def test_a_bad_record_stops_the_run_unless_it_is_to_be_skipped(tune, chats, tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = Path(chats).read_text().splitlines()
    path.write_text("\n".join([*lines[:30], '{"conversations": []}']) + "\n")
    with pytest.raises(UserError, match=r"1 of 31 .*\n.*bad.jsonl:31: conversations is an empty"):
        tune(tmp_path / "a", steps=1, data=Conversations([str(path)]))
    data = Conversations([str(path)], skip_bad=True, validation_share=0.3)
    assert tune(tmp_path / "b", steps=1, data=data)["bad_records"] == 1
