from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.models.build import build
from internlm2_jax.models.config import (
    PRESETS,
    DynamicNTK,
    from_hf,
    from_json,
    preset,
    to_hf,
    to_json,
)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("internlm2_1_8b", 1_889_110_016),
        ("internlm2_7b", 7_737_708_544),
        ("internlm2_20b", 19_861_149_696),
        ("internlm2_5_1m_7b", 7_737_708_544),
    ],
)
def test_published_sizes(name, count):
    assert preset(name).num_params() == count


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("change", [{}, {"bias": True}, {"tie_embeddings": True}])
def test_num_params_counts_the_arrays(head, change):
    cfg = preset("tiny", **change)
    leaves = jax.tree.leaves(build(cfg, head).abstract)
    assert sum(leaf.size for leaf in leaves) == cfg.num_params(head)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    cfg = preset(name)
    assert from_json(json.loads(json.dumps(to_json(cfg)))) == cfg


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_hf_round_trip(name, head):
    cfg = preset(name)
    config = json.loads(json.dumps(to_hf(cfg, head, cfg.dtype)))
    assert from_hf(config) == (cfg, head)


def hf(**changes):
    config = to_hf(preset("tiny"), "lm", "float32") | changes
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
        (lambda: from_hf(hf(rope_scaling={"type": "linear", "factor": 2.0})), "'linear'"),
        (lambda: from_hf(hf(rope_scaling={"type": "dynamic", "factor": 2})), "must be a float"),
        (lambda: from_hf(hf(rope_scaling={"type": "dynamic"})), "exactly 'type' and 'factor'"),
        (lambda: from_hf(hf(bias=...)), "bias is missing"),
        (lambda: from_hf(hf(hidden_act="gelu")), "hidden_act 'gelu'"),
        (lambda: from_hf(hf(architectures=["X"])), r"\['X'\] is not supported"),
        (lambda: from_hf(hf(num_attention_heads=5)), "not a multiple of 5 heads"),
        (lambda: to_hf(preset("tiny", head_dim=16), "lm", "float32"), "4 x head_dim 16"),
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
