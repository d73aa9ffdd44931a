"""The device mesh, one table of rules per layout, and the few operations that must know the mesh.

Parameters carry logical axis names (`model.axes`). A layout maps those names to mesh axes and so
says where parameters rest; `COMPUTE` says how activations, and weights at the moment of use, lie.
Under `fsdp` a weight rests cut along `embed` over the "data" axis and is gathered when used: the
gather is the difference of the two tables, and its transpose scatters the gradient back.

The mesh has explicit axes: the sharding of every array is part of its type, and only the places
below need help (embedding gather, contractions over a sharded axis, gather along the vocabulary).
With no mesh, or one whose axes are automatic, the same helpers are the plain operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from internlm2_jax.errors import UserError

MESH_AXES = ("data", "model")

# Where parameters rest: logical axis -> mesh axis, for each layout.
LAYOUTS: dict[str, dict[str, str]] = {
    "single": {},
    "fsdp": {"embed": "data"},
    "fsdp_tp": {
        "embed": "data",
        "heads": "model",
        "kv_heads": "model",
        "mlp": "model",
        "vocab": "model",
    },
}

# How activations and weights lie while they are used.
COMPUTE: dict[str | None, str] = {
    "batch": "data",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
}


def make_mesh(
    data: int | None = None, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """An explicit ("data", "model") mesh; `data` defaults to all devices not used by `model`.

    Enter it once with `jax.set_mesh(mesh)`.
    """
    devices = list(devices if devices is not None else jax.devices())
    if data is None:
        data = len(devices) // model
    if data < 1 or model < 1 or data * model > len(devices):
        raise UserError(
            f"a mesh of data={data} x model={model} needs {max(data, 1) * model} devices, "
            f"there are {len(devices)}; make it smaller"
        )
    return jax.make_mesh(
        (data, model), MESH_AXES, (AxisType.Explicit,) * 2, devices=devices[: data * model]
    )


def spec(axes: tuple[str | None, ...], layout: str) -> P:
    """PartitionSpec of a parameter with these logical axes."""
    if layout not in LAYOUTS:
        raise UserError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    rules = LAYOUTS[layout]
    return P(*(rules.get(name) if name else None for name in axes))


def shardings(axes: Any, mesh: Mesh, layout: str, abstract: Any = None) -> Any:
    """NamedSharding of every parameter.

    Args:
      axes: tree of tuples of logical axis names (`model.axes`).
      abstract: tree of the same form with the shapes (`model.abstract`). When given, an axis that
        the mesh does not divide is a UserError that names the parameter.
    """
    result = jax.tree.map(lambda a: NamedSharding(mesh, spec(a, layout)), axes, is_leaf=_is_axes)
    if abstract is not None:
        jax.tree.map_with_path(_check_divides, abstract, result)
    return result


def constrain(x: Array, *axes: str | None) -> Array:
    """Moves `x` to the compute layout of its logical axes."""
    mesh = _explicit_mesh()
    return x if mesh is None else jax.reshard(x, _compute_spec(mesh, x.shape, axes))


def contract(
    x: Array, w: Array, num_axes: int, out_axes: tuple[str | None, ...], dtype: Any = None
) -> Array:
    """Contracts the last `num_axes` axes of `x` with the first of `w`; `dtype` is the result's."""
    lhs = tuple(range(x.ndim - num_axes, x.ndim))
    dims = ((lhs, tuple(range(num_axes))), ((), ()))
    shape = x.shape[: x.ndim - num_axes] + w.shape[num_axes:]
    mesh = _explicit_mesh()
    out = None if mesh is None else _compute_spec(mesh, shape, out_axes)
    return jax.lax.dot_general(x, w, dims, preferred_element_type=dtype, out_sharding=out)


def take_rows(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of an embedding table."""
    mesh = _explicit_mesh()
    if mesh is None:
        return table[ids]
    shape = (*ids.shape, table.shape[1])
    return table.at[ids].get(out_sharding=_compute_spec(mesh, shape, ("batch", None, None)))


def take_last(x: Float[Array, "*B V"], ids: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """x[..., ids]: one entry of the last axis, which may be sharded, for each leading index."""
    if _explicit_mesh() is None:
        return jnp.take_along_axis(x, ids[..., None], axis=-1)[..., 0]
    columns = jax.lax.broadcasted_iota(ids.dtype, x.shape, x.ndim - 1)
    chosen = constrain(columns, "batch", *(None,) * (x.ndim - 2), "vocab") == ids[..., None]
    return jnp.where(chosen, x, 0).sum(axis=-1)


def _explicit_mesh() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and mesh.are_all_axes_explicit else None


def _compute_spec(mesh: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> P:
    """Rules of `COMPUTE`, leaving out mesh axes that the mesh lacks or that do not divide."""
    entries = []
    for size, name in zip(shape, axes, strict=True):
        entry = COMPUTE.get(name)
        fits = entry in mesh.shape and size % mesh.shape[entry] == 0
        entries.append(entry if fits else None)
    return P(*entries)


def _check_divides(path: Any, leaf: Any, sharding: NamedSharding) -> None:
    for size, entry in zip(leaf.shape, sharding.spec, strict=False):
        names = (entry,) if isinstance(entry, str) else entry or ()
        ways = math.prod(sharding.mesh.shape[name] for name in names)
        if size % ways:
            raise UserError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')}: an axis of {size} does "
                f"not divide over mesh axis {entry!r} of {ways}; choose another mesh or layout"
            )


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)
