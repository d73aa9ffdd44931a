"""The model as functions: packing, caches, gradients, heads, initial values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.infer import cache as kv
from internlm2_jax.models import decoder, rope
from internlm2_jax.models.build import build, head_of, swap_head
from internlm2_jax.models.config import preset
from internlm2_jax.models.rope_scaling import DynamicNTK

CFG = preset("tiny", initializer_range=0.2)


@pytest.fixture(scope="module")
def model():
    return build(CFG)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def logits(model):
    return jax.jit(model.logits)


def ids(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 1, CFG.vocab_size)


def test_causal(params, logits):
    tokens = ids(1, 12)
    changed = tokens.at[0, 8].set((tokens[0, 8] + 1) % CFG.vocab_size)
    a, b = logits(params, tokens), logits(params, changed)
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert np.abs(a[:, 8:] - b[:, 8:]).max() > 1e-3


def test_packed_equals_unpacked(params, logits):
    """Documents side by side, with padding, positions restarting: each as if alone."""
    lengths = (5, 9, 4)
    documents = [ids(1, n, seed=n) for n in lengths]
    tokens = jnp.pad(jnp.concatenate(documents, axis=1), ((0, 0), (0, 2)))
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    positions = np.concatenate([*map(np.arange, lengths), [0, 0]])[None]
    packed = logits(params, tokens, positions=positions, segment_ids=segments)
    assert np.isfinite(packed).all()
    start = 0
    for document in documents:
        alone = logits(params, document)
        part = packed[:, start : start + document.shape[1]]
        np.testing.assert_allclose(part, alone, atol=2e-5, rtol=0)
        start += document.shape[1]


@pytest.fixture(scope="module", params=[None, DynamicNTK(2.0)], ids=["fixed", "dynamic"])
def biased(request):
    cfg = preset(
        "tiny",
        initializer_range=0.2,
        rope_scaling=request.param,
        max_position_embeddings=8,
        bias=True,
    )
    model = build(cfg)
    params = jax.jit(model.init)(jax.random.key(1))
    return cfg, params, jax.jit(model.decode), jax.jit(model.logits)


@pytest.mark.parametrize("chunks", [(12,), (7, 5), (7, 1, 1, 1, 1, 1)])
def test_prefill_and_steps_equal_the_full_forward(chunks, biased):
    cfg, params, decode, logits = biased
    tokens = ids(2, 12)
    cache = kv.empty(cfg, 16, jnp.full(2, 12))
    parts, start = [], 0
    for size in chunks:
        part, cache = decode(params, tokens[:, start : start + size], cache, jnp.full(2, size))
        parts.append(part)
        start += size
    full = logits(params, tokens)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=1e-5, rtol=0)
    assert cache.used.tolist() == [12, 12]


def test_remat_and_kernels_give_the_same_gradients(params):
    tokens = ids(2, 10)
    segments = jnp.asarray([[1] * 4 + [2] * 6, [1] * 8 + [0] * 2])

    def gradients(impl: str, remat: str):
        model = build(CFG, attention=impl)

        @jax.jit
        @jax.grad
        def loss(params):
            hidden = model.hidden(params, tokens, segment_ids=segments, remat=remat)
            return jnp.square(model.unembed(params, hidden)).mean()

        return loss(params)

    expected = gradients("reference", "none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    cases = [("blockwise", "full"), *(("reference", r) for r in ("minimal", "save_qkv", "offload"))]
    for impl, remat in cases:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
            gradients(impl, remat),
            expected,
        )


def test_an_unknown_remat_policy_is_one_line(params):
    with pytest.raises(
        UserError, match="no remat policy 'some'; there are none, minimal, save_qkv"
    ):
        build(CFG).hidden(params, ids(1, 4), remat="some")


def test_heads_share_a_trunk(params):
    critic = build(CFG, "scalar")
    fresh = critic.init(jax.random.key(7))
    mixed = swap_head(params, fresh["head"])
    assert (head_of(params), head_of(mixed)) == ("lm", "scalar")
    assert mixed["layers"] is params["layers"]
    assert jax.tree.structure(mixed) == jax.tree.structure(critic.abstract)
    tokens = ids(2, 6)
    hidden = jax.jit(critic.hidden)(mixed, tokens)
    expected = np.asarray(hidden) @ np.asarray(fresh["head"]["weight"])[:, 0]
    np.testing.assert_allclose(jax.jit(critic.scores)(mixed, tokens), expected, atol=1e-5)
    with pytest.raises(UserError, match="'scalar' head"):
        critic.logits(mixed, tokens)
    with pytest.raises(UserError, match="no head"):
        build(CFG, "vector")  # type: ignore[arg-type]


def test_tied_embeddings():
    cfg = preset("tiny", tie_embeddings=True)
    model = build(cfg)
    params = model.init(jax.random.key(0))
    assert "head" not in params and head_of(params) == "lm"
    hidden = jax.jit(model.hidden)(params, ids(1, 5))
    expected = np.asarray(hidden) @ np.asarray(params["embed"]["weight"]).T
    np.testing.assert_allclose(model.unembed(params, hidden), expected, atol=1e-5)


def test_initial_values():
    cfg = preset("tiny", num_layers=4, embed_dim=128, residual_init="depth")
    layers = build(cfg).init(jax.random.key(0))["layers"]
    for leaf in (layers["attention"]["o"]["weight"], layers["mlp"]["down"]["weight"]):
        expected = 0.02 / np.sqrt(2.0 * np.arange(1, 5))
        np.testing.assert_allclose(
            np.std(leaf, axis=tuple(range(1, leaf.ndim))), expected, rtol=0.1
        )
    np.testing.assert_allclose(np.std(layers["mlp"]["up"]["weight"]), 0.02, rtol=0.05)
    assert not np.array_equal(layers["mlp"]["up"]["weight"][0], layers["mlp"]["up"]["weight"][1])
    np.testing.assert_array_equal(layers["mlp_norm"]["weight"], 1.0)


def test_bfloat16_keeps_parameters_and_logits_wide(params, logits):
    narrow = build(preset("tiny", initializer_range=0.2, dtype="bfloat16"))
    tokens = ids(2, 8)
    assert jax.eval_shape(narrow.hidden, params, tokens).dtype == jnp.bfloat16
    out = jax.jit(narrow.logits)(params, tokens)
    assert out.dtype == jnp.float32
    assert 1e-5 < np.abs(out - logits(params, tokens)).max() < 0.3


def test_rotation_is_relative():
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 8))
    products = []
    for shift in (0, 37):
        cos, sin = rope.tables(CFG, jnp.asarray([[3, 8]]) + shift, jnp.asarray([9]))
        turned = rope.rotate(x, cos, sin)
        products.append(jnp.sum(turned[0, 0] * turned[0, 1]))
    np.testing.assert_allclose(products[0], products[1], rtol=1e-4)


def test_axes_match_shapes(model):
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    axes = jax.tree.leaves(model.axes, is_leaf=is_axes)
    leaves = jax.tree.leaves(model.abstract)
    assert [len(names) for names in axes] == [leaf.ndim for leaf in leaves]
    assert model.axes["layers"]["mlp"]["gate"]["weight"] == ("layer", "embed", "mlp")
    assert build(CFG) is model


def test_a_frugal_mlp_is_the_same_mlp(monkeypatch):
    """The MLP in parts, as under `full`, against the MLP at once, gradients and all."""
    model = build(preset("tiny"))
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 0, model.cfg.vocab_size)

    def run(part):
        monkeypatch.setattr(decoder, "PART_OF_MLP", part)
        monkeypatch.setattr(decoder, "WHOLE_MLP", part)

        def loss(params):
            return jnp.mean(jnp.square(model.logits(params, tokens, remat="full")))

        scans = str(jax.make_jaxpr(loss)(params)).count("scan[")
        return scans, jax.jit(jax.value_and_grad(loss))(params)

    (one, whole), (two, parts) = run(10**6), run(8)
    assert two > one
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), whole, parts)
