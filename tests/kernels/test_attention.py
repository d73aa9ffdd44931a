"""Every attention implementation that can run here against float64, and the choice among them."""

from __future__ import annotations

import functools
import importlib.util
import logging

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.kernels import adapters, attention
from internlm2_jax.kernels.flash_gqa import Blocks, flash_gqa

IMPLEMENTATIONS = {
    "reference": attention.reference,
    "blockwise": attention.blockwise,
    "flash_gqa": functools.partial(flash_gqa, blocks=Blocks(128, 128), interpret=True),
    "splash": functools.partial(adapters.splash, interpret=True),
    "splash, fused": functools.partial(adapters.splash, fused_backward=True, interpret=True),
    "tokamax": adapters.tokamax,
}


def arrays(length, heads, kv_heads, dim, dtype="float32", segments=0, batch=2):
    rng = np.random.default_rng(length)
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dout = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    ids = None
    if segments:
        ids = np.sort(rng.integers(0, segments, (batch, length)), axis=1).astype(np.int32)
    return q, k, v, dout, ids


def check(name, q, k, v, dout, ids, window=None):
    if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
        pytest.skip("tokamax is not installed: pip install -e '.[tokamax]' with Python 3.12")

    @oracle.quick
    def run(q, k, v, dout):
        function = functools.partial(IMPLEMENTATIONS[name], segment_ids=ids, window=window)
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    got = run(q, k, v, dout)
    assert all(x.dtype == q.dtype for x in got)
    mask = {"q_segment_ids": ids, "kv_segment_ids": ids, "window": window}
    out, _, *gradients = oracle.attention(q, k, v, dout, **mask)
    names = ("out", "dq", "dk", "dv")
    tolerance = "bfloat16" if "splash" in name else q.dtype  # its products are bfloat16's
    oracle.assert_close(got, (out, *gradients), tolerance, names)


@pytest.mark.parametrize("name", ["reference", "blockwise"])
@pytest.mark.parametrize("window", [None, 9])
def test_conformance(name, window, monkeypatch):
    monkeypatch.setattr(attention, "MIN_BLOCK", 8)  # several blocks, the last one short
    monkeypatch.setattr(attention, "MAX_BLOCKS", 3)
    check(name, *arrays(19, 6, 2, 8, segments=3), window=window)
    check(name, *arrays(19, 4, 4, 8), window=window)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("segments", [0, 4])
def test_conformance_widely(name, groups, segments):
    window = 100 if groups == 4 else None
    dtype = "bfloat16" if groups == 8 else "float32"
    check(name, *arrays(256, 2 * groups, 2, 64, dtype, segments, batch=1), window=window)


def test_large_scores_stay_finite():
    q = jnp.full((1, 4, 2, 8), 1e4)
    out = attention.reference(q, q[:, :, :1], jnp.ones((1, 4, 1, 8)))
    np.testing.assert_allclose(out, 1.0)


@pytest.mark.parametrize(("length", "choice"), [(127, "reference"), (128, "blockwise")])
def test_choice_on_a_cpu_is_logged_once(length, choice, caplog):
    q, k, v, *_ = arrays(length, 2, 1, 8)
    attention._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=attention.__name__):
        for _ in range(2):
            jax.eval_shape(attention.dispatch, q, k, v)
    assert caplog.messages == [f"attention: auto -> {choice} on cpu"]


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("flash", r"no attention implementation 'flash'; there are auto, reference, blockwise"),
        ("flash_gqa", "attention 'flash_gqa' runs on tpu, not on cpu; use auto"),
        ("splash", "attention 'splash' runs on tpu, not on cpu; use auto"),
        ("cudnn", "attention 'cudnn' runs on gpu, not on cpu; use auto"),
        ("mosaic_gpu", "attention 'mosaic_gpu' runs on gpu, not on cpu; use auto"),
    ],
)
def test_an_implementation_that_cannot_run_here(impl, message):
    q, k, v, *_ = arrays(4, 2, 1, 8)
    with pytest.raises(UserError, match=message):
        attention.dispatch(q, k, v, impl=impl)


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is not None, reason="tokamax is installed")
def test_tokamax_absent():
    q, k, v, *_ = arrays(4, 2, 1, 8)
    with pytest.raises(UserError, match=r"tokamax: .*pip install"):
        attention.dispatch(q, k, v, impl="tokamax")


def test_what_adapters_refuse():
    q, k, v, _, ids = arrays(100, 2, 1, 64, segments=2)
    with pytest.raises(UserError, match="splash: rows of 100"):
        adapters.splash(q, k, v)
    with pytest.raises(UserError, match="cudnn: no segment ids"):
        adapters.cudnn(q, k, v, segment_ids=ids)
    with pytest.raises(UserError, match="cudnn: takes bfloat16 or float16, got float32"):
        adapters.cudnn(q, k, v)


def test_bad_input():
    q, k, v, *_ = arrays(4, 4, 3, 8)
    with pytest.raises(UserError, match="4 query heads do not divide into 3"):
        attention.dispatch(q, k, v)
    with pytest.raises(UserError, match="window=0"):
        attention.dispatch(q, k[:, :, :1], v[:, :, :1], window=0)


def test_the_mesh_says_the_platform():
    """A program for the devices of a mesh is not for the default ones; no TPU is needed to see."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    q, k, v, *_ = arrays(200, 2, 1, 64, "bfloat16")
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(attention.dispatch).trace(q, k, v).lower(lowering_platforms=("tpu",))
    assert "flash_gqa_forward" in lowered.as_text()
    assert "flash_gqa" not in jax.jit(attention.dispatch).lower(q, k, v).as_text()
