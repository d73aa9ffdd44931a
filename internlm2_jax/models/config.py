"""The shape of a model: one frozen dataclass, the published sizes, and Hugging Face's config.json.

Sizes are those of InternLM2 (arXiv 2403.17297, Table 3) and of InternLM2.5-7B-Chat-1M; `demo` is
small enough to train on two CPU cores and `tiny` small enough for a unit test. All of them are the
same architecture: pre-norm, grouped-query attention, SwiGLU, rotary positions, untied head.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal

from internlm2_jax.errors import UserError

Head = Literal["lm", "scalar"]

ARCHITECTURES: dict[str, Head] = {
    "InternLM2ForCausalLM": "lm",
    "InternLM2ForRewardModel": "scalar",
}


@dataclasses.dataclass(frozen=True)
class DynamicNTK:
    """RoPE base grown with the length once it passes `max_position_embeddings`; see rope.py."""

    factor: float

    def __post_init__(self) -> None:
        if not isinstance(self.factor, float) or not self.factor >= 1.0:
            raise UserError(
                f"rope_scaling factor is {self.factor!r}; it must be a float of 1.0 or more"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters that fix the parameter shapes and the maths, and nothing else.

    `dtype` is the dtype of the matrix products; parameters, norm statistics, softmax and logits
    are float32 always. `residual_init` is "normal" (every matrix N(0, initializer_range)) or
    "depth": the matrices that write to the residual stream (wo, w2) of layer l, counted from 1,
    get the standard deviation initializer_range / sqrt(2 l), as InternEvo's scaled init does.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 1_000_000.0
    rope_scaling: DynamicNTK | None = None
    max_position_embeddings: int = 32768
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    residual_init: Literal["normal", "depth"] = "normal"
    tie_embeddings: bool = False
    bias: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "mlp_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model config: {name} is {value!r}; it must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model config: num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim {self.head_dim} is odd; RoPE turns pairs")
        for name in ("rope_theta", "norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise UserError(f"model config: {name} is {value!r}; it must be a positive number")
        choices = {"dtype": ("float32", "bfloat16"), "residual_init": ("normal", "depth")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"model config: {name} is {getattr(self, name)!r}; choose one of "
                    f"{', '.join(allowed)}"
                )

    def num_params(self, head: Head = "lm") -> int:
        """Number of parameters, embedding and head included."""
        d, heads = self.embed_dim, self.num_heads + 2 * self.num_kv_heads
        attention = d * heads * self.head_dim + self.num_heads * self.head_dim * d
        if self.bias:
            attention += heads * self.head_dim + d
        layer = attention + 3 * d * self.mlp_dim + 2 * d
        out = d if head == "scalar" else 0 if self.tie_embeddings else self.vocab_size * d
        return self.vocab_size * d + self.num_layers * layer + d + out

    def flops_per_token(self, length: int) -> float:
        """Forward floating-point operations per token of a causal row of `length` tokens."""
        matrices = self.num_params() - (
            0 if self.tie_embeddings else self.vocab_size * self.embed_dim
        )
        attention = 4 * self.num_heads * self.head_dim * (length + 1) / 2
        return 2.0 * matrices + self.num_layers * attention


_INTERNLM2: dict[str, Any] = {
    "vocab_size": 92544,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 1_000_000.0,
    "rope_scaling": DynamicNTK(2.0),
    "max_position_embeddings": 32768,
    "dtype": "bfloat16",
}
_INTERNLM2_7B: dict[str, Any] = {
    **_INTERNLM2,
    "num_layers": 32,
    "embed_dim": 4096,
    "num_heads": 32,
    "mlp_dim": 14336,
}

PRESETS: dict[str, dict[str, Any]] = {
    "internlm2_1_8b": {
        **_INTERNLM2,
        "num_layers": 24,
        "embed_dim": 2048,
        "num_heads": 16,
        "mlp_dim": 8192,
    },
    "internlm2_7b": _INTERNLM2_7B,
    "internlm2_20b": {
        **_INTERNLM2,
        "num_layers": 48,
        "embed_dim": 6144,
        "num_heads": 48,
        "mlp_dim": 16384,
    },
    # InternLM2.5-7B-Chat-1M: lmdeploy serves it at 1,048,576 tokens with factor 2.5.
    "internlm2_5_1m_7b": {
        **_INTERNLM2_7B,
        "rope_theta": 5e7,
        "rope_scaling": DynamicNTK(2.5),
        "max_position_embeddings": 262144,
    },
    "demo": {
        "vocab_size": 2048,
        "num_layers": 4,
        "embed_dim": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "mlp_dim": 352,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 1024,
    },
    "tiny": {
        "vocab_size": 256,
        "num_layers": 2,
        "embed_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_dim": 64,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 512,
    },
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The named size, with any field replaced by `overrides`."""
    if name not in PRESETS:
        raise UserError(f"no model preset {_unknown(name, list(PRESETS))}")
    return from_json({**PRESETS[name], **overrides}, source=f"preset {name}")


