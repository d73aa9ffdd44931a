"""The order of a row's tokens under ring attention, which gives every device equal causal work.

A row is cut into twice as many chunks as there are devices; device i holds chunks i and 2n-1-i, one
that sees little and one that sees much (kernels/ring_attention.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from internlm2_jax.errors import UserError


def zigzag(x: Any, ways: int, axis: int = 1) -> Any:
    """Puts the tokens of `x`, numpy or jax, in zig-zag order for `ways` devices.

    Errors: UserError when twice the number of devices does not divide the axis.
    """
    return _reorder(x, _chunk_order(ways), axis)


def unzigzag(x: Any, ways: int, axis: int = 1) -> Any:
    """The inverse of `zigzag`."""
    return _reorder(x, np.argsort(_chunk_order(ways)), axis)


def _chunk_order(ways: int) -> np.ndarray:
    low = np.arange(ways)
    return np.stack([low, 2 * ways - 1 - low], axis=1).reshape(-1)


def _reorder(x: Any, order: np.ndarray, axis: int) -> Any:
    size = chunk_size(x.shape[axis], order.size)
    shape = (*x.shape[:axis], order.size, size, *x.shape[axis + 1 :])
    return x.reshape(shape).take(order, axis=axis).reshape(x.shape)


def chunk_size(length: int, chunks: int) -> int:
    """Tokens of each of `chunks` parts of a row. Errors: UserError when they are not equal."""
    if length % chunks:
        raise UserError(
            f"rows of {length} tokens do not divide into {chunks} chunks, two for each of "
            f"{chunks // 2} devices along the context axis; use a multiple of {chunks}"
        )
    return length // chunks
