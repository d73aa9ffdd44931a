"""Sizes of an engine: what its programs are compiled for, and how its steps are cut."""

from __future__ import annotations

import dataclasses
import itertools
import math

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.infer import cache as kv
from internlm2_jax.models.config import ModelConfig

MAX_PREFILL = 2**14  # tokens of a prefill call
MAX_STEPS = 64  # tokens of a decode call


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes that programs are compiled for, and how steps are cut.

    slots: requests that are decoded together.
    max_length: the most tokens of a request, prompt and response.
    page: tokens of a page; prompts share whole pages.
    pages: pages of the cache; default: every slot can be full. Fewer make requests wait.
    prefill: (rows, tokens) of the prefill programs; a step takes the one that wastes least.
    steps: the most tokens a decode call makes of a request before the host looks.
    steps_shared: the same while another request is being read, so that it waits less. While one
      waits for a slot, a call also ends when a sixteenth of the slots, or the first, fall empty.
    top_logprobs: how many of the likeliest tokens are reported with each one.
    stop_ids: the most stop ids of a request.
    cache: type of the keys and values, "auto" (of the model's products), "float32", "bfloat16" or
      "int8" (with a float32 scale per token and head).
    weights: "auto" (as given), "int8" or "int4" (models/quantise.py).
    """

    slots: int = 8
    max_length: int = 2048
    page: int = kv.PAGE
    pages: int | None = None
    prefill: tuple[tuple[int, int], ...] = ((1, 32), (1, 256), (8, 32))
    steps: int = 16
    steps_shared: int = 4
    top_logprobs: int = 0
    stop_ids: int = 8
    cache: str = "auto"
    weights: str = "auto"

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "page", "pages", "steps", "steps_shared"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"engine: {name} is {value}; it must be 1 or more")
        if not self.prefill or min(itertools.chain(*self.prefill)) < 1:
            raise UserError(f"engine: prefill is {self.prefill}; it lists (rows, tokens), not zero")

    @property
    def pages_per_request(self) -> int:
        return -(-self.max_length // self.page)

    @property
    def num_pages(self) -> int:
        return self.pages or self.slots * self.pages_per_request

    def cache_bytes(self, cfg: ModelConfig) -> int:
        """Bytes of the whole cache on all devices."""
        return self.num_pages * self.page * kv.bytes_per_token(cfg, self.cache)


def config_for(count: int, longest: int, max_new_tokens: int, batch_size: int = 64) -> EngineConfig:
    """Sizes for `count` prompts of up to `longest` tokens, rounded up so that few are compiled."""
    parts = sharding.size_of("data") * sharding.size_of("fsdp")
    slots = 1 << (min(count, batch_size) - 1).bit_length()
    slots = math.ceil(slots / parts) * parts
    width, new = kv.bucket(longest), kv.bucket(max_new_tokens)
    page = 32 if width + new <= 512 else 64
    return EngineConfig(
        slots=slots,
        max_length=width + new,
        page=page,
        prefill=tuple(dict.fromkeys([(slots, min(width, max(16, MAX_PREFILL // slots))),
                                     (parts, min(width, 512))])),
        steps=min(new, MAX_STEPS),
        steps_shared=min(new, 8),
    )  # fmt: skip
