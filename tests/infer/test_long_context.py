"""Long prompts are read in chunks: memory does not follow the length, results are exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internlm2_jax.infer import programs
from internlm2_jax.infer.engine import Engine, EngineConfig, Request
from internlm2_jax.models import rope
from internlm2_jax.models.build import build
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.rope_scaling import DynamicNTK

CFG = ModelConfig(
    vocab_size=64, num_layers=1, embed_dim=16, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=16,
    rope_theta=1e4, rope_scaling=DynamicNTK(2.0), max_position_embeddings=4096,
    initializer_range=0.4,
)  # fmt: skip


def engine_for(length: int, chunk: int) -> Engine:
    model = build(CFG)
    params = jax.jit(model.init)(jax.random.key(0))
    config = EngineConfig(slots=1, max_length=length, page=256, prefill=((1, chunk),), steps=4)
    return Engine(model, params, config)


def last_logprobs(params, ids: np.ndarray, length: int) -> np.ndarray:
    """Log-probabilities after `ids`, in float64: with one layer, only the last query is needed."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layer = jax.tree.map(lambda x: x[0], weights["layers"])

    def norm(x, weight):
        return weight * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + CFG.norm_eps)

    x = weights["embed"]["weight"][ids]
    h = norm(x, layer["attention_norm"]["weight"])
    q, k, v = (
        np.tensordot(h[-1:] if name == "q" else h, layer["attention"][name]["weight"], 1)
        for name in "qkv"
    )
    frequencies = np.asarray(rope.frequencies(CFG, jnp.asarray([length])))[0].astype(np.float64)

    def rotate(x, positions):
        angles = (positions.astype(np.float32)[:, None] * frequencies.astype(np.float32))[:, None]
        cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    at = np.arange(len(ids))
    q, k = rotate(q, at[-1:]), rotate(k, at)
    scores = np.einsum("nh,sh->ns", q[0], k[:, 0]) / np.sqrt(CFG.head_dim)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("ns,sh->nh", scores / scores.sum(-1, keepdims=True), v[:, 0])
    y = x[-1] + np.einsum("nh,nhd->d", out, layer["attention"]["o"]["weight"])
    h = norm(y, layer["mlp_norm"]["weight"])
    gate = h @ layer["mlp"]["gate"]["weight"]
    gated = gate / (1 + np.exp(-gate)) * (h @ layer["mlp"]["up"]["weight"])
    y = y + gated @ layer["mlp"]["down"]["weight"]
    logits = norm(y, weights["norm"]["weight"]) @ weights["head"]["weight"]
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def check(length: int, chunk: int) -> None:
    engine = engine_for(length + 2, chunk)
    ids = np.random.default_rng(0).integers(0, CFG.vocab_size, length)
    response = engine.run([Request(ids.tolist(), 2)])[0]
    for n in (0, 1):
        seen = np.concatenate([ids, response.tokens[:n]]).astype(int)
        want = last_logprobs(engine.params, seen, length + 2)
        assert response.logprobs[n] == pytest.approx(want[response.tokens[n]], abs=2e-4)
        assert want.argmax() == response.tokens[n] or want.max() - want[response.tokens[n]] < 1e-4


def test_a_prompt_past_the_trained_length():
    check(9_000, 512)


@pytest.mark.slow
def test_200k_tokens():
    check(200_000, 2048)


def test_memory_of_a_chunk_does_not_follow_the_length():
    def bytes_of(length: int) -> tuple[int, int]:
        """Temporaries of a prefill and of a decode call."""
        engine = engine_for(length, 512)
        rows, none = [None], np.zeros(1, np.int32)
        held = (engine._pages, engine._batch(rows), engine._rows(rows))
        prefill = programs.prefill.lower(
            engine.model, 0, engine.params, *held, np.zeros((1, 512), np.int32), none
        )
        decode = programs.decode.lower(
            engine.model, 4, 0, engine.params, *held, none, none, np.zeros((1, 8), np.int32), 4, 1
        )
        sizes = [x.compile().memory_analysis().temp_size_in_bytes for x in (prefill, decode)]
        return sizes[0], sizes[1]

    # Nothing but the page table follows the length: 782 pages, 4 bytes each, in a few copies.
    for short, long in zip(bytes_of(4_096), bytes_of(200_000), strict=True):
        assert long < short + 10 * 4 * 782
