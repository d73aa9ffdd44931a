"""Attention kernels of others, behind the signature of `kernels/attention.py`.

Each raises `UserError` when it cannot do what is asked for, with what to use instead. All of them
are causal self-attention; none repeats keys or values.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from internlm2_jax.errors import UserError

HALF = (jnp.bfloat16, jnp.float16)


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    fused_backward: bool = False,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """JAX's splash attention (TPU): rows of a multiple of 128.

    Args:
      fused_backward: one backward kernel instead of two; it keeps a partial gradient of q for every
        block of keys in HBM.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    length, heads, dim = q.shape[1:]
    if length % 128:
        raise UserError(f"splash: rows of {length} are no multiple of 128; use flash_gqa or pad")
    size = max(size for size in (128, 256, 512) if length % size == 0)
    of_query = None if fused_backward else size  # what only the second backward kernel has
    blocks = splash_attention_kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=of_query,
        block_kv_dq=of_query,
        use_fused_bwd_kernel=fused_backward,
    )
    mask: Any = splash_attention_mask.CausalMask((length, length))
    if window is not None:
        mask = splash_attention_mask.LocalMask((length, length), (window - 1, 0), 0)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        residual_checkpoint_name="attention_out",
        interpret=interpret,
    )

    def row(q: Array, k: Array, v: Array, ids: Array | None) -> Array:
        segments = None if ids is None else splash_attention_kernel.SegmentIds(ids, ids)
        return kernel(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), segments)

    out = jax.vmap(row)(q * dim**-0.5, k, v, segment_ids)
    return out.swapaxes(1, 2).astype(q.dtype)


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """cuDNN's fused attention (GPU): bfloat16 or float16, no segment ids."""
    if segment_ids is not None:
        raise UserError("cudnn: no segment ids in jax.nn.dot_product_attention; use blockwise")
    if q.dtype not in HALF:
        raise UserError(f"cudnn: takes bfloat16 or float16, got {q.dtype}; use blockwise")
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def mosaic_gpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """JAX's Hopper kernel: forward only, rows of a multiple of 128, no segments, no window."""
    try:
        from jax.experimental.pallas.ops.gpu import attention_mgpu
    except ImportError as error:
        raise UserError(f"mosaic_gpu: {error}; install jax[cuda13]") from error
    if attention_mgpu.cuda_versions is None:
        raise UserError("mosaic_gpu: there are no CUDA libraries for jax; install jax[cuda13]")
    length, dim = q.shape[1], q.shape[3]
    if segment_ids is not None or window is not None:
        raise UserError("mosaic_gpu: knows neither segment ids nor a window; use blockwise")
    if q.dtype not in HALF or length % 128 or dim % 64:
        raise UserError(
            f"mosaic_gpu: takes bfloat16 or float16, rows of a multiple of 128 and heads of a "
            f"multiple of 64; got {q.dtype}, {length}, {dim}; use cudnn"
        )
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=64 if length % 256 else 128, max_concurrent_steps=2, causal=True
    )

    @jax.custom_vjp
    def attention(q: Array, k: Array, v: Array) -> Array:
        return attention_mgpu.attention(q, k, v, config)

    def forward(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return attention(q, k, v), None

    def backward(residuals: None, gradient: Array) -> tuple[Array, Array, Array]:
        raise UserError("mosaic_gpu: JAX's kernel has no causal backward pass; use cudnn")

    attention.defvjp(forward, backward)
    return attention(q, k, v)


def tokamax(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Tokamax, which picks a kernel for the platform itself; needs Python 3.12."""
    library = _tokamax()
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return library.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        mask=mask,
        local_window_size=None if window is None else (window - 1, 0),
    )


@functools.cache
def _tokamax() -> Any:
    try:
        import tokamax as library
    except ImportError as error:
        mend = "pip install -e '.[tokamax]' with Python 3.12"
        raise UserError(f"tokamax: {error}; {mend}") from error
    return library
