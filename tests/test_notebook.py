from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import internlm2_jax
from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.models import convert
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset, to_json

CFG = preset("tiny")


@pytest.fixture(scope="module")
def params():
    return build(CFG).init(jax.random.key(0))


def shifted(params, by: int):
    return jax.tree.map(lambda x: x + by, params)


@pytest.fixture
def hf(params, tmp_path) -> Path:
    convert.save_hf(tmp_path / "hf", CFG, params, "float32")
    return tmp_path / "hf"


def test_public_checkpoint(shared):
    folder = shared / "data/parity/internlm2_tiny"
    golden = np.load(folder / "golden.npz")
    model = internlm2_jax.open(folder)
    logits = model.logits(golden["ids_100"])
    assert isinstance(logits, np.ndarray) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, golden["logits_100"], atol=2e-4, rtol=0)
    one = model.logits(golden["ids_100"][0].tolist())
    assert one.shape == (1, 100, 512)
    prompt, full = golden["gen_prompt"][0].tolist(), golden["gen_full"][0].tolist()
    assert model.generate(prompt, max_new_tokens=24) == full[12:]


def test_public_reward_model(shared):
    model = internlm2_jax.open(shared / "data/parity/internlm2_reward_tiny")
    assert model.model.head == "scalar"
    assert model.scores([1, 2, 3]).shape == (1, 3)
    with pytest.raises(UserError, match="'scalar' head"):
        model.logits([1, 2, 3])


def test_hf_folder(hf, params):
    model = internlm2_jax.open(hf)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert model.tokenizer is None
    assert model.generate([1, 2], 3) == model.generate([1, 2], 3)
    with pytest.raises(UserError, match=r"no tokenizer.model.*list of ids"):
        model.generate("hello")
    summary = model.summary()
    assert "layers/mlp/gate/weight" in summary and "layer, embed, mlp" in summary
    assert f"{CFG.num_params():,}" in summary and f"{4 * CFG.num_params():,}" in summary
    assert f"{CFG.num_params():,}" in repr(model)
    model.save_hf(hf.parent / "again", dtype="float32")
    again = (hf.parent / "again/model.safetensors").read_bytes()
    assert again == (hf / "model.safetensors").read_bytes()
    model.save_hf(hf.parent / "llama", dtype="float32", layout="llama")
    jax.tree.map(
        np.testing.assert_array_equal, internlm2_jax.open(hf.parent / "llama").params, params
    )


def test_hf_to_stage_and_back(hf, params, tmp_path):
    internlm2_jax.open(hf).save_stage(tmp_path / "base")
    stage = internlm2_jax.open(tmp_path / "base")
    assert stage.cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, stage.params, params)
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        internlm2_jax.open(hf).save_stage(tmp_path / "base")
    stage.save_hf(tmp_path / "back", dtype="float32")
    saved, first = ((p / "model.safetensors").read_bytes() for p in (tmp_path / "back", hf))
    assert saved == first


def test_text_and_conversations(shared, tmp_path):
    cfg = preset("tiny", vocab_size=92544)
    tokenizer = shared / "data/tokenizer/internlm2.model"
    params = build(cfg).init(jax.random.key(0))
    convert.save_hf(tmp_path / "hf", cfg, params, "float32", tokenizer=tokenizer)
    model = internlm2_jax.open(tmp_path / "hf")
    text = model.generate("Hello", max_new_tokens=4)
    assert isinstance(text, str)
    ids = model.generate([1, *model.tokenizer.encode("Hello")], max_new_tokens=4)
    assert model.tokenizer.decode(ids) == text
    assert isinstance(model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=2), str)


def test_stage_and_run_folders(params, tmp_path):
    from internlm2_jax.train.checkpoint import Checkpoints

    for stage, shift in (("pretrain", 8), ("sft", 3)):
        checkpoints = Checkpoints(tmp_path / stage)
        checkpoints.save(3, {"params": shifted(params, shift)})
        checkpoints.close()
        files.write_json(tmp_path / stage / "model.json", {"config": to_json(CFG), "head": "lm"})
    model = internlm2_jax.open(tmp_path / "pretrain")
    expected = params["norm"]["weight"] + 8
    np.testing.assert_array_equal(model.params["norm"]["weight"], expected)
    files.write_json(tmp_path / "reward" / "model.json", {"config": {}, "head": "scalar"})
    files.write_json(tmp_path / "pipeline.json", {"stages": ["pretrain", "sft", "reward", "ppo"]})
    assert internlm2_jax.open(tmp_path).folder == tmp_path / "sft"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0.5], "must be integers"),
        ([], "must be integers"),
        ([[[1]]], "must be integers"),
        ([1, 999], "run from 1 to 999; the vocabulary has 256"),
        ([-1], "run from -1"),
    ],
)
def test_bad_ids(hf, ids, message):
    with pytest.raises(UserError, match=message):
        internlm2_jax.open(hf).logits(ids)


def test_unknown_folders(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        internlm2_jax.open(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="holds no model"):
        internlm2_jax.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"config.json: architecture \[\] of model_type"):
        internlm2_jax.open(tmp_path)
