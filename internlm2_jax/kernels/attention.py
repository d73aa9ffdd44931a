"""Causal grouped-query attention: its definition, and the choice of an implementation.

`reference` is the definition. Query head n reads key/value head n // G: queries are viewed as
[K, G] and keys and values are never repeated. Scores and softmax are float32.

`blockwise` computes the same in blocks of queries, each against the keys up to its own end: half
the work of the full square, memory linear in the length (every block is recomputed in the backward
pass), and blocks that stay in a CPU's cache. On two CPU cores, forward and backward, it takes 1.16
times the reference's time in rows of 128, 0.66 in rows of 512, 0.52 in rows of 1024
(benchmarks/attention.py), so `auto` takes it above 128.

`flash_gqa` is our kernel for TPU (flash_gqa.py); the others are kernels that somebody keeps well
(adapters.py).

`cached` is the square of both; the engine's cache has kernels of its own (decode_gqa.py, paged.py).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax.errors import UserError
from internlm2_jax.kernels import adapters
from internlm2_jax.kernels.flash_gqa import flash_gqa

MASKED = -1e30  # finite: a row that may see nothing gives a mean, not NaN
MIN_BLOCK = 128
MAX_BLOCKS = 16  # blocks are unrolled in the program; more of them only lengthen compilation

logger = logging.getLogger(__name__)


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k' / sqrt(H)) v over earlier positions of the same segment."""
    length = q.shape[1]
    mask = _mask((0, length), (0, length), segment_ids, window)
    return cached(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)


def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """As `reference`, a block of queries at a time."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    attend = jax.checkpoint(cached)
    blocks = []
    for start, end in _blocks(q.shape[1]):
        first = 0 if window is None else max(0, start - window + 1)
        mask = _mask((start, end), (first, end), segment_ids, window)
        blocks.append(attend(q[:, start:end], k[:, :, first:end], v[:, :, first:end], mask))
    return jnp.concatenate(blocks, axis=1)


def cached(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B T N H"]:
    """Attention of T queries over S slots of keys and values, those that `mask` lets them see."""
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, keys.shape[1], heads // keys.shape[1], dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # as the products want it: a CPU gains a quarter
    scores = jnp.einsum("bkgth,bksh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores / math.sqrt(dim), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, values)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _blocks(length: int) -> list[tuple[int, int]]:
    """(first, end) of the blocks of queries."""
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A function with the signature of `reference`, and the platforms it runs on (None: all)."""

    function: Callable[..., Array]
    platforms: tuple[str, ...] | None = None


GPU = ("gpu", "cuda", "rocm")

IMPLEMENTATIONS = {
    "reference": Implementation(reference),
    "blockwise": Implementation(blockwise),
    "flash_gqa": Implementation(flash_gqa, ("tpu",)),
    "splash": Implementation(adapters.splash, ("tpu",)),
    "cudnn": Implementation(adapters.cudnn, GPU),
    "mosaic_gpu": Implementation(adapters.mosaic_gpu, GPU),
    "tokamax": Implementation(adapters.tokamax),
}


def dispatch(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    impl: str = "auto",
) -> Float[Array, "B T N H"]:
    """Causal attention within equal segment ids, by the implementation named `impl`.

    Args:
      window: positions a query sees, its own included; None for all earlier ones.
      impl: a name in `IMPLEMENTATIONS`, or "auto" for the choice of `choose`.

    Raises:
      UserError: there is no such implementation, or it cannot do this on this platform.
    """
    if q.shape[2] % k.shape[2]:
        raise UserError(f"{q.shape[2]} query heads do not divide into {k.shape[2]} key/value heads")
    if window is not None and window < 1:
        raise UserError(f"window={window}: a query sees at least its own position; use 1 or more")
    on = platform(q)
    name = choose(q, segment_ids, on) if impl == "auto" else impl
    if name not in IMPLEMENTATIONS:
        raise UserError(
            f"no attention implementation {impl!r}; there are auto, {', '.join(IMPLEMENTATIONS)}"
        )
    chosen = IMPLEMENTATIONS[name]
    if chosen.platforms is not None and on not in chosen.platforms:
        raise UserError(f"attention {name!r} runs on {chosen.platforms[0]}, not on {on}; use auto")
    _log_once(impl, name, on)
    return chosen.function(q, k, v, segment_ids=segment_ids, window=window)


def choose(q: Float[Array, "B T N H"], segment_ids: Int[Array, "B T"] | None, on: str) -> str:
    """The implementation that "auto" means for these arrays on the platform `on`."""
    if on == "tpu":
        return "flash_gqa"
    whole = segment_ids is None and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    if on in GPU and whole and q.dtype in adapters.HALF:
        return "cudnn"
    # Nothing to leave out in rows of one block.
    return "blockwise" if q.shape[1] > MIN_BLOCK else "reference"


def platform(x: Array) -> str:
    """The platform that a computation with `x` is compiled for: "cpu", "tpu", "gpu" or "cuda".

    The devices of the mesh in use say it, or those of the mesh that `x` is sharded over, so that a
    program for a TPU that is not here gets the TPU's kernel. Without a mesh it is the default one.
    """
    for mesh in (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh):
        if mesh.abstract_device is not None:
            return mesh.abstract_device.platform
    return jax.default_backend()


def _mask(
    queries: tuple[int, int],
    keys: tuple[int, int],
    segment_ids: Int[Array, "B T"] | None,
    window: int | None,
) -> Bool[Array, "#B T S"]:
    """Which of the positions of `keys` (first, end) the queries (first, end) see."""
    distance = jnp.arange(*queries)[:, None] - jnp.arange(*keys)
    mask = (distance >= 0)[None]
    if window is not None:
        mask = mask & (distance < window)
    if segment_ids is not None:
        mask = mask & (segment_ids[:, slice(*queries), None] == segment_ids[:, None, slice(*keys)])
    return mask


@functools.cache
def _log_once(asked: str, name: str, on: str) -> None:
    logger.info("attention: %s -> %s on %s", asked, name, on)
