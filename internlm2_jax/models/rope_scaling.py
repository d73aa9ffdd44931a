"""Ways to read longer rows than a model was trained on: what `ModelConfig.rope_scaling` holds.

Without scaling, the pair i of a head turns by position * f_i with f_i = theta^(-2i/H). Each class
below says what becomes of f_i, and of the size of cosine and sine ("attention factor"), for a row
of n tokens; rope.py computes it. M is `ModelConfig.max_position_embeddings`.

Hugging Face's config.json writes the same as {"type": NAME, ...}, in newer files "rope_type".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from internlm2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PositionInterpolation:
    """f_i / factor: positions are squeezed into the trained range (Chen et al., 2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _factor(self.factor)


@dataclasses.dataclass(frozen=True)
class DynamicNTK:
    """For n > M the base becomes theta * (factor * n / M - (factor - 1))^(H / (H - 2)).

    InternLM2's form. Low frequencies stretch, high ones stay, and rows within M are untouched.
    """

    factor: float

    def __post_init__(self) -> None:
        _factor(self.factor)


@dataclasses.dataclass(frozen=True)
class YaRN:
    """NTK by parts with attention temperature (Peng et al., 2309.00071).

    Pair i makes r_i = O f_i / (2 pi) turns over the O = `original_max_position_embeddings` trained
    positions. Pairs of more than `beta_fast` turns keep f_i, those of fewer than `beta_slow` get
    f_i / factor, and between them

        f_i' = (1 - g) f_i / factor + g f_i,    g a ramp from 0 (slow) to 1 (fast).

    The paper draws the ramp linearly in r; its authors' code, every public runtime and so every
    checkpoint draw it linearly in i, from floor(i(beta_fast)) to ceil(i(beta_slow)) with
    i(r) = H ln(O / (2 pi r)) / (2 ln theta). This does as they do.

    Scores are divided by a temperature t with sqrt(1 / t) = 0.1 ln(factor) + 1: cosine and sine of
    both queries and keys are multiplied by that. `attention_factor` replaces it when given.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _factor(self.factor)
        positive("original_max_position_embeddings", self.original_max_position_embeddings)
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if self.beta_fast <= self.beta_slow:
            raise UserError(
                f"rope_scaling beta_fast {self.beta_fast} is not above beta_slow {self.beta_slow}; "
                "both count turns, the paper takes 32 and 1"
            )

    def attention(self, max_position_embeddings: int) -> float:
        """What cosine and sine are multiplied by."""
        del max_position_embeddings
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class LongRoPE:
    """f_i / e_i with searched factors e (Ding et al., 2402.13753; MiniCPM4 section 2).

    e is `short_factor` for rows of n <= O = `original_max_position_embeddings` tokens and
    `long_factor` for longer ones; both have H / 2 entries. Cosine and sine are multiplied by

        sqrt(1 + ln(s) / ln(O)),    1 when s <= 1,

    at every length, where s is `factor` or else M / O; or by `attention_factor` when given.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        positive("original_max_position_embeddings", self.original_max_position_embeddings)
        for name in ("factor", "attention_factor"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or isinstance(values, str):
                raise UserError(f"rope_scaling {name} is {values!r}; it must be a list of numbers")
            for value in values:
                positive(name, value)
            object.__setattr__(self, name, tuple(values))
        if len(self.short_factor) != len(self.long_factor):
            raise UserError(
                f"rope_scaling short_factor has {len(self.short_factor)} entries and long_factor "
                f"{len(self.long_factor)}; both need one for each pair of a head's dimensions"
            )

    def attention(self, max_position_embeddings: int) -> float:
        """What cosine and sine are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        original = self.original_max_position_embeddings
        scale = self.factor or max_position_embeddings / original
        return 1.0 if scale <= 1.0 else math.sqrt(1.0 + math.log(scale) / math.log(original))


RopeScaling = PositionInterpolation | DynamicNTK | YaRN | LongRoPE

KINDS: dict[str, type[RopeScaling]] = {
    "linear": PositionInterpolation,
    "dynamic": DynamicNTK,
    "yarn": YaRN,
    "longrope": LongRoPE,
}


def kind(scaling: RopeScaling) -> str:
    """The name that stands for this class in files."""
    return next(name for name, cls in KINDS.items() if type(scaling) is cls)


def to_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """{"type": ..., fields}; `from_json` reads it back."""
    if scaling is None:
        return None
    return {"type": kind(scaling), **dataclasses.asdict(scaling)}


def from_json(fields: Any, source: str) -> RopeScaling | None:
    """The scaling that a JSON object describes; null is none.

    An object of only a factor is dynamic NTK: model.json had no type while that was all there was.
    """
    if fields is None or isinstance(fields, RopeScaling):
        return fields
    if not isinstance(fields, dict):
        raise UserError(f"{source}: rope_scaling is {fields!r}; it must be null or an object")
    name = "dynamic" if set(fields) == {"factor"} else fields.get("type")
    if name not in KINDS:
        raise UserError(
            f"{source}: rope_scaling type {name!r} is unknown; there are {', '.join(KINDS)}, or "
            "null for none"
        )
    given = {key: value for key, value in fields.items() if key != "type"}
    known = {field.name: field for field in dataclasses.fields(KINDS[name])}
    needed = [n for n, field in known.items() if field.default is dataclasses.MISSING]
    for problem, names in (
        ("has no field", [key for key in given if key not in known]),
        ("needs", [key for key in needed if key not in given]),
    ):
        if names:
            raise UserError(
                f"{source}: rope_scaling of type {name!r} {problem} {', '.join(names)}; "
                f"its fields are {', '.join(known)}"
            )
    try:
        return KINDS[name](**given)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _factor(value: Any) -> None:
    # Hugging Face's own check refuses whole numbers, so a file with one loads nowhere else.
    if not isinstance(value, float) or not 1.0 <= value < math.inf:
        raise UserError(f"rope_scaling factor is {value!r}; it must be a float of 1.0 or more")


def positive(name: str, value: Any) -> None:
    """Errors: UserError when `value` is not a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise UserError(f"rope_scaling {name} is {value!r}; it must be a positive number")
