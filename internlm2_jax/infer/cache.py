"""The paged KV cache: its arrays, its bytes, and which page belongs to whom.

`models.decoder.Cache` says how the arrays lie. Here `Pool` keeps the books of one part of the pages
on the host: who holds a page, and which pages hold the beginning of a text that came by before.

A full page of a prompt is named by a hash of all tokens up to its end. A later request whose text
begins so takes the page instead of computing it. Only full pages are shared and they are never
written again, so nothing needs to be copied on a write. A page that nobody holds keeps its content
until its room is needed, the longest unused first.
"""

from __future__ import annotations

import collections
import hashlib
import math
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.kernels import paged
from internlm2_jax.models.attention import Pages
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.decoder import Cache

PAGE = 64  # tokens of a page, where nothing else is said
KINDS = ("auto", "float32", "bfloat16", "int8")


def pages(cfg: ModelConfig, count: int, page: int, kind: str = "auto") -> Pages:
    """Empty pages of `page` tokens in all layers; `kind` "auto" is the type of the products."""
    shape = (cfg.num_layers, count, cfg.num_kv_heads, page, cfg.head_dim)
    axes = ("layer", "batch", "kv_heads", None, None)
    dtype = paged.storage(_dtype(cfg, kind))
    kept = [sharding.constrain(jnp.zeros(shape, dtype), *axes) for _ in range(2)]
    if dtype == jnp.int8:
        scales = jnp.zeros(shape[:-1], jnp.float32)
        kept += [sharding.constrain(scales, *axes[:-1]) for _ in range(2)]
    return tuple(kept)


def empty(cfg: ModelConfig, slots: int, lengths: Int[Array, " B"], kind: str = "auto") -> Cache:
    """A cache for `slots` tokens a row, for use without an engine.

    Args:
      lengths: the most tokens each row may come to hold; fixes its rotation (rope.py).
    """
    rows, page = lengths.shape[0], min(slots, PAGE)
    table = jnp.arange(rows * -(-slots // page), dtype=jnp.int32).reshape(rows, -1)
    return Cache(
        pages=pages(cfg, table.size, page, kind),
        table=table,
        used=jnp.zeros(rows, jnp.int32),
        rope_length=lengths,
    )


def bytes_per_token(cfg: ModelConfig, kind: str = "auto") -> int:
    """Bytes that one token of one row takes."""
    dtype = _dtype(cfg, kind)
    head = cfg.head_dim * dtype.itemsize + (4 if dtype == jnp.int8 else 0)
    return 2 * cfg.num_layers * cfg.num_kv_heads * head


def _dtype(cfg: ModelConfig, kind: str) -> np.dtype:
    if kind not in KINDS:
        raise UserError(f"no cache type {kind!r}; there are {', '.join(KINDS)}")
    return jnp.dtype(cfg.dtype if kind == "auto" else kind)


def bucket(size: int, smallest: int = 16) -> int:
    """The compiled size that holds `size`: smallest * 2**n or 1.5 * smallest * 2**n."""
    if size <= smallest:
        return smallest
    power = smallest * 2 ** math.ceil(math.log2(size / smallest))
    return power * 3 // 4 if size <= power * 3 // 4 else power


def names(tokens: Sequence[int], page: int, salt: bytes = b"") -> list[bytes]:
    """A name for each full page of a text: pages have one name when all up to their end is equal.

    Args:
      salt: what else the keys and values depend on, such as the rotation.
    """
    found, name = [], hashlib.blake2b(salt, digest_size=16).digest()
    ids = np.asarray(tokens, np.int32)
    for start in range(0, len(ids) - page + 1, page):
        part = ids[start : start + page].tobytes()
        name = hashlib.blake2b(name + part, digest_size=16).digest()
        found.append(name)
    return found


class Pool:
    """Books of `count` pages: each is free, held by one or more requests, or kept for its name."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.count - self.available

    def find(self, wanted: Sequence[bytes]) -> list[int]:
        """Pages of the longest beginning of `wanted` that is here. They are not held yet."""
        found = []
        for name in wanted:
            if name not in self._page_of:
                break
            found.append(self._page_of[name])
        return found

    def fits(self, shared: Sequence[int], count: int) -> bool:
        """Whether `shared` can be held and `count` pages taken beside them."""
        return count <= self.available - sum(page in self._idle for page in shared)

    def take(self, shared: Sequence[int], count: int) -> list[int]:
        """Holds `shared` and `count` more; gives all of them. Ask `fits` first."""
        for page in shared:
            self._idle.pop(page, None)
            self._holders[page] += 1
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._name_of.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return [*shared, *taken]

    def publish(self, page: int, name: bytes) -> None:
        """Names a held page whose content is complete; the first of equal pages keeps the name."""
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name] = page
            self._name_of[page] = name

    def release(self, held: Iterable[int]) -> None:
        """Gives pages back, once for each time they were taken."""
        # The end of a text is dropped before its beginning, without which it cannot be found.
        for page in reversed(list(held)):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._name_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget(self) -> None:
        """Drops all names: what the pages hold was computed with other weights."""
        self._free += self._idle
        self._idle.clear()
        self._page_of.clear()
        self._name_of.clear()
