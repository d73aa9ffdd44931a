"""What a step should cost, from the model's sizes and the layout alone.

A check of the counts read from compiled HLO (tests/plan/test_steps.py), which are wrong in silence
when a loop is missed. Search also prunes by it before it compiles.
"""

from __future__ import annotations

import dataclasses

from internlm2_jax.models.config import Head, ModelConfig
from internlm2_jax.models.decoder import PART_OF_MLP, WHOLE_MLP
from internlm2_jax.models.remat import Remat, repeats_mlp
from internlm2_jax.sharding import Layout

FP32 = 4

# Entries of the compute dtype that a policy keeps per token and layer, as multiples of
# (D, (N + 2K) H, F): see models/remat.py.
_KEPT = {
    "none": (6.0, 2.0, 4.0),
    "minimal": (2.0, 1.0, 2.0),
    "save_qkv": (1.0, 1.0, 0.0),
    "offload": (0.0, 0.0, 0.0),
    "full": (1.0, 0.0, 0.0),
}


def layer_params(cfg: ModelConfig) -> int:
    """Matrix parameters of one block, those that are cut and gathered."""
    heads = cfg.num_heads + 2 * cfg.num_kv_heads
    attention = cfg.embed_dim * heads * cfg.head_dim + cfg.num_heads * cfg.head_dim * cfg.embed_dim
    return attention + 3 * cfg.embed_dim * cfg.mlp_dim


def width(cfg: ModelConfig) -> int:
    """Bytes of an entry in the compute dtype."""
    return 2 if cfg.dtype == "bfloat16" else 4


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes on one device that last from step to step: float32 parameters and AdamW's moments."""

    params: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.params + self.optimizer


def train_state(cfg: ModelConfig, layout: Layout, head: Head = "lm") -> State:
    """Norm weights, which are not cut, are left out: they are a ten-thousandth."""
    params = FP32 * cfg.num_params(head) / layout.param_ways
    return State(params, 2 * params)


def activations(cfg: ModelConfig, layout: Layout, remat: Remat, rows: int, length: int) -> float:
    """Bytes on one device that the backward pass of `rows` x `length` tokens waits for.

    What `remat` keeps of every block, the working set of one block, and the float32 gradient.
    """
    tokens = rows * length / (layout.data * layout.fsdp * layout.context)
    qkv = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    d, q, f = _KEPT[remat]
    # Between blocks tokens are cut over `tensor`; inside one, heads and mlp are.
    kept = (d * cfg.embed_dim + q * qkv + f * cfg.mlp_dim) / layout.tensor
    working = (4 * cfg.embed_dim + 2 * qkv) / layout.tensor + cfg.embed_dim
    parted = repeats_mlp(remat) and layout.tensor == 1 and tokens > WHOLE_MLP
    inside = 4 * cfg.mlp_dim * (min(tokens, PART_OF_MLP) if parted else tokens) / layout.tensor
    gradient = FP32 * cfg.num_params() / layout.param_ways
    gathered = 2 * width(cfg) * layer_params(cfg) / layout.tensor
    of_tokens = tokens * (cfg.num_layers * kept + working) + inside
    return width(cfg) * of_tokens + gradient + gathered


def gathered_weights(cfg: ModelConfig, layout: Layout, passes: int = 2) -> float:
    """Bytes of weights of blocks that all-gathers leave on a device in a step.

    `passes`: forward and backward each gather a block's weights in the compute dtype.
    """
    if layout.param_ways == layout.tensor:
        return 0.0
    return float(passes * width(cfg) * cfg.num_layers * layer_params(cfg) / layout.tensor)


def scattered_gradients(cfg: ModelConfig, layout: Layout) -> float:
    """Bytes of gradients of blocks that reductions take in a step, in its dtype."""
    if layout.batch_ways * layout.context == 1:
        return 0.0
    return float(width(cfg) * cfg.num_layers * layer_params(cfg) / layout.tensor)


def rematerialised_flops(cfg: ModelConfig, length: int, remat: str) -> float:
    """Operations per token that the backward pass repeats.

    Under `full` and `offload` a block's products but the last (its output is not needed again);
    under `save_qkv` those of q, k and v are spared; under `minimal` only attention is repeated.
    """
    attention = 4 * cfg.num_heads * cfg.head_dim * (length + 1) / 2
    heads = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    qkv = 2.0 * cfg.embed_dim * heads
    rest = 2.0 * layer_params(cfg) - qkv - 2.0 * cfg.embed_dim * cfg.mlp_dim
    repeated = {
        "none": 0.0,
        "minimal": attention,
        "save_qkv": attention + rest,
        "offload": attention + rest,
        "full": attention + rest + qkv,
    }[remat]
    return cfg.num_layers * repeated
