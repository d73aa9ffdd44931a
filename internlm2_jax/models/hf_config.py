"""Hugging Face's config.json <-> `ModelConfig`, for the architectures that convert.py reads.

The layouts of names: "internlm2" (fused wqkv) and "llama" (separate projections), which Llama,
Qwen2 (bias on q, k, v), MiMo (that and multi-token prediction) and MiniCPM (fixed multipliers)
share.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from internlm2_jax.errors import UserError
from internlm2_jax.models import rope_scaling as scalings
from internlm2_jax.models.config import Head, ModelConfig, MuP
from internlm2_jax.models.rope_scaling import LongRoPE, RopeScaling, YaRN

Layout = Literal["internlm2", "llama"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a public architecture is: `always` and `may` list optional parts of ModelConfig."""

    layout: Layout
    model_type: str
    head: Head = "lm"
    always: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()


_LLAMA_LIKE = frozenset({"tie_embeddings", "head_dim", "rope_scaling"})

# For export the first that has all a model needs is taken.
ARCHITECTURES: dict[str, Architecture] = {
    "InternLM2ForCausalLM": Architecture(
        "internlm2", "internlm2", may=frozenset({"bias", "tie_embeddings"})
    ),
    "InternLM2ForRewardModel": Architecture(
        "internlm2", "internlm2", "scalar", may=frozenset({"bias"})
    ),
    "LlamaForCausalLM": Architecture("llama", "llama", may=_LLAMA_LIKE | {"bias"}),
    "Qwen2ForCausalLM": Architecture(
        "llama", "qwen2", always=frozenset({"qkv_bias"}), may=_LLAMA_LIKE
    ),
    "MiMoForCausalLM": Architecture(
        "llama", "mimo", always=frozenset({"qkv_bias", "num_mtp_layers"}), may=_LLAMA_LIKE
    ),
    "MiniCPMForCausalLM": Architecture(
        "llama", "minicpm", always=frozenset({"mup"}), may=_LLAMA_LIKE - {"head_dim"} | {"bias"}
    ),
}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
# The public InternLM2 class has defaults that no released checkpoint uses (vocab 103168, bias, eps
# 1e-6), so all that shapes the model must be in the file.
_ALSO_REQUIRED = {
    "internlm2": ("num_key_value_heads", "bias", "rope_theta"),
    "minicpm": ("scale_emb", "scale_depth", "dim_model_base"),
    "mimo": ("num_nextn_predict_layers",),
}
# Fields that would change the maths in a way the decoder does not know, and what they must be.
_MUST_BE: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "sparse_config": None,
}


def architecture(config: Any, source: str = "config.json") -> Architecture:
    """The architecture that a config.json names. Errors: UserError when it is another."""
    if not isinstance(config, dict):
        raise UserError(f"{source}: expected a JSON object")
    names = config.get("architectures") or []
    known = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if not known or config.get("model_type", known[0].model_type) != known[0].model_type:
        raise UserError(
            f"{source}: architecture {names} of model_type {config.get('model_type')!r} is not "
            f"supported; this reads {', '.join(ARCHITECTURES)}"
        )
    return known[0]