def to_json(cfg: ModelConfig) -> dict[str, Any]:
    """A plain JSON object; `from_json` reads it back."""
    return dataclasses.asdict(cfg)


def from_json(fields: dict[str, Any], source: str = "model.json") -> ModelConfig:
    """ModelConfig from a plain JSON object. An unknown or missing field is a UserError."""
    if not isinstance(fields, dict):
        raise UserError(f"{source}: expected a JSON object of model fields")
    known = {field.name: field for field in dataclasses.fields(ModelConfig)}
    for name in fields:
        if name not in known:
            raise UserError(f"{source}: no model field {_unknown(name, list(known))}")
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
    if missing:
        raise UserError(f"{source}: model field {', '.join(missing)} is missing; add it")
    scaling = fields.get("rope_scaling")
    if isinstance(scaling, dict):
        if set(scaling) != {"factor"}:
            raise UserError(f"{source}: rope_scaling must be null or {{'factor': number}}")
        fields = {**fields, "rope_scaling": DynamicNTK(scaling["factor"])}
    return ModelConfig(**fields)


def from_hf(config: dict[str, Any], source: str = "config.json") -> tuple[ModelConfig, Head]:
    """ModelConfig and head of a Hugging Face InternLM2 config.json.

    The public configuration class has defaults that no released checkpoint uses (vocab 103168,
    bias, eps 1e-6), so every field that shapes the model must be in the file.
    """
    if not isinstance(config, dict):
        raise UserError(f"{source}: expected a JSON object")
    names = config.get("architectures") or []
    head = next((ARCHITECTURES[n] for n in names if n in ARCHITECTURES), None)
    if head is None or config.get("model_type", "internlm2") != "internlm2":
        raise UserError(
            f"{source}: architecture {names or config.get('model_type')!r} is not supported; "
            f"this reads {' and '.join(ARCHITECTURES)}"
        )
    missing = [name for name in _HF_REQUIRED if name not in config]
    if missing:
        raise UserError(
            f"{source}: {', '.join(missing)} is missing; take config.json from the model"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{source}: hidden_act {config['hidden_act']!r} is not supported; only silu is"
        )
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise UserError(f"{source}: hidden_size {hidden!r} is not a multiple of {heads!r} heads")
    cfg = ModelConfig(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        embed_dim=hidden,
        num_heads=heads,
        num_kv_heads=config["num_key_value_heads"],
        head_dim=hidden // heads,
        mlp_dim=config["intermediate_size"],
        rope_theta=float(config["rope_theta"]),
        rope_scaling=_hf_scaling(config.get("rope_scaling"), source),
        max_position_embeddings=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        initializer_range=config.get("initializer_range", 0.02),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        bias=bool(config["bias"]),
        dtype="bfloat16" if config.get("torch_dtype") == "bfloat16" else "float32",
    )
    return cfg, head


def to_hf(cfg: ModelConfig, head: Head, torch_dtype: str) -> dict[str, Any]:
    """The config.json that Hugging Face's InternLM2 code reads for this model."""
    if cfg.num_heads * cfg.head_dim != cfg.embed_dim:
        raise UserError(
            f"num_heads {cfg.num_heads} x head_dim {cfg.head_dim} is not {cfg.embed_dim}; "
            "the Hugging Face layout has no place for another head size"
        )
    scaling = cfg.rope_scaling and {"type": "dynamic", "factor": cfg.rope_scaling.factor}
    architecture = next(name for name, kind in ARCHITECTURES.items() if kind == head)
    return {
        "architectures": [architecture],
        "attn_implementation": "eager",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": f"modeling_internlm2.{architecture}",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": cfg.bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": cfg.embed_dim,
        "initializer_range": cfg.initializer_range,
        "intermediate_size": cfg.mlp_dim,
        "max_position_embeddings": cfg.max_position_embeddings,
        "model_type": "internlm2",
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": cfg.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": torch_dtype,
        "vocab_size": cfg.vocab_size,
    }


_HF_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "bias",
    "rope_theta",
)


def _hf_scaling(scaling: Any, source: str) -> DynamicNTK | None:
    if scaling is None:
        return None
    if not isinstance(scaling, dict) or set(scaling) != {"type", "factor"}:
        raise UserError(f"{source}: rope_scaling must be null or have exactly 'type' and 'factor'")
    if scaling["type"] != "dynamic":
        raise UserError(
            f"{source}: rope_scaling type {scaling['type']!r} is unknown; use 'dynamic'"
        )
    return DynamicNTK(scaling["factor"])


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{name!r}{hint}; there are {', '.join(known)}"
