"""RoPE scalings against numpy formulas of their papers and against numbers of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.models import rope, rope_scaling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset
from internlm2_jax.models.hf_config import from_hf, to_hf
from internlm2_jax.models.rope_scaling import DynamicNTK, LongRoPE, PositionInterpolation, YaRN

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rope.json").read_text())["cases"]
H, THETA, M = 16, 1e4, 4096
PLAIN = THETA ** -(np.arange(0, H, 2) / H)
YARN = YaRN(4.0, M)


def config(scaling, **changes):
    fields = {"head_dim": H, "rope_theta": THETA, "max_position_embeddings": M} | changes
    return preset("tiny", rope_scaling=scaling, **fields)


def frequencies(cfg, *lengths):
    return np.asarray(rope.frequencies(cfg, jnp.asarray(lengths)))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: c["rope_scaling"]["rope_type"])
def test_as_transformers_has_it(case):
    public = to_hf(config(None), "lm", "float32", "llama")
    public |= {k: case[k] for k in ("rope_scaling", "rope_theta", "max_position_embeddings")}
    cfg, _ = from_hf(public)
    (got,) = frequencies(cfg, case["length"])
    np.testing.assert_allclose(got, case["inverse_frequencies"], rtol=2e-6)
    np.testing.assert_allclose(rope.attention_factor(cfg), case["attention_factor"], rtol=1e-12)
    written = to_hf(cfg, "lm", "float32", "llama")
    assert from_hf(written)[0] == cfg
    # what transformers 5 writes: another name, with the base inside
    scaling, base = written.pop("rope_scaling"), written.pop("rope_theta")
    assert from_hf(written | {"rope_parameters": {**scaling, "rope_theta": base}})[0] == cfg


def test_no_scaling():
    np.testing.assert_allclose(frequencies(config(None), 1, 9 * M), [PLAIN, PLAIN], rtol=1e-6)


def test_position_interpolation_squeezes_positions():
    cfg = config(PositionInterpolation(4.0))
    positions, lengths = jnp.asarray([[0, 4, 400, 8000]]), jnp.asarray([8001])
    squeezed = rope.tables(cfg, positions, lengths)
    plain = rope.tables(config(None), positions // 4, lengths)
    np.testing.assert_allclose(squeezed, plain, atol=2e-4)


def test_dynamic_ntk_follows_each_row():
    got = frequencies(config(DynamicNTK(2.0)), 1, M, M + 1, 3 * M)
    for row, n in zip(got, (1, M, M + 1, 3 * M), strict=True):
        base = THETA * max(2.0 * n / M - 1.0, 1.0) ** (H / (H - 2))
        np.testing.assert_allclose(row, base ** -(np.arange(0, H, 2) / H), rtol=2e-6)


def test_yarn_by_parts():
    (got,) = frequencies(config(YARN, max_position_embeddings=4 * M), 16)
    turns = M * PLAIN / (2 * math.pi)
    np.testing.assert_allclose(got[turns > 32], PLAIN[turns > 32], rtol=1e-6)  # as trained
    np.testing.assert_allclose(got[turns < 1], PLAIN[turns < 1] / 4, rtol=1e-6)  # interpolated
    between = (turns > 1) & (turns < 32)
    assert between.any()
    assert (got[between] < PLAIN[between]).all() and (got[between] > PLAIN[between] / 4).all()


def test_attention_factors():
    assert rope.attention_factor(config(None)) == 1.0
    assert rope.attention_factor(config(YARN)) == pytest.approx(0.1 * math.log(4) + 1)
    assert rope.attention_factor(config(YaRN(4.0, M, attention_factor=0.7))) == 0.7
    cos, sin = rope.tables(config(YARN), jnp.asarray([[5]]), jnp.asarray([6]))
    size = np.sqrt(np.square(cos) + np.square(sin))
    np.testing.assert_allclose(size, 0.1 * math.log(4) + 1, rtol=1e-6)  # scores grow by its square
    e = tuple(np.ones(H // 2))
    same = LongRoPE(e, e, M)
    assert rope.attention_factor(config(same)) == 1.0  # nothing is stretched
    longer = config(same, max_position_embeddings=32 * M)
    assert rope.attention_factor(longer) == pytest.approx(math.sqrt(1 + math.log(32) / math.log(M)))


def test_longrope_takes_its_factors_by_length():
    short, long = tuple(np.linspace(1, 2, H // 2)), tuple(np.linspace(1, 31, H // 2))
    got = frequencies(config(LongRoPE(short, long, M)), M, M + 1)
    np.testing.assert_allclose(got, [PLAIN / short, PLAIN / long], rtol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        PositionInterpolation(2.0),
        DynamicNTK(2.0),
        YaRN(2.0, 8, attention_factor=1.5),
        LongRoPE((1.0,) * 4, (3.0,) * 4, 8),
    ],
    ids=rope_scaling.kind,
)
def test_a_row_is_rotated_for_the_length_it_is_told(scaling):
    """Logits of a prefix equal those of the whole row when both are rotated for its length."""
    import jax

    cfg = preset("tiny", initializer_range=0.2, rope_scaling=scaling, max_position_embeddings=8)
    model = build(cfg)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, cfg.vocab_size)
    logits = jax.jit(model.logits)
    told = logits(params, tokens[:, :7], rope_length=jnp.asarray([12]))
    np.testing.assert_allclose(told, logits(params, tokens)[:, :7], atol=2e-5)
    if isinstance(scaling, DynamicNTK | LongRoPE):
        assert np.abs(told - logits(params, tokens[:, :7])).max() > 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "ntk", "factor": 2.0}, "type 'ntk' is unknown; there are linear, dynamic, yarn"),
        ({"type": "linear"}, "'linear' needs factor"),
        ({"type": "dynamic", "factor": 2.0, "alpha": 1.0}, "'dynamic' has no field alpha"),
        ({"type": "dynamic", "factor": 2}, "factor is 2; it must be a float"),
        ({"type": "linear", "factor": 0.5}, "factor is 0.5"),
        ({"type": "yarn", "factor": 2.0}, "needs original_max_position_embeddings"),
        (
            {
                "type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 1.0,
            },
            "beta_fast 1.0 is not above beta_slow 1.0",
        ),
        (
            {
                "type": "longrope",
                "short_factor": [1.0],
                "long_factor": [1.0, 2.0],
                "original_max_position_embeddings": 8,
            },
            "short_factor has 1 entries and long_factor 2",
        ),
        (
            {
                "type": "longrope",
                "short_factor": [1.0],
                "long_factor": [0.0],
                "original_max_position_embeddings": 8,
            },
            "long_factor is 0.0",
        ),
        ("dynamic", "'dynamic'; it must be null or an object"),
    ],
)
def test_what_is_not_understood_is_named(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        rope_scaling.from_json(fields, "model.json")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.json: ")
    with pytest.raises(UserError, match="long_factor has 3 entries; head_dim 16 has 8 pairs"):
        config(LongRoPE((1.0,) * 3, (1.0,) * 3, 8))


def test_saved_runs_without_a_type_are_dynamic():
    assert rope_scaling.from_json({"factor": 2.0}, "model.json") == DynamicNTK(2.0)
