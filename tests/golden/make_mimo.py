"""Writes mimo.npz: a two-layer MiMo with two prediction layers, run by transformers' Qwen2 parts.

    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch transformers numpy
    /tmp/hf/bin/python tests/golden/make_mimo.py tests/golden/mimo.npz

The weights are `weight(name, shape)` of the public names, so the file holds outputs only.
"""

from __future__ import annotations

import sys
import zlib

import numpy as np

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIG = SIZES | HEADS | {"rms_norm_eps": 1e-5, "rope_theta": 640000.0}
PREDICTIONS = 2


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that depend on the name alone; norms lie around 1."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape) * 0.2
    return (values + (1.0 if "norm" in name else 0.0)).astype(np.float32)


def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (2, 11))


def main(path: str) -> None:
    import torch
    from torch import nn
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

    config = Qwen2Config(**CONFIG, tie_word_embeddings=False, attn_implementation="eager")
    model = Qwen2ForCausalLM(config).eval()

    class Prediction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            d, eps = config.hidden_size, config.rms_norm_eps
            self.token_layernorm = Qwen2RMSNorm(d, eps=eps)
            self.hidden_layernorm = Qwen2RMSNorm(d, eps=eps)
            self.input_proj = nn.Linear(2 * d, d, bias=False)
            self.block = Qwen2DecoderLayer(config, layer_idx=0)
            self.final_layernorm = Qwen2RMSNorm(d, eps=eps)

    predictions = [Prediction().eval() for _ in range(PREDICTIONS)]
    named = dict(model.named_parameters())
    for i, prediction in enumerate(predictions):
        for name, value in prediction.named_parameters():
            named[f"model.mtp_layers.{i}.{name.removeprefix('block.')}"] = value
    ids = torch.tensor(tokens())
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(torch.tensor(weight(name, tuple(value.shape))))
        hidden = model.model(ids).last_hidden_state
        out = {"logits": model.lm_head(hidden).numpy()}
        positions = torch.arange(length)[None]
        for i, prediction in enumerate(predictions):
            ahead = torch.roll(ids, -1 - i, dims=1)
            ahead[:, length - 1 - i :] = 0
            embedded = prediction.token_layernorm(model.model.embed_tokens(ahead))
            joined = torch.cat([prediction.hidden_layernorm(hidden), embedded], dim=-1)
            x = prediction.input_proj(joined)
            rotary = model.model.rotary_emb(x, positions)
            x = prediction.block(x, attention_mask=mask, position_embeddings=rotary)
            x = x[0] if isinstance(x, tuple) else x
            hidden = prediction.final_layernorm(x)
            out[f"mtp_logits_{i + 1}"] = model.lm_head(hidden).numpy()
    np.savez_compressed(path, **out)


if __name__ == "__main__":
    main(sys.argv[1])
