"""Optional parts of the decoder: multipliers, attention pattern, biases, multi-token prediction."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.infer import cache as kv
from internlm2_jax.models import stack
from internlm2_jax.models.build import STACKED, Model, build
from internlm2_jax.models.config import MuP, preset
from internlm2_jax.models.rope_scaling import DynamicNTK

# Every option at once, so that they are seen to work together.
ALL = preset(
    "tiny",
    num_layers=4,
    initializer_range=0.2,
    qkv_bias=True,
    tie_embeddings=True,
    mup=MuP(scale_emb=3.0, scale_depth=1.4, dim_model_base=16),
    attention_pattern=("sliding", "full"),
    sliding_window=3,
    num_mtp_layers=2,
    rope_scaling=DynamicNTK(2.0),
    max_position_embeddings=8,
)


LOGITS, HIDDEN, PREDICT, UNEMBED = (
    jax.jit(f, static_argnums=0)
    for f in (Model.logits, Model.hidden, Model.mtp_hidden, Model.unembed)
)


def ids(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 1, ALL.vocab_size)


def randomised(model):
    """Parameters in which biases and norms are not at their initial values."""
    random = np.random.default_rng(1)
    noise = lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(noise, jax.device_get(model.init(jax.random.key(0))))


@pytest.fixture(scope="module")
def everything():
    model = build(ALL)
    return model, randomised(model)


# ------------------------------------------------------------------ an independent forward pass


def norm(x, weight, eps=1e-5):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def turn(x, theta):
    """x [T, H] by positions 0..T-1, rotate-half."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** -(np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=1
    )


def block(p, x, cfg, window, theta):
    length, heads, group = len(x), cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
    scale = 1.0 if cfg.mup is None else cfg.mup.scale_depth / np.sqrt(cfg.num_layers)
    h = norm(x, p["attention_norm"]["weight"])
    project = lambda n: (  # noqa: E731
        np.einsum("td,dnh->tnh", h, p["attention"][n]["weight"]) + p["attention"][n].get("bias", 0)
    )
    q, k, v = (project(n) for n in "qkv")
    back = np.arange(length)[:, None] - np.arange(length)
    seen = (back >= 0) & (back < (window or length))
    out = np.zeros_like(q)
    for n in range(heads):
        scores = turn(q[:, n], theta) @ turn(k[:, n // group], theta).T / np.sqrt(cfg.head_dim)
        weights = np.where(seen, np.exp(scores - scores.max()), 0)
        out[:, n] = weights / weights.sum(axis=1, keepdims=True) @ v[:, n // group]
    x = x + scale * np.einsum("tnh,nhd->td", out, p["attention"]["o"]["weight"])
    h = norm(x, p["mlp_norm"]["weight"])
    gate = h @ p["mlp"]["gate"]["weight"]
    gated = gate / (1 + np.exp(-gate)) * (h @ p["mlp"]["up"]["weight"])
    return x + scale * gated @ p["mlp"]["down"]["weight"]


def layer_of(tree, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf[i], np.float64), tree)


def forward(cfg, params, tokens):
    """(logits [T, V], logits of every prediction layer) in float64."""
    table = np.asarray(params["embed"]["weight"], np.float64)
    scale = 1.0 if cfg.mup is None else cfg.mup.scale_emb
    stretch = max(2.0 * len(tokens) / cfg.max_position_embeddings - 1.0, 1.0)
    theta = cfg.rope_theta * stretch ** (cfg.head_dim / (cfg.head_dim - 2))
    x = scale * table[tokens]
    for i in range(cfg.num_layers):
        kind = cfg.attention_pattern[i % len(cfg.attention_pattern)]
        window = cfg.sliding_window if kind == "sliding" else None
        x = block(layer_of(params["layers"], i), x, cfg, window, theta)
    hidden = norm(x, np.asarray(params["norm"]["weight"]))
    head = lambda h: h / (cfg.embed_dim / cfg.mup.dim_model_base) @ table.T  # noqa: E731
    further = []
    logits = head(hidden)
    for k in range(1, cfg.num_mtp_layers + 1):
        p = layer_of(params["mtp"], k - 1)
        ahead = scale * table[np.r_[tokens[k:], np.zeros(k, int)]]
        joined = np.concatenate(
            [norm(hidden, p["hidden_norm"]["weight"]), norm(ahead, p["token_norm"]["weight"])], 1
        )
        x = block(p["block"], joined @ p["project"]["weight"], cfg, None, theta)
        hidden = norm(x, p["norm"]["weight"])
        further.append(head(hidden))
    return logits, further


def test_all_options_against_numpy(everything):
    model, params = everything
    tokens = ids(2, 12)
    further = PREDICT(model, params, tokens, HIDDEN(model, params, tokens))
    assert further.shape == (2, 2, 12, ALL.embed_dim)
    got = LOGITS(model, params, tokens), *(UNEMBED(model, params, h) for h in further)
    for row in range(2):
        logits, mtp = forward(ALL, params, np.asarray(tokens[row]))
        for ours, expected in zip(got, (logits, *mtp), strict=True):
            np.testing.assert_allclose(ours[row], expected, atol=1e-4)


def test_options_are_off_by_default():
    cfg = preset("tiny")
    params = build(cfg).abstract
    assert set(params) == {"embed", "layers", "norm", "head"}
    assert set(params["layers"]["attention"]["q"]) == {"weight"}
    assert (cfg.residual_scale, cfg.logit_scale, cfg.window("full")) == (1.0, 1.0, None)
    with pytest.raises(UserError, match="set num_mtp_layers"):
        build(cfg).mtp_hidden(params, ids(1, 3), jnp.zeros((1, 3, 32)))


def test_qkv_bias_leaves_o_without(everything):
    attention = everything[0].abstract["layers"]["attention"]
    assert {name for name in attention if "bias" in attention[name]} == {"q", "k", "v"}
    assert attention["q"]["bias"].shape == (4, 4, 8)


def test_prefill_and_steps_equal_the_full_forward(everything):
    model, params = everything
    chunks = (7, 1, 4)
    tokens = ids(2, 12)
    cache = kv.empty(ALL, 16, jnp.full(2, 12))
    decode, parts, start = jax.jit(model.decode), [], 0
    for size in chunks:
        part, cache = decode(params, tokens[:, start : start + size], cache, jnp.full(2, size))
        parts.append(part)
        start += size
    full = LOGITS(model, params, tokens)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=2e-5, rtol=0)


def test_packed_rows_and_predictions_do_not_cross_segments(everything):
    """Each document as if alone, also what is predicted ahead wherever that lies inside it."""
    model, params = everything
    lengths = (5, 7)
    documents = [ids(1, n, seed=n) for n in lengths]
    rows = {
        "positions": np.concatenate([*map(np.arange, lengths)])[None],
        "segment_ids": np.repeat([1, 2], lengths)[None],
        "rope_length": jnp.asarray([7]),
    }
    tokens = jnp.concatenate(documents, axis=1)
    hidden = HIDDEN(model, params, tokens, **rows)
    further = PREDICT(model, params, tokens, hidden, **rows)
    start = 0
    for document in documents:
        length = document.shape[1]
        alone = HIDDEN(model, params, document, rope_length=rows["rope_length"])
        ahead = PREDICT(model, params, document, alone, rope_length=rows["rope_length"])
        part = slice(start, start + length)
        np.testing.assert_allclose(hidden[:, part], alone, atol=2e-5, rtol=0)
        for k in (1, 2):
            inside = slice(start, start + length - k)
            expected = ahead[k - 1, :, : length - k]
            np.testing.assert_allclose(further[k - 1, :, inside], expected, atol=2e-5, rtol=0)
        start += length


def test_a_window_forgets(everything):
    """With sliding layers only, a token out of every window changes nothing."""
    cfg = dataclasses.replace(
        ALL, attention_pattern=("sliding",), num_layers=2, num_mtp_layers=0, rope_scaling=None
    )
    model = build(cfg)
    params = model.init(jax.random.key(0))
    tokens = ids(1, 12)
    changed = tokens.at[0, 0].add(1)
    a, b = (LOGITS(model, params, x) for x in (tokens, changed))
    reach = 2 * (cfg.sliding_window - 1)  # each layer looks back over window - 1 places
    np.testing.assert_array_equal(a[0, reach + 1 :], b[0, reach + 1 :])
    assert np.abs(a[0, reach] - b[0, reach]).max() > 1e-6


@pytest.mark.slow
def test_gradients_reach_every_parameter(everything):
    model, params = everything
    tokens = ids(2, 10)

    def loss(params, remat):
        hidden = model.hidden(params, tokens, remat=remat)
        further = model.mtp_hidden(params, tokens, hidden, remat=remat)
        return sum(jnp.square(model.unembed(params, h)).mean() for h in (hidden, *further))

    both = jax.jit(lambda p: (jax.grad(loss)(p, "none"), jax.grad(loss)(p, "minimal")))
    plain, remade = jax.device_get(both(params))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, remade)