def from_hf(config: dict[str, Any], source: str = "config.json") -> tuple[ModelConfig, Head]:
    """ModelConfig and head of a Hugging Face config.json.

    Raises:
      UserError: an architecture, an option or a `rope_scaling` that is not understood, a field that
        is missing, sizes that do not divide.
    """
    public = architecture(config, source)
    kind = public.model_type
    rope = _rope_parameters(config, source)
    missing = [
        name
        for name in (*_REQUIRED, *_ALSO_REQUIRED.get(kind, ()))
        if name not in config and not (name == "rope_theta" and name in rope)
    ]
    if missing:
        raise UserError(
            f"{source}: {', '.join(missing)} is missing; take config.json from the model"
        )
    for name in (*_REQUIRED, "rope_theta", "num_key_value_heads"):
        value = config.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{source}: {name} is {value!r}, not a number; take config.json from the model"
            )
    for name, value in _MUST_BE.items():
        if config.get(name, value) != value:
            raise UserError(
                f"{source}: {name} {config[name]!r} is not supported; only {value!r} is"
            )
    if set(config.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise UserError(f"{source}: layer_types other than full_attention are not supported")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") if "head_dim" in public.may else None
    if head_dim is None:
        _divides(source, "hidden_size", hidden, "num_attention_heads", heads)
        head_dim = hidden // heads
    kv_heads = config.get("num_key_value_heads", heads)
    _divides(source, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
    try:
        cfg = ModelConfig(
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            embed_dim=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_dim=config["intermediate_size"],
            # 10,000 is the default of the Llama classes, and early files leave it out
            rope_theta=float(rope.pop("rope_theta", config.get("rope_theta", 10_000.0))),
            rope_scaling=_read_scaling(rope, config, source),
            max_position_embeddings=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            initializer_range=config.get("initializer_range", 0.02),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            bias=bool(config.get("bias" if kind == "internlm2" else "attention_bias", False))
            and "bias" in public.may,
            dtype="bfloat16" if _stored_dtype(config) == "bfloat16" else "float32",
            qkv_bias="qkv_bias" in public.always,
            mup=MuP(config["scale_emb"], config["scale_depth"], config["dim_model_base"])
            if "mup" in public.always
            else None,
            num_mtp_layers=config["num_nextn_predict_layers"] if kind == "mimo" else 0,
        )
    except UserError as error:
        message = str(error)
        raise UserError(message if source in message else f"{source}: {message}") from error
    return cfg, public.head


def to_hf(
    cfg: ModelConfig, head: Head, torch_dtype: str, layout: Layout = "internlm2"
) -> dict[str, Any]:
    """The config.json that public code of this layout reads for this model.

    Raises:
      UserError: no public architecture of the layout has all the optional parts of the model.
    """
    name, public = _architecture_for(cfg, head, layout)
    config = {
        "architectures": [name],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": cfg.embed_dim,
        "initializer_range": cfg.initializer_range,
        "intermediate_size": cfg.mlp_dim,
        "max_position_embeddings": cfg.max_position_embeddings,
        "model_type": public.model_type,
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "pad_token_id": 2,
        "rms_norm_eps": cfg.norm_eps,
        "rope_scaling": _write_scaling(cfg.rope_scaling, layout),
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": torch_dtype,
        "vocab_size": cfg.vocab_size,
    }
    if layout == "internlm2":
        return config | {
            "attn_implementation": "eager",
            "auto_map": {
                "AutoConfig": "configuration_internlm2.InternLM2Config",
                "AutoModel": f"modeling_internlm2.{name}",
                "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
            },
            "bias": cfg.bias,
            "pretraining_tp": 1,
        }
    config |= {"attention_bias": cfg.bias or cfg.qkv_bias}
    if "head_dim" in public.may:
        config |= {"head_dim": cfg.head_dim}
    if public.model_type == "llama":
        config |= {"mlp_bias": False}
    if public.model_type == "mimo":
        config |= {"num_nextn_predict_layers": cfg.num_mtp_layers}
    if cfg.mup is not None:
        config |= dataclasses.asdict(cfg.mup)
    return config


def _architecture_for(cfg: ModelConfig, head: Head, layout: Layout) -> tuple[str, Architecture]:
    scaling = cfg.rope_scaling
    used = {
        "bias": cfg.bias,
        "qkv_bias": cfg.qkv_bias,
        "mup": cfg.mup is not None,
        "num_mtp_layers": cfg.num_mtp_layers > 0,
        "attention_pattern": cfg.sliding_window is not None,
        "tie_embeddings": cfg.tie_embeddings,
        "head_dim": cfg.num_heads * cfg.head_dim != cfg.embed_dim,
        # the public InternLM2 code knows the kinds that have a factor and nothing else
        "rope_scaling": isinstance(scaling, YaRN | LongRoPE),
    }
    parts = {part for part, present in used.items() if present}
    offered = {n: a for n, a in ARCHITECTURES.items() if (a.layout, a.head) == (layout, head)}
    for name, public in offered.items():
        if public.always <= parts <= public.always | public.may:
            return name, public
    has = ", ".join(sorted(parts)) or "none"
    raise UserError(
        f"no public architecture of layout {layout!r} holds this model: it has a {head!r} head and "
        f"the optional parts {has}; "
        + (f"there are {', '.join(offered)}" if offered else "try the other layout")
    )


def _divides(source: str, name: str, value: Any, by: str, ways: Any) -> None:
    whole = isinstance(value, int) and isinstance(ways, int)
    if not whole or ways < 1 or value % ways:
        raise UserError(
            f"{source}: {name} {value!r} is not a multiple of {by} {ways!r}; "
            "take config.json from the model"
        )


def _stored_dtype(config: dict[str, Any]) -> Any:
    return config.get("torch_dtype", config.get("dtype"))  # the second since transformers 5


def _rope_parameters(config: dict[str, Any], source: str) -> dict[str, Any]:
    """`rope_scaling`, or what transformers 5 writes in its place, with its kind under "type"."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise UserError(f"{source}: rope_scaling is {found!r}; it must be null or an object")
    found = dict(found)
    if "rope_type" in found:
        kind = found.pop("rope_type")
        if found.setdefault("type", kind) != kind:
            raise UserError(
                f"{source}: rope_scaling has type {found['type']!r} and rope_type {kind!r}; "
                "keep one of them"
            )
    if found.get("type") == "default":
        del found["type"]
    return found


def _read_scaling(rope: dict[str, Any], config: dict[str, Any], source: str) -> RopeScaling | None:
    if not rope:
        return None
    fields, longest = dict(rope), config["max_position_embeddings"]
    if "type" not in fields:
        raise UserError(
            f"{source}: rope_scaling {fields!r} has no type; it is one of "
            f"{', '.join(scalings.KINDS)}, or rope_scaling is null"
        )
    if fields["type"] in ("yarn", "longrope"):
        trained = config.get("original_max_position_embeddings") or longest
        trained = fields.setdefault("original_max_position_embeddings", trained)
        scalings.positive("original_max_position_embeddings", trained)
    if fields["type"] == "yarn":
        fields.setdefault("factor", longest / trained)
        if not fields.pop("truncate", True):
            raise UserError(f"{source}: rope_scaling truncate false is not supported; only true is")
        mscale, all_dim = fields.pop("mscale", None), fields.pop("mscale_all_dim", None)
        scaling = scalings.from_json(fields, source)
        assert isinstance(scaling, YaRN)
        if mscale and all_dim and scaling.attention_factor is None:
            # DeepSeek's form: two temperatures, of which the quotient remains
            grown = 0.1 * math.log(scaling.factor)
            factor = (mscale * grown + 1.0) / (all_dim * grown + 1.0)
            scaling = dataclasses.replace(scaling, attention_factor=factor)
        return scaling
    return scalings.from_json(fields, source)


def _write_scaling(scaling: RopeScaling | None, layout: Layout) -> dict[str, Any] | None:
    fields = scalings.to_json(scaling)
    if fields is None or layout == "internlm2":
        return fields
    kind = fields.pop("type")
    return {"rope_type": kind, **{k: v for k, v in fields.items() if v is not None}}
