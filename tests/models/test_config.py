from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.models.build import build
from internlm2_jax.models.config import (
    PRESETS,
    ModelConfig,
    MuP,
    from_json,
    preset,
    to_json,
)
from internlm2_jax.models.hf_config import from_hf, to_hf
from internlm2_jax.models.rope_scaling import DynamicNTK, LongRoPE, PositionInterpolation, YaRN


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("internlm2_1_8b", 1_889_110_016),
        ("internlm2_7b", 7_737_708_544),
        ("internlm2_20b", 19_861_149_696),
        ("internlm2_5_1_8b", 1_889_110_016),
        ("internlm2_5_7b", 7_737_708_544),
        ("internlm2_5_20b", 19_861_149_696),
        ("internlm2_5_1m_7b", 7_737_708_544),
    ],
)
def test_published_sizes(name, count):
    assert preset(name).num_params() == count


def test_published_sizes_of_later_models():
    """MiMo-7B with its prediction layer has 7,833 million; MiniCPM4's are named by their size."""
    trunk = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "mlp_dim": 11008}
    mimo = ModelConfig(151680, 36, 4096, **trunk, qkv_bias=True, num_mtp_layers=1)
    assert round(mimo.num_params() / 1e6) == 7833
    small = ModelConfig(73448, 24, 1024, 16, 2, 64, 4096, tie_embeddings=True)
    assert round(small.num_params() / 1e6) == 434
    large = ModelConfig(73448, 32, 4096, 32, 2, 128, 16384)
    assert large.num_params() // 10**7 == 818


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("internlm2")])
def test_tensor_parallelism_of_eight_splits_cleanly(name):
    model = build(preset(name))
    split = {"heads", "kv_heads", "mlp", "mlp_in", "vocab"}
    axes = jax.tree.leaves(model.axes, is_leaf=lambda node: isinstance(node, tuple))
    seen = set()
    for names, leaf in zip(axes, jax.tree.leaves(model.abstract), strict=True):
        for axis, size in zip(names, leaf.shape, strict=True):
            if axis in split:
                seen.add(axis)
                assert size % 8 == 0, (names, leaf.shape)
    assert seen == split


def test_the_million_token_variant():
    cfg = preset("internlm2_5_1m_7b")
    assert cfg.length_limit is None
    assert preset("tiny", rope_scaling=YaRN(4.0, 128)).length_limit == 512
    assert (cfg.rope_theta, cfg.rope_scaling) == (5e7, DynamicNTK(2.5))
    assert cfg.max_position_embeddings == 262144


OPTIONS = [
    {},
    {"bias": True},
    {"qkv_bias": True},
    {"tie_embeddings": True},
    {"num_mtp_layers": 3, "qkv_bias": True},
]


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("change", OPTIONS)
def test_num_params_counts_the_arrays(head, change):
    cfg = preset("tiny", **change)
    leaves = jax.tree.leaves(build(cfg, head).abstract)
    assert sum(leaf.size for leaf in leaves) == cfg.num_params(head)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_flops_count_the_keys_seen(window):
    cfg = preset("tiny")
    if window:
        cfg = preset("tiny", attention_pattern=("sliding", "full"), sliding_window=window)
    length = 7
    keys = [sum(min(t + 1, w or t + 1) for t in range(length)) for w in (window, None)]
    attention = 4 * 4 * 8 * sum(keys) / length  # two layers
    matrices = 2 * (cfg.num_params() - cfg.vocab_size * cfg.embed_dim)
    assert cfg.forward_flops(length) == pytest.approx(matrices + attention)


@pytest.mark.parametrize(
    "cfg",
    [
        *map(preset, PRESETS),
        preset("tiny", rope_scaling=YaRN(4.0, 128), mup=MuP(12.0, 1.4, 16)),
        preset("tiny", rope_scaling=LongRoPE((1.0,) * 4, (2.0,) * 4, 128), mup=MuP()),
        preset("tiny", rope_scaling=PositionInterpolation(2.0), num_mtp_layers=1),
        preset("tiny", attention_pattern=("sliding", "full"), sliding_window=16),
    ],
    ids=lambda cfg: f"{cfg.vocab_size}-{type(cfg.rope_scaling).__name__}",
)
def test_json_round_trip(cfg):
    assert from_json(json.loads(json.dumps(to_json(cfg)))) == cfg


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("head", "layout"), [("lm", "internlm2"), ("scalar", "internlm2"), ("lm", "llama")]
)
def test_hf_round_trip(name, head, layout):
    cfg = preset(name)
    config = json.loads(json.dumps(to_hf(cfg, head, cfg.dtype, layout)))
    assert from_hf(config) == (cfg, head)


@pytest.mark.parametrize(
    ("change", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"bias": True, "tie_embeddings": True, "head_dim": 16}, "LlamaForCausalLM"),
        ({"rope_scaling": YaRN(4.0, 128)}, "LlamaForCausalLM"),
        ({"qkv_bias": True}, "Qwen2ForCausalLM"),
        ({"qkv_bias": True, "num_mtp_layers": 1}, "MiMoForCausalLM"),
        ({"mup": MuP(12, 1.4, 256), "tie_embeddings": True}, "MiniCPMForCausalLM"),
    ],
)
def test_llama_layout_takes_the_architecture_that_fits(change, architecture):
    cfg = preset("tiny", **change)
    config = json.loads(json.dumps(to_hf(cfg, "lm", "float32", "llama")))
    assert config["architectures"] == [architecture]
    assert from_hf(config) == (cfg, "lm")
    del config["num_key_value_heads"]  # the public default: a key/value head per query head
    assert from_hf(config)[0].num_kv_heads == cfg.num_heads