def test_scan_goes_a_pattern_at_a_time():
    """The program holds one body per place of the pattern, however deep the model is."""

    def count(num_layers, pattern):
        window = 3 if "sliding" in pattern else None
        cfg = dataclasses.replace(
            ALL, num_layers=num_layers, attention_pattern=pattern, sliding_window=window
        )
        model = build(cfg)
        program = str(jax.make_jaxpr(model.hidden)(model.abstract, ids(1, 4)))
        return program.count("rsqrt")  # two norms a layer, one after all

    assert count(4, ("full",)) == count(8, ("full",)) == 3
    assert count(4, ("sliding", "full")) == count(8, ("sliding", "full")) == 5
    seen = []
    steps = [lambda carry, i, n=n: (seen.append(n), 10 * carry + i)[1] for n in range(3)]
    assert stack.apply(steps, jnp.int32(0), jnp.arange(6)) == 12345
    assert seen == [0, 1, 2]  # traced once each


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["fsdp=8", "data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2"]
)
def test_options_on_a_mesh(layout, everything):
    model, params = everything
    if "context" in layout:  # which refuses windows (kernels/ring_attention.py)
        model = build(dataclasses.replace(ALL, attention_pattern=("full",), sliding_window=None))
    rows = {
        "tokens": np.asarray(ids(8, 12)),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12)),
    }

    def loss(params, rows):
        tokens, positions = rows["tokens"], rows["positions"]
        hidden = model.hidden(params, tokens, positions=positions)
        further = model.mtp_hidden(params, tokens, hidden, positions=positions)
        return sum(jnp.square(model.unembed(params, h)).mean() for h in (hidden, *further))

    expected, grads = jax.jit(jax.value_and_grad(loss))(params, rows)
    mesh = sharding.Layout.parse(layout).mesh()
    places = sharding.shardings(model.axes, mesh)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, params, places)
        got, got_grads = jax.jit(jax.value_and_grad(loss))(placed, sharding.place_rows(rows))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4, rtol=1e-3),
        got_grads,
        grads,
    )


def test_stacked_parts_have_a_layer_axis(everything):
    model, _ = everything
    for part in STACKED:
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract[part]):
            axes = model.axes[part]
            for key in path:
                axes = axes[key.key]
            assert axes[0] == "layer" and len(axes) == leaf.ndim
    assert model.abstract["mtp"]["project"]["weight"].shape == (2, 64, 32)
