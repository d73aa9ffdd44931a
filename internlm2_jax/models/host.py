"""Parameters between this host's memory and the devices, one layer of a stack at a time.

With no sharding an array lies on the default device. With one, every process of the mesh calls
these functions in the same order, and touches what its own devices keep.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from internlm2_jax.errors import UserError


def place(shape: tuple[int, ...], sharding: Any, read: Callable[..., np.ndarray]) -> jax.Array:
    """An array whose pieces `read` gives; each host asks for those of its own devices."""
    if sharding is None:
        return jnp.asarray(read(tuple(slice(0, size) for size in shape)))
    seen: dict[Any, np.ndarray] = {}  # devices that keep the same piece share one reading

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = tuple((s.start, s.stop) for s in index)
        if key not in seen:
            seen[key] = np.ascontiguousarray(read(index))
        return seen[key]

    return jax.make_array_from_callback(shape, sharding, piece)


def without_layer(path: tuple[str, ...], sharding: NamedSharding) -> NamedSharding:
    """Sharding of one layer of the stack at `path`."""
    spec = tuple(sharding.spec)
    if spec and spec[0] is not None:
        raise UserError(
            f"{'/'.join(path)}: the layer axis is cut over mesh axis {spec[0]!r}; layers are read "
            "and written one at a time, so choose a layout that leaves it whole"
        )
    return NamedSharding(sharding.mesh, P(*spec[1:]), memory_kind=sharding.memory_kind)


def zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> jax.Array:
    """An empty stack of layers, for `put`."""
    return _zeros(shape, dtype, sharding)()


@functools.cache  # a fresh jit would compile again
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> Callable[[], jax.Array]:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@partial(jax.jit, donate_argnums=0)
def put(stack: jax.Array, piece: jax.Array, layer: int) -> jax.Array:
    """The stack with one layer written, in place; the stack given is used up."""
    return jax.lax.dynamic_update_index_in_dim(stack, piece, layer, 0)


@jax.jit
def _take(stack: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


def fetch(leaf: Any, layer: int | None) -> np.ndarray:
    """One layer of an array, or a whole one, on the host."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf if layer is None else leaf[layer])
    with on_mesh({(): leaf.sharding}):
        # A copy also of a whole array: jax would keep the host's value beside the array itself.
        piece = jnp.copy(leaf) if layer is None else _take(leaf, layer)
        if not piece.is_fully_addressable:
            everywhere = NamedSharding(leaf.sharding.mesh, P())  # type: ignore[attr-defined]
            piece = jax.jit(lambda x: x, out_shardings=everywhere)(piece).addressable_data(0)
        return np.asarray(piece)


def on_mesh(shardings: Mapping[Any, Any]) -> contextlib.AbstractContextManager:
    """Enters the mesh of these shardings, when they have one and it is not entered already."""
    mesh = next((p.mesh for p in shardings.values() if isinstance(p, NamedSharding)), None)
    if mesh is None or jax.sharding.get_abstract_mesh() == mesh.abstract_mesh:
        return contextlib.nullcontext()
    assert isinstance(mesh, Mesh)
    return jax.set_mesh(mesh)


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
