"""Layouts and meshes: what goes out in one way comes back in the other, slice by slice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.models import convert
from internlm2_jax.models.build import Model, build
from internlm2_jax.models.config import MuP, preset
from internlm2_jax.models.hf_config import to_hf
from internlm2_jax.models.rope_scaling import DynamicNTK
from internlm2_jax.models.tensor_files import Reader

GOLDEN = Path(__file__).parents[1] / "golden"
LOGITS, HIDDEN, PREDICT, UNEMBED = (
    jax.jit(function, static_argnums=0)
    for function in (Model.logits, Model.hidden, Model.mtp_hidden, Model.unembed)
)
CFG = preset("tiny", rope_scaling=DynamicNTK(2.0))


def random_params(cfg):
    random = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), build(cfg).abstract
    )


@pytest.mark.parametrize("name", ["minicpm_dense_tiny", "minicpm_longrope_tiny", "mimo_trunk_tiny"])
def test_later_models_of_the_family(shared, tmp_path, name):
    """Their logits are those of the public implementations, and a saved file is the same file."""
    source = shared / "data/parity" / name
    cfg, params = convert.load_hf(source)
    assert (cfg.mup is not None) == name.startswith("minicpm")
    assert cfg.qkv_bias == name.startswith("mimo")
    golden = dict(np.load(source / "golden.npz"))
    for key in [key for key in golden if key.startswith("ids_")]:
        logits = LOGITS(build(cfg), params, golden[key])
        np.testing.assert_allclose(logits, golden[key.replace("ids", "logits")], atol=2e-4, rtol=0)
    convert.save_hf(tmp_path / "out", cfg, params, "float32", layout="llama")
    saved, original = ((p / "model.safetensors").read_bytes() for p in (tmp_path / "out", source))
    assert saved == original
    config = json.loads((tmp_path / "out/config.json").read_text())
    for key, value in json.loads((source / "config.json").read_text()).items():
        assert config[key] == value, key


def test_mimo_predicts_as_transformers_parts_do(tmp_path):
    """Trunk and prediction layers, loaded by their public names, against tests/golden/mimo.npz."""
    spec = importlib.util.spec_from_file_location("make_mimo", GOLDEN / "make_mimo.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    sizes = make.CONFIG
    cfg = preset(
        "tiny",
        vocab_size=sizes["vocab_size"],
        embed_dim=32,
        mlp_dim=48,
        max_position_embeddings=64,
        rope_theta=640000.0,
        qkv_bias=True,
        num_mtp_layers=make.PREDICTIONS,
    )
    convert.save_hf(tmp_path / "a", cfg, random_params(cfg), "float32", layout="llama")
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["architectures"] == ["MiMoForCausalLM"]
    assert {key: config[key] for key in sizes} == sizes
    named = load_file(tmp_path / "a/model.safetensors")
    theirs = {name: make.weight(name, value.shape) for name, value in named.items()}
    save_file(theirs, tmp_path / "a/model.safetensors")
    found, params = convert.load_hf(tmp_path / "a")
    assert found == cfg
    model, golden = build(cfg), dict(np.load(GOLDEN / "mimo.npz"))
    tokens = jnp.asarray(make.tokens())
    hidden = HIDDEN(model, params, tokens)
    np.testing.assert_allclose(UNEMBED(model, params, hidden), golden["logits"], atol=2e-5)
    for k, state in enumerate(PREDICT(model, params, tokens, hidden), start=1):
        got = UNEMBED(model, params, state)
        np.testing.assert_allclose(got, golden[f"mtp_logits_{k}"], atol=5e-5)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bias": True, "tie_embeddings": True, "head_dim": 16},
        {"qkv_bias": True},
        {"qkv_bias": True, "num_mtp_layers": 2},
        {"mup": MuP(12, 1.4, 16)},
    ],
    ids=lambda change: ",".join(change) or "plain",
)
def test_llama_round_trip(tmp_path, change):
    cfg = preset("tiny", **change)
    params = random_params(cfg)
    convert.save_hf(tmp_path / "a", cfg, params, "float32", layout="llama")
    found, loaded = convert.load_hf(tmp_path / "a")
    assert found == cfg
    jax.tree.map(np.testing.assert_array_equal, params, loaded)


def test_llama_export_splits_wqkv(tmp_path):
    """The fused matrix cut by hand, as the paper groups it, is what a Llama runtime is given."""
    params = random_params(CFG)
    for layout in ("internlm2", "llama"):
        convert.save_hf(tmp_path / layout, CFG, params, "float32", layout=layout)
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in ("internlm2", "llama"))
    for layer in range(CFG.num_layers):
        fused = ours[f"model.layers.{layer}.attention.wqkv.weight"].reshape(2, 4, 8, 32)
        attention = f"model.layers.{layer}.self_attn."
        for name, slots in (("q", fused[:, :2]), ("k", fused[:, 2]), ("v", fused[:, 3])):
            got = theirs[f"{attention}{name}_proj.weight"]
            np.testing.assert_array_equal(got, slots.reshape(-1, 32))
        same = theirs[f"model.layers.{layer}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(same, ours[f"model.layers.{layer}.feed_forward.w2.weight"])
    assert json.loads((tmp_path / "llama/config.json").read_text())["model_type"] == "llama"
    cfg, loaded = convert.load_hf(tmp_path / "llama")
    assert cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, params, loaded)


def test_transformers_reads_the_export(tmp_path):
    """Where transformers and torch are installed: its Llama gives our logits."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    params = jax.tree.map(lambda leaf: 0.2 * leaf, random_params(CFG))
    convert.save_hf(tmp_path / "a", CFG, params, "float32", layout="llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 20))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(LOGITS(build(CFG), params, tokens), expected, atol=2e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------- on a mesh


@pytest.fixture
def counted(monkeypatch):
    """Elements read from files so far, in a list of one."""
    total, read = [0], Reader.read

    def counting(self, name, *index):
        value = read(self, name, *index)
        total[0] += value.size
        return value

    monkeypatch.setattr(Reader, "read", counting)
    return total


@pytest.mark.parametrize("files_layout", ["internlm2", "llama"])
@pytest.mark.parametrize("layout", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_import_and_export_on_a_mesh(tmp_path, counted, files_layout, layout):
    """Every entry is read once although eight devices take their slices, and lands in its place."""
    cfg = preset("tiny", bias=True)
    params = random_params(cfg)
    convert.save_hf(tmp_path / "a", cfg, params, "float32", layout=files_layout)
    mesh = sharding.Layout.parse(layout).mesh()
    model = build(cfg)
    places = sharding.shardings(model.axes, mesh)
    _, loaded = convert.load_hf(tmp_path / "a", places)
    assert counted[0] == cfg.num_params()
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == places
    convert.save_hf(tmp_path / "b", cfg, loaded, "float32", layout=files_layout)
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b
    with jax.set_mesh(mesh):  # as inside a run
        _, again = convert.load_hf(tmp_path / "a", places)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_slices_of_every_axis(tmp_path, counted):
    """Head dimensions cut too: more is read than kept, but what is kept is right."""
    params = random_params(CFG)
    convert.save_hf(tmp_path / "a", CFG, params, "float32")
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"))
    cuts = {4: P(None, "x", "y", "z"), 3: P(None, "x", ("y", "z")), 2: P(("x", "y"), "z")}
    places = jax.tree.map(
        lambda leaf: NamedSharding(mesh, cuts[leaf.ndim] if leaf.size > 256 else P()), params
    )
    _, loaded = convert.load_hf(tmp_path / "a", places)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    assert counted[0] > CFG.num_params()
    places["layers"]["mlp"]["up"]["weight"] = NamedSharding(mesh, P("x"))
    with pytest.raises(UserError, match=r"layers/mlp/up/weight: the layer axis is cut over .*'x'"):
        convert.load_hf(tmp_path / "a", places)


def test_refused_exports(tmp_path):
    cfg = preset("tiny", attention_pattern=("sliding", "full"), sliding_window=4)
    with pytest.raises(UserError, match=r"layout 'llama' holds this model.*attention_pattern"):
        convert.save_hf(tmp_path / "a", cfg, random_params(cfg), layout="llama")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="layout 'internlm2'"):
        to_hf(preset("tiny", qkv_bias=True), "lm", "float32")
