"""The shape of a model: one frozen dataclass and the published sizes.

Sizes are those of InternLM2 (arXiv 2403.17297, Table 3). InternLM2.5 has the same ones: so say its
7B and 20B config.json; of its 1.8B only the hidden size (2048) and the count were seen, and they
are InternLM2's. `demo` is small enough to train on two CPU cores and `tiny` small enough for a unit
test. All of them are one architecture: pre-norm, grouped-query attention, SwiGLU, rotary positions,
untied head. What later models of the family add is off by default: see the optional fields of
`ModelConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any, Literal

from internlm2_jax.errors import UserError
from internlm2_jax.models import rope_scaling as scalings
from internlm2_jax.models.rope_scaling import DynamicNTK, LongRoPE, RopeScaling

Head = Literal["lm", "scalar"]
AttentionKind = Literal["full", "sliding"]


@dataclasses.dataclass(frozen=True)
class MuP:
    """Fixed multipliers of MiniCPM (arXiv 2404.06395; MiniCPM4's modeling file), each optional.

    x = scale_emb * embed(ids); every branch x += scale_depth / sqrt(num_layers) * f(norm(x));
    logits = head(h / (embed_dim / dim_model_base)). None leaves that place as it is.
    """

    scale_emb: float = 1.0
    scale_depth: float | None = None
    dim_model_base: float | None = None

    def __post_init__(self) -> None:
        for name in ("scale_emb", "scale_depth", "dim_model_base"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise UserError(f"model config: mup {name} is {value!r}; it must be positive")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al., arXiv 2106.09685): y = x W + alpha / rank * (x A) B.

    targets: which matrices of a block get them, of q, k, v, o, gate, up, down.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise UserError(f"lora: rank is {self.rank!r}; it must be 1 or more")
        if not _is_number(self.alpha) or not self.alpha > 0:
            raise UserError(f"lora: alpha is {self.alpha!r}; it must be a positive number")
        for name in self.targets:
            if name not in LORA_TARGETS:
                raise UserError(f"lora: no target {_unknown(str(name), list(LORA_TARGETS))}")
        if not self.targets:
            raise UserError("lora: targets is empty; name one matrix or more")


LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters that fix the parameter shapes and the maths, and nothing else.

    `dtype` is the dtype of the matrix products; norm statistics, softmax and logits are float32
    always. `residual_init` is "normal" (every matrix N(0, initializer_range)) or "depth": the
    matrices that write to the residual stream (wo, w2) of layer l, counted from 1, get the
    standard deviation initializer_range / sqrt(2 l), as InternEvo's scaled init does.

    Optional parts:
      rope_scaling: how rows longer than those trained on are read (rope_scaling.py).
      tie_embeddings: the head is the embedding table.
      bias: of the q, k, v and o projections (InternLM2's field of that name).
      qkv_bias: of q, k and v alone (Qwen2, MiMo).
      mup: multipliers of the embedding, the residual branches and the logits.
      attention_pattern: kinds of attention of consecutive layers, repeated through the depth:
        ("sliding", "full") alternates. Its length divides num_layers; layers are scanned a pattern
        at a time, so every kernel is compiled for one kind and compile time follows the pattern.
      sliding_window: how many tokens a "sliding" layer sees, the query's own among them.
      num_mtp_layers: layers that predict the token after next and further (decoder.py).
      lora: adapters beside the matrices of the blocks (lora.py); not counted by `num_params`.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 32768
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    residual_init: Literal["normal", "depth"] = "normal"
    tie_embeddings: bool = False
    bias: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    qkv_bias: bool = False
    mup: MuP | None = None
    attention_pattern: tuple[AttentionKind, ...] = ("full",)
    sliding_window: int | None = None
    num_mtp_layers: int = 0
    lora: LoRA | None = None

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
            if not _is_number(value) or not value > 0:
                raise UserError(f"model config: {name} is {value!r}; it must be a positive number")
        choices = {"dtype": ("float32", "bfloat16"), "residual_init": ("normal", "depth")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"model config: {name} is {getattr(self, name)!r}; choose one of "
                    f"{', '.join(allowed)}"
                )
        self._check_options()

    def _check_options(self) -> None:
        if self.bias and self.qkv_bias:
            raise UserError(
                "model config: bias and qkv_bias are both set; bias is q, k, v and o, qkv_bias "
                "the first three alone: choose one"
            )
        scaling, pairs = self.rope_scaling, self.head_dim // 2
        if isinstance(scaling, LongRoPE) and len(scaling.long_factor) != pairs:
            raise UserError(
                f"model config: rope_scaling long_factor has {len(scaling.long_factor)} entries; "
                f"head_dim {self.head_dim} has {pairs} pairs, and each needs one"
            )
        pattern = tuple(self.attention_pattern)
        object.__setattr__(self, "attention_pattern", pattern)
        if not pattern or not set(pattern) <= {"full", "sliding"}:
            raise UserError(
                f"model config: attention_pattern is {pattern!r}; it lists full and sliding"
            )
        if self.num_layers % len(pattern):
            raise UserError(
                f"model config: attention_pattern has {len(pattern)} layers, which does not divide "
                f"num_layers {self.num_layers}; write it out or change the depth"
            )
        window = self.sliding_window
        if ("sliding" in pattern) != (window is not None):
            raise UserError(
                f"model config: sliding_window is {window!r} and attention_pattern {pattern!r}; "
                "a window needs sliding layers, and they need a window"
            )
        if window is not None and (not isinstance(window, int) or window < 1):
            raise UserError(
                f"model config: sliding_window is {window!r}; it must be a positive integer"
            )
        layers = self.num_mtp_layers
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 0:
            raise UserError(f"model config: num_mtp_layers is {layers!r}; it must be 0 or more")

    def adapter(self, target: str) -> LoRA | None:
        """The adapter of one kind of matrix of the blocks, if it has one."""
        return self.lora if self.lora and target in self.lora.targets else None

    @property
    def residual_scale(self) -> float:
        """What every residual branch is multiplied by."""
        depth = self.mup and self.mup.scale_depth
        return depth / math.sqrt(self.num_layers) if depth else 1.0

    @property
    def logit_scale(self) -> float:
        """What the last hidden state is multiplied by before the language-model head."""
        base = self.mup and self.mup.dim_model_base
        return base / self.embed_dim if base else 1.0

    @property
    def length_limit(self) -> int | None:
        """The most tokens a row may have; None where the rotation grows with the row."""
        return None if isinstance(self.rope_scaling, DynamicNTK) else self.max_position_embeddings

    def window(self, kind: AttentionKind) -> int | None:
        """Window of a layer of this kind; None is the whole row."""
        return self.sliding_window if kind == "sliding" else None

    def num_params(self, head: Head = "lm") -> int:
        """Number of parameters: embedding, head and multi-token-prediction layers included."""
        d = self.embed_dim
        out = d if head == "scalar" else 0 if self.tie_embeddings else self.vocab_size * d
        mtp = self.num_mtp_layers * (self._layer_params + 2 * d * d + 3 * d)
        return self.vocab_size * d + self.num_layers * self._layer_params + mtp + d + out

    @property
    def _layer_params(self) -> int:
        d, heads = self.embed_dim, self.num_heads + 2 * self.num_kv_heads
        attention = d * heads * self.head_dim + self.num_heads * self.head_dim * d
        if self.bias or self.qkv_bias:
            attention += heads * self.head_dim
        if self.bias:
            attention += d
        return attention + 3 * d * self.mlp_dim + 2 * d

    def forward_flops(self, length: int, head: Head = "lm") -> float:
        """Floating-point operations per token of a causal row of `length` tokens, forward.

        Two for each parameter of a matrix product, and attention: the trunk and the head;
        multi-token-prediction layers are not run.
        """
        outputs = self.vocab_size if head == "lm" else 1
        matrices = self.num_layers * self._layer_params + (outputs + 1) * self.embed_dim
        seen = 0.0  # keys per query, summed over a pattern
        for kind in self.attention_pattern:
            window = min(self.window(kind) or length, length)
            seen += window - window * (window - 1) / (2 * length)
        attention = 4 * self.num_heads * self.head_dim * seen / len(self.attention_pattern)
        return 2.0 * matrices + self.num_layers * attention

    def train_flops(self, length: int, head: Head = "lm") -> float:
        """The same with the backward pass, which takes two products for each of the forward (6ND);
        what is recomputed does not count."""
        return 3.0 * self.forward_flops(length, head)


_INTERNLM2: dict[str, Any] = {
    "vocab_size": 92544,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 1_000_000.0,
    "rope_scaling": DynamicNTK(2.0),
    "max_position_embeddings": 32768,
    "dtype": "bfloat16",
}
_INTERNLM2_1_8B: dict[str, Any] = {
    **_INTERNLM2,
    "num_layers": 24,
    "embed_dim": 2048,
    "num_heads": 16,
    "mlp_dim": 8192,
}
_INTERNLM2_7B: dict[str, Any] = {
    **_INTERNLM2,
    "num_layers": 32,
    "embed_dim": 4096,
    "num_heads": 32,
    "mlp_dim": 14336,
}
_INTERNLM2_20B: dict[str, Any] = {
    **_INTERNLM2,
    "num_layers": 48,
    "embed_dim": 6144,
    "num_heads": 48,
    "mlp_dim": 16384,
}

PRESETS: dict[str, dict[str, Any]] = {
    "internlm2_1_8b": _INTERNLM2_1_8B,
    "internlm2_7b": _INTERNLM2_7B,
    "internlm2_20b": _INTERNLM2_20B,
    "internlm2_5_1_8b": _INTERNLM2_1_8B,
    "internlm2_5_7b": _INTERNLM2_7B,
    "internlm2_5_20b": _INTERNLM2_20B,
    # InternLM2.5-7B-Chat-1M's config.json; lmdeploy's and OpenCompass's settings serve it at
    # 1,048,576 tokens with factor 2.5.
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
    return {**dataclasses.asdict(cfg), "rope_scaling": scalings.to_json(cfg.rope_scaling)}


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
    changed: dict[str, Any] = {
        "rope_scaling": scalings.from_json(fields.get("rope_scaling"), source)
    }
    mup = fields.get("mup")
    if isinstance(mup, dict):
        names = [field.name for field in dataclasses.fields(MuP)]
        for name in mup:
            if name not in names:
                raise UserError(f"{source}: mup has no field {_unknown(name, names)}")
        changed["mup"] = MuP(**mup)
    if isinstance(lora := fields.get("lora"), dict):
        names = [field.name for field in dataclasses.fields(LoRA)]
        for name in lora:
            if name not in names:
                raise UserError(f"{source}: lora has no field {_unknown(name, names)}")
        changed["lora"] = LoRA(**lora)
    if isinstance(fields.get("attention_pattern"), list):
        changed["attention_pattern"] = tuple(fields["attention_pattern"])
    return ModelConfig(**{**fields, **changed})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{name!r}{hint}; there are {', '.join(known)}"
