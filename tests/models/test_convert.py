"""Hugging Face checkpoints: outputs of the public implementation, and files byte for byte."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.infer import engine
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models import convert, tensor_files
from internlm2_jax.models.build import Model, build, head_of
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.rope_scaling import DynamicNTK

LOGITS = jax.jit(Model.logits, static_argnums=0)
SCORES = jax.jit(Model.scores, static_argnums=0)
LM = ["internlm2_tiny", "internlm2_nonscaled"]


@pytest.fixture(scope="module")
def opened(shared: Path):
    """name -> (model, params, goldens), each loaded once."""
    cache = {}

    def get(name: str):
        if name not in cache:
            cfg, params = convert.load_hf(shared / "data/parity" / name)
            golden = dict(np.load(shared / "data/parity" / name / "golden.npz"))
            cache[name] = build(cfg, head_of(params)), params, golden
        return cache[name]

    return get


@pytest.mark.parametrize("name", LM)
def test_logits_at_every_length(opened, name):
    model, params, golden = opened(name)
    lengths = [key.removeprefix("ids_") for key in golden if key.startswith("ids_")]
    assert lengths
    for length in lengths:
        logits = LOGITS(model, params, golden[f"ids_{length}"])
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, golden[f"logits_{length}"], atol=2e-4, rtol=0)


def test_lengths_cover_dynamic_ntk(opened):
    model, params, golden = opened("internlm2_tiny")
    assert model.cfg.max_position_embeddings < 100
    unscaled = jnp.ones(2, jnp.int32)
    logits = LOGITS(model, params, golden["ids_100"], rope_length=unscaled)
    assert np.abs(logits - golden["logits_100"]).max() > 2e-4  # the goldens do see the scaling


@pytest.mark.parametrize("name", LM)
def test_left_padded_batch(opened, name):
    model, params, golden = opened(name)
    mask = golden["pad_mask"]
    positions = np.where(mask > 0, np.cumsum(mask, axis=1) - 1, 0)
    logits = LOGITS(model, params, golden["pad_ids"], positions=positions, segment_ids=mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(logits[real], golden["pad_logits"][real], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", LM)
def test_greedy_continuation(opened, name):
    """Theirs recomputes the whole row each step, so the base follows the length; a row that stays
    below max_position_embeddings, as this one does, has one base and the engine must agree."""
    model, params, golden = opened(name)
    prompt, full = golden["gen_prompt"][0], golden["gen_full"][0]
    assert len(full) <= model.cfg.max_position_embeddings
    new = len(full) - len(prompt)
    out = engine.generate(
        model, params, [prompt.tolist()], max_new_tokens=new, sampling=Sampling(0.0)
    )
    assert out.tokens[0] == full[len(prompt) :].tolist()


@pytest.mark.parametrize("name", LM)
def test_loss_and_gradient_norms(opened, name):
    model, params, golden = opened(name)
    ids = golden[min((k for k in golden if k.startswith("ids_")), key=lambda k: int(k[4:]))]

    def loss(params):
        logprobs = jax.nn.log_softmax(model.logits(params, ids)[:, :-1])
        return -jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    ours = {name: np.linalg.norm(make()) for name, make in convert.public(model.cfg, grads)}
    theirs = {k.removeprefix("gradnorm/"): v for k, v in golden.items() if "gradnorm/" in k}
    assert ours.keys() == theirs.keys()
    for key, norm in theirs.items():
        np.testing.assert_allclose(ours[key], norm, rtol=1e-4, err_msg=key)


def test_reward_scores(opened):
    model, params, golden = opened("internlm2_reward_tiny")
    mask = golden["mask"]
    positions = np.where(mask > 0, np.cumsum(mask, axis=1) - 1, 0)
    scores = SCORES(model, params, golden["ids"], positions=positions, segment_ids=mask)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    rows = np.arange(len(last))
    np.testing.assert_allclose(scores[rows, last], golden["scores"][:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*LM, "internlm2_reward_tiny"])
def test_saving_gives_the_same_file(opened, shared, tmp_path, name):
    model, params, _ = opened(name)
    convert.save_hf(tmp_path / "out", model.cfg, params, "float32")
    source = shared / "data/parity" / name
    saved, original = ((p / "model.safetensors").read_bytes() for p in (tmp_path / "out", source))
    assert saved == original
    config = json.loads((tmp_path / "out/config.json").read_text())
    for key, value in json.loads((source / "config.json").read_text()).items():
        if key != "reward_token_id":
            assert config[key] == value, key


CFG = ModelConfig(
    vocab_size=48,
    num_layers=3,
    embed_dim=24,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=40,
    bias=True,
    max_position_embeddings=64,
    rope_scaling=DynamicNTK(2.0),
)


def write(folder: Path, dtype: str = "bfloat16", cfg: ModelConfig = CFG):
    random = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), build(cfg).abstract
    )
    convert.save_hf(folder, cfg, params, dtype)
    return params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_with_biases(tmp_path, dtype):
    params = write(tmp_path / "a", dtype)
    cfg, loaded = convert.load_hf(tmp_path / "a")
    assert cfg.bias and cfg.rope_scaling == CFG.rope_scaling
    if dtype == "float32":
        jax.tree.map(np.testing.assert_array_equal, params, loaded)
    convert.save_hf(tmp_path / "b", cfg, loaded, dtype)
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


def test_wqkv_rows_are_grouped(tmp_path):
    params = write(tmp_path / "a", "float32")
    fused = load_file(tmp_path / "a/model.safetensors")["model.layers.1.attention.wqkv.weight"]
    slots = fused.reshape(2, 5, 4, 24)  # groups of 3 query heads, a key head, a value head
    attention = params["layers"]["attention"]
    np.testing.assert_array_equal(slots[1, 2].T, attention["q"]["weight"][1][:, 5])
    np.testing.assert_array_equal(slots[1, 3].T, attention["k"]["weight"][1][:, 1])
    np.testing.assert_array_equal(slots[0, 4].T, attention["v"]["weight"][1][:, 0])


def test_shards_and_index(tmp_path, monkeypatch):
    params = write(tmp_path / "one", "float32")
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 20_000)
    convert.save_hf(tmp_path / "many", CFG, params, "float32")
    index = json.loads((tmp_path / "many" / convert.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert all(f.stat().st_size < 24_000 for f in (tmp_path / "many").glob("*.safetensors"))
    _, loaded = convert.load_hf(tmp_path / "many")
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    held = {name for path in shards for name in load_file(path)}
    assert held == set(index["weight_map"])
    for path in shards:  # the bytes are those of the public writer
        save_file(load_file(path), tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "theirs").read_bytes() == path.read_bytes()

    lost = shards[1].rename(tmp_path / "lost")
    with pytest.raises(UserError, match=f"{shards[1].name} is missing; .* that .*index.json names"):
        convert.load_hf(tmp_path / "many")
    lost.rename(shards[1])
    name, place = next(iter(index["weight_map"].items()))
    other = next(path.name for path in shards if path.name != place)
    for moved, found in (
        ({name: other}, f"{name} into {other}, but {place} has it"),
        ({"ghost": other}, f"ghost into {other}, but no file has it"),
    ):
        files.write_json(
            tmp_path / "many" / convert.INDEX, {"weight_map": index["weight_map"] | moved}
        )
        with pytest.raises(UserError, match=found):
            convert.load_hf(tmp_path / "many")
    files.write_json(tmp_path / "many" / convert.INDEX, {"weights": {}})
    with pytest.raises(UserError, match="has no weight_map"):
        convert.load_hf(tmp_path / "many")
    (tmp_path / "many" / convert.INDEX).unlink()
    shutil.copy(shards[0], shards[0].with_name("again.safetensors"))
    with pytest.raises(UserError, match=r"both have tensor model.*; remove one"):
        convert.load_hf(tmp_path / "many")


def damage_tensor(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: damage_tensor(f, lambda t: t.pop("output.weight")), "no tensor output.weight"),
        (
            lambda f: damage_tensor(f, lambda t: t.update({"model.norm.weight": np.ones(3, "f4")})),
            r"model.norm.weight is \[3\].*\[24\]",
        ),
        (
            lambda f: damage_tensor(f, lambda t: t.update({"extra": np.ones(3, "f4")})),
            r"tensor extra \[3\], which the model of config.json has no place for",
        ),
        (
            lambda f: damage_tensor(
                f, lambda t: t.update({"model.norm.weight": np.ones(24, "i4")})
            ),
            "model.norm.weight is I32; only F32, F16, BF16 are read",
        ),
        (lambda f: set_config(f, architectures=["GPT2LMHeadModel"]), "GPT2.*not supported"),
        (
            lambda f: set_config(f, architectures=["LlamaForCausalLM"], model_type="llama"),
            "no tensor model.embed_tokens.weight nor 28 others",
        ),
        (
            lambda f: set_config(f, num_attention_heads=5),
            "hidden_size 24 is not a multiple of num_attention_heads 5",
        ),
        (
            lambda f: set_config(f, rope_scaling={"type": "ntk", "factor": 2.0}),
            "config.json: rope_scaling type 'ntk' is unknown",
        ),
        (
            lambda f: set_config(f, num_key_value_heads=3),
            r"wqkv.bias is \[40\], but config.json makes it \[48\]; .* different models",
        ),
        (lambda f: set_config(f, num_hidden_layers=2), "no place for"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "model.safetensors").unlink(), "no .*safetensors file"),
    ],
)
def test_bad_folders_are_named(tmp_path, damage, message):
    write(tmp_path / "a", "float32")
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message) as caught:
        convert.load_hf(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(tmp_path, kept):
    write(tmp_path / "a", "float32")
    path = tmp_path / "a/model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    before = path.stat().st_size
    found = {-1: f"has {before:,} bytes, its header describes {before + 1:,}"}.get(kept, "")
    with pytest.raises(UserError, match=f"safetensors is damaged: .*{found}") as caught:
        convert.load_hf(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_corrupt_header(tmp_path):
    write(tmp_path / "a", "float32")
    path = tmp_path / "a/model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:30] = b"\xff" * 10
    path.write_bytes(data)
    assert struct.unpack("<Q", data[:8])[0] < len(data)
    with pytest.raises(UserError, match="safetensors is damaged"):
        convert.load_hf(tmp_path / "a")


def test_output_is_whole_or_absent(tmp_path, monkeypatch):
    params = write(tmp_path / "a")
    with pytest.raises(UserError, match="not an empty folder"):
        convert.save_hf(tmp_path / "a", CFG, params)

    def fail(*args, **kwargs):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(tensor_files.Writer, "write", fail)
    with pytest.raises(RuntimeError):
        convert.save_hf(tmp_path / "b", CFG, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    with pytest.raises(UserError, match="no tensor dtype 'int8'"):
        convert.save_hf(tmp_path / "b", CFG, params, "int8")
    with pytest.raises(UserError, match="no layout 'gguf'; there are internlm2, llama"):
        convert.save_hf(tmp_path / "b", CFG, params, layout="gguf")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no parameter dtype 'float16'"):
        convert.load_hf(tmp_path / "a", dtype="float16")


def test_half_precision_files_load_as_float32(tmp_path):
    write(tmp_path / "a", "bfloat16")
    assert load_file_dtypes(tmp_path / "a/model.safetensors") == {"BF16"}
    cfg, loaded = convert.load_hf(tmp_path / "a")
    assert cfg.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
    _, kept = convert.load_hf(tmp_path / "a", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype("float32")), loaded, kept)
    convert.save_hf(tmp_path / "b", cfg, kept, "bfloat16")
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b
    weight = np.asarray(loaded["norm"]["weight"])
    np.testing.assert_array_equal(weight, weight.astype(ml_dtypes.bfloat16).astype(np.float32))


def load_file_dtypes(path: Path) -> set[str]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def test_theirs_past_max_position_follows_the_length(opened):
    """A row rotated for a length equals theirs at that length, and only there."""
    model, params, golden = opened("internlm2_tiny")
    ids = golden["ids_100"]
    logits = LOGITS(model, params, ids[:, :70], rope_length=jnp.full(2, 100))
    np.testing.assert_allclose(logits, golden["logits_100"][:, :70], atol=2e-4, rtol=0)


def test_loading_leaves_the_folder_alone(shared, tmp_path):
    source = shared / "data/parity/internlm2_tiny"
    shutil.copytree(source, tmp_path / "a")
    before = sorted(p.name for p in (tmp_path / "a").iterdir())
    convert.load_hf(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == before