def hf(layout="internlm2", model=None, **changes):
    config = to_hf(preset("tiny", **(model or {})), "lm", "float32", layout) | changes
    return {name: value for name, value in config.items() if value is not ...}


def test_rope_scaling_forms():
    assert from_hf(hf(rope_scaling=None))[0].rope_scaling is None
    scaling = {"type": "dynamic", "factor": 2.5}
    assert from_hf(hf(rope_scaling=scaling))[0].rope_scaling == DynamicNTK(2.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("internlm2_8b"), "'internlm2_8b' .did you mean 'internlm2_"),
        (lambda: preset("tiny", num_layer=3), "did you mean 'num_layers'"),
        (lambda: preset("tiny", num_heads=6, num_kv_heads=4), "num_heads 6 is not a multiple"),
        (lambda: preset("tiny", num_layers=0), "num_layers is 0"),
        (lambda: preset("tiny", head_dim=31), "head_dim 31 is odd"),
        (lambda: preset("tiny", dtype="float16"), "choose one of float32, bfloat16"),
        (lambda: preset("tiny", rope_theta=-1.0), "rope_theta is -1.0"),
        (lambda: DynamicNTK(0.5), "factor is 0.5"),
        (lambda: from_json([1]), "expected a JSON object"),
        (lambda: from_json({"vocab_size": 3}), "num_layers.* is missing"),
        (lambda: preset("tiny", bias=True, qkv_bias=True), "bias and qkv_bias are both set"),
        (lambda: preset("tiny", attention_pattern=("wide",)), "it lists full and sliding"),
        (lambda: preset("tiny", sliding_window=4), "a window needs sliding layers"),
        (lambda: preset("tiny", attention_pattern=("sliding",)), "sliding_window is None"),
        (
            lambda: preset("tiny", attention_pattern=("full",) * 3),
            "attention_pattern has 3 layers, which does not divide num_layers 2",
        ),
        (lambda: preset("tiny", num_mtp_layers=-1), "num_mtp_layers is -1"),
        (lambda: preset("tiny", mup={"scale": 2.0}), "did you mean 'scale_emb'"),
        (lambda: MuP(scale_depth=0.0), "scale_depth is 0.0"),
        (lambda: from_hf(hf(rope_scaling={"type": "su", "factor": 2.0})), "'su' is unknown"),
        (lambda: from_hf(hf(rope_scaling={"type": "dynamic", "factor": 2})), "must be a float"),
        (lambda: from_hf(hf(rope_scaling={"type": "dynamic"})), "'dynamic' needs factor"),
        (lambda: from_hf(hf(rope_scaling={"factor": 2.0})), "has no type; it is one of linear"),
        (lambda: from_hf(hf(rope_scaling="dynamic")), "'dynamic'; it must be null or an object"),
        (
            lambda: from_hf(hf(rope_scaling={"type": "yarn", "rope_type": "linear"})),
            "type 'yarn' and rope_type 'linear'",
        ),
        (
            lambda: from_hf(hf("llama", rope_scaling={"rope_type": "llama3", "factor": 8.0})),
            "config.json: rope_scaling type 'llama3' is unknown; there are linear, dynamic, yarn",
        ),
        (
            lambda: from_hf(
                hf("llama", rope_scaling={"type": "yarn", "factor": 2.0, "truncate": False})
            ),
            "truncate false",
        ),
        (lambda: from_hf(hf("llama", mlp_bias=True)), "mlp_bias True is not supported"),
        (
            lambda: from_hf(hf("llama", {"qkv_bias": True}, use_sliding_window=True)),
            "use_sliding_window True",
        ),
        (
            lambda: from_hf(hf("llama", layer_types=["sliding_attention"] * 2)),
            "layer_types other than",
        ),
        (lambda: from_hf(hf("llama", num_key_value_heads=3)), "num_attention_heads 4 is not a mul"),
        (lambda: from_hf(hf(vocab_size=-1)), "config.json: model config: vocab_size is -1"),
        (lambda: from_hf(hf(bias=...)), "bias is missing"),
        (
            lambda: from_hf(hf(max_position_embeddings="4k")),
            "max_position_embeddings is '4k', not a",
        ),
        (lambda: from_hf(hf(rope_theta=None)), "rope_theta is None, not a number"),
        (lambda: from_hf(hf(hidden_act="gelu")), "hidden_act 'gelu'"),
        (
            lambda: from_hf(hf(architectures=["X"])),
            r"architecture \['X'\] of model_type 'internlm2'",
        ),
        (
            lambda: from_hf(hf(num_attention_heads=5)),
            "hidden_size 32 is not a multiple of num_attention_heads 5",
        ),
        (lambda: to_hf(preset("tiny", head_dim=16), "lm", "float32"), "optional parts head_dim"),
        (
            lambda: to_hf(preset("tiny", rope_scaling=YaRN(2.0, 8)), "lm", "float32"),
            "layout 'internlm2' .* optional parts rope_scaling",
        ),
        (
            lambda: hf("llama", {"attention_pattern": ["sliding"], "sliding_window": 4}),
            "optional parts attention_pattern",
        ),
        (lambda: hf("llama", {"num_mtp_layers": 1}), "optional parts num_mtp_layers; there are"),
        (lambda: to_hf(preset("tiny"), "scalar", "float32", "llama"), "'scalar' head .*the other"),
    ],
)
def test_errors_name_the_field_and_the_mend(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_rope_base_changes_without_parameters():
    cfg = preset("tiny")
    longer = dataclasses.replace(cfg, rope_theta=1e6)
    assert jax.tree.map(lambda a: a.shape, build(cfg).abstract) == jax.tree.map(
        lambda a: a.shape, build(longer).abstract
    )
