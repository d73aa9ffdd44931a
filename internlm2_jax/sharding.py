"""The device mesh, one table of rules from logical axes to mesh axes, and what must know the mesh.

A layout is a string, `fsdp=16,tensor=4`: the size of each of four mesh axes, the rest being 1.

    data     copies of the model; over slices of a pod, gradients cross the data-centre network
    fsdp     parameters, gradients and optimizer state rest cut; a weight is gathered when used
    context  the tokens of a row are cut; attention runs as a ring (kernels/ring_attention.py).
             Parameters rest cut over it as well: to the weights it is more of fsdp
    tensor   heads, MLP and vocabulary are cut; between blocks, so are the tokens of a row

Parameters carry logical axis names (`model.axes`). `STORED` says how parameters rest, `COMPUTE` how
activations, and weights at the moment of use, lie; the gather of a weight is the difference of the
two tables, and its transpose scatters the gradient back. Layouts differ in sizes only, so there is
one table of each.

The mesh has explicit axes: the sharding of every array is part of its type, and only the functions
below need help (embedding gather, contractions over a sharded axis, kernels). With no mesh, or one
whose axes are automatic, they are the plain operations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from internlm2_jax.errors import UserError
from internlm2_jax.zigzag import chunk_size, zigzag

MESH_AXES = ("data", "fsdp", "context", "tensor")
Entry = str | tuple[str, ...] | None
Axes = tuple[str | None, ...]

_CUT_BY_TENSOR: dict[str | None, Entry]
_CUT_BY_TENSOR = dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "tensor")
# How parameters rest. Norms and scalars are too small to be worth a gather.
# "mlp_in" is the first axis of the matrix that leaves the MLP: its last one, cut 256 ways, would be
# 16 columns, which a TPU pads to 128.
STORED: dict[str | None, Entry] = {
    "embed": ("fsdp", "context"),
    "mlp_in": ("tensor", "fsdp", "context"),
    **_CUT_BY_TENSOR,
}
FEW_IDS = 8  # ids are few where the table has so many rows for each
# How activations, and weights in use, lie. "length" is the tokens of a row inside a block,
# "residual_length" between blocks, where no axis but this one is left for `tensor` to cut.
COMPUTE: dict[str | None, Entry] = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "residual_length": ("context", "tensor"),
    "mlp_in": "tensor",
    **_CUT_BY_TENSOR,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes; see the head of this file."""

    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`fsdp=16,tensor=4`; the empty string is one device.

        Errors: UserError for an unknown axis, a repeated one, or a size that is no number.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, size = (item.strip() for item in part.partition("="))
            if name not in MESH_AXES:
                near = difflib.get_close_matches(name, MESH_AXES, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise UserError(
                    f"layout {text!r}: no mesh axis {name!r}{hint}; "
                    f"there are {', '.join(MESH_AXES)}"
                )
            if name in sizes or not size.isdecimal() or int(size) < 1:
                why = "is given twice" if name in sizes else f"has size {size!r}"
                raise UserError(f"layout {text!r}: {name} {why}; write it like fsdp=16,tensor=4")
            sizes[name] = int(size)
        return cls(**sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return dataclasses.astuple(self)

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes)

    @property
    def batch_ways(self) -> int:
        """Into how many parts the rows of a batch are cut."""
        return self.data * self.fsdp

    @property
    def param_ways(self) -> int:
        """Into how many parts parameters and optimizer state are cut."""
        return self.fsdp * self.context * self.tensor

    def __str__(self) -> str:
        named = zip(MESH_AXES, self.sizes, strict=True)
        return ",".join(f"{name}={size}" for name, size in named if size > 1) or "one device"

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """An explicit mesh of exactly these devices (default: all); enter it with `jax.set_mesh`.

        Devices of several slices must be divided by `data`: only that axis crosses slices.
        Errors: UserError when the number of devices is not the layout's.
        """
        devices = list(devices if devices is not None else jax.devices())
        if self.num_devices != len(devices):
            raise UserError(
                f"layout {self} needs {self.num_devices} devices, there are {len(devices)}; "
                "the sizes of its axes must multiply to that"
            )
        return Mesh(_arrange(self.sizes, devices), MESH_AXES, (AxisType.Explicit,) * 4)

    def check(
        self, axes: Any, abstract: Any, *, batch: int | None = None, length: int | None = None
    ) -> None:
        """Refuses a layout that does not divide a model's parameters or a batch [B, T].

        Args:
          axes, abstract: `model.axes` and `model.abstract`.
        Errors: UserError naming the parameter or the size, both numbers, and what to change.
        """
        sizes = dict(zip(MESH_AXES, self.sizes, strict=True))

        def divides(path: Any, leaf: Any, names: Axes) -> None:
            for size, name in zip(leaf.shape, names, strict=True):
                _check_divides(jax.tree_util.keystr(path, simple=True, separator="/"),
                               size, STORED.get(name), sizes)  # fmt: skip

        jax.tree.map_with_path(divides, abstract, axes)
        if batch is not None:
            _check_divides("batch_size", batch, COMPUTE["batch"], sizes)
        if length is not None:
            _check_divides("sequence_length", length, COMPUTE["residual_length"], sizes)
            if self.context > 1:
                chunk_size(length, 2 * self.context)


def _arrange(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices so that the inner axes of the mesh lie on neighbouring links."""
    slices = {getattr(device, "slice_index", None) for device in devices}
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % len(slices):
        raise UserError(
            f"{len(slices)} slices do not divide data={sizes[0]}; only data crosses slices, "
            f"so give data={len(slices)} or a multiple"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // len(slices), *sizes[1:]),
        (len(slices), 1, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )


# ------------------------------------------------------------------------- parameters


def stored_spec(axes: Axes) -> P:
    """PartitionSpec of a parameter with these logical axes."""
    return P(*(STORED.get(name) for name in axes))


def shardings(axes: Any, mesh: Mesh) -> Any:
    """NamedSharding of every parameter; `axes` is `model.axes`."""
    return jax.tree.map(lambda a: NamedSharding(mesh, stored_spec(a)), axes, is_leaf=_is_axes)


def rows(mesh: Mesh) -> NamedSharding:
    """How the rows of a batch [B, T] rest."""
    return NamedSharding(mesh, P(COMPUTE["batch"], COMPUTE["length"]))


# ------------------------------------------------------------------- around a computation


@contextlib.contextmanager
def use(layout: str) -> Iterator[None]:
    """Enters the mesh of a layout's text; an empty one is no mesh: one device does everything."""
    with jax.set_mesh(Layout.parse(layout).mesh()) if layout else contextlib.nullcontext():
        yield


def create(init: Callable[[Array], Any], axes: Any, key: Array) -> Any:
    """Parameters `init(key)`, each made where it rests on the mesh in use."""
    mesh = jax.sharding.get_mesh()
    places = None if mesh.empty else shardings(axes, mesh)
    return jax.jit(init, out_shardings=places)(key)


def place(params: Any, axes: Any) -> Any:
    """Moves parameters to where they rest on the mesh in use."""
    mesh = jax.sharding.get_mesh()
    return params if mesh.empty else jax.device_put(params, shardings(axes, mesh))


def abstract(params: Any, axes: Any) -> Any:
    """ShapeDtypeStruct of every parameter, as it rests on the mesh in use; to restore it there.

    `params` are arrays or ShapeDtypeStruct; what they say of a mesh does not count.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        params,
        shardings(axes, mesh),
    )


def local_rows(count: int, mesh: Any = None) -> slice:
    """Which of the `count` rows of a batch the devices of this process hold.

    A process may give `place_rows` these alone. `mesh` is by default the one in use.
    """
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    if mesh.empty:
        return slice(0, count)
    at = NamedSharding(mesh, P(COMPUTE["batch"]))
    places: Any = at.addressable_devices_indices_map((count,)).values()
    held = [index[0].indices(count) for index in places]
    return slice(min(start for start, _, _ in held), max(stop for _, stop, _ in held))


def place_rows(batch: Any, count: int | None = None) -> Any:
    """A batch of host arrays [B, T] or [B] on the mesh in use, in zig-zag order over `context`.

    Args:
      count: rows of the whole batch, of which `batch` holds `local_rows(count)`; by default the
        batch is whole in every process. Only rows of a process's own devices are moved.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return batch
    ways, spec = mesh.shape["context"], rows(mesh).spec

    def put(x: Any) -> Array:
        x = zigzag(x, ways) if ways > 1 and x.ndim > 1 else x
        shape = x.shape if count is None else (count, *x.shape[1:])
        first = 0 if count is None else local_rows(count, mesh).start
        at = NamedSharding(mesh, P(*spec[: x.ndim]))

        def part(index: Any) -> Any:
            start, stop, _ = index[0].indices(shape[0])
            return x[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(shape, at, part)

    return jax.tree.map(put, batch)


def fetch(arrays: Any) -> Any:
    """A tree of arrays as numpy, whole in every process, which all must call this."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    return multihost_utils.process_allgather(arrays, tiled=True)


# ---------------------------------------------------------------- inside a computation


def constrain(x: Array, *axes: str | None) -> Array:
    """Moves `x` to the compute layout of its logical axes."""
    mesh = _explicit_mesh()
    return x if mesh is None else jax.reshard(x, _compute_spec(mesh, x.shape, axes))


def contract(x: Array, w: Array, num_axes: int, out_axes: Axes, dtype: Any = None) -> Array:
    """Contracts the last `num_axes` axes of `x` with the first of `w`; `dtype` is the result's."""
    shape = x.shape[: x.ndim - num_axes] + w.shape[num_axes:]
    mesh = _explicit_mesh()
    if mesh is None:
        # As matrices: XLA:CPU transposes the operands of a gradient that contracts two axes.
        inner = math.prod(w.shape[:num_axes])
        flat = jax.lax.dot(x.reshape(-1, inner), w.reshape(inner, -1), preferred_element_type=dtype)
        return flat.reshape(shape)
    lhs = tuple(range(x.ndim - num_axes, x.ndim))
    dims = ((lhs, tuple(range(num_axes))), ((), ()))
    out = _compute_spec(mesh, shape, out_axes)
    return jax.lax.dot_general(x, w, dims, preferred_element_type=dtype, out_sharding=out)


def take_rows(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of an embedding table, which is not gathered.

    With few ids and a table cut over `tensor` see `_take_apart`. Else:

    Every device looks its own columns up for the tokens of all devices that share the table, then
    an all-to-all turns columns into rows: B T D entries move instead of V D, and the gradient of
    the table is born cut.
    """
    mesh = _explicit_mesh()
    if mesh is None:
        return table[ids]
    rows = _fits(mesh, ids.shape[0], "data")
    length = _fits(mesh, ids.shape[1], "context")
    # Where tokens are cut over `context`, columns are not: a few of them would be padded to 128.
    columns = _fits(mesh, table.shape[1], "fsdp" if length else STORED["embed"])
    ids = jax.reshard(ids, P(rows, length))
    if mesh.shape["tensor"] > 1 and FEW_IDS * ids.size <= table.shape[0]:
        found = _take_apart(mesh, table, ids, P(rows, length), columns)
    else:
        table = jax.reshard(table, P(None, columns))
        found = table.at[ids].get(out_sharding=P(rows, length, columns))
    return constrain(found, "batch", "residual_length", None)


def _take_apart(mesh: Any, table: Array, ids: Array, cut_ids: P, columns: Entry) -> Array:
    """Rows of a table cut over `tensor`: each device gives those that it has, and they are added.

    For a step over few tokens, which would otherwise gather a table to look a few rows up.
    """
    cut = _fits(mesh, table.shape[0], "tensor")
    table = jax.reshard(table, P(cut, columns))

    def take(part: Array, ids: Array) -> Array:
        if cut is None:
            return part[ids]
        at = ids - jax.lax.axis_index("tensor") * len(part)
        here = (at >= 0) & (at < len(part))
        found = part[jnp.clip(at, 0, len(part) - 1)]
        return jax.lax.psum(jnp.where(here[..., None], found, 0), "tensor")

    return jax.shard_map(take, in_specs=(P(cut, columns), cut_ids), out_specs=P(*cut_ids, columns))(
        table, ids
    )


def split_rows(x: Array, parts: int) -> Array:
    """[B, ...] -> [parts, B / parts, ...]; row i goes to part i % parts, on the device it is on."""
    shape = (x.shape[0] // parts, parts, *x.shape[1:])
    if _explicit_mesh() is None:
        return jnp.moveaxis(x.reshape(shape), 1, 0)
    rows, *rest = jax.typeof(x).sharding.spec
    return jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=P(rows, None, *rest)), 1, 0)


def in_parts(
    function: Callable[[Array], Array], x: Float[Array, "B T D"], most: int, above: int
) -> Float[Array, "B T D"]:
    """`function`, which looks at one token at a time, on parts of x along T, one after another.

    Each part is computed again in the backward pass. A device has `most` tokens of a part, or more
    where its tokens do not divide so. x is one part where a device has no more than `above`, and
    with `tensor`, when its result lies otherwise.
    """
    mesh, shape = _explicit_mesh(), x.shape
    rows, length = (None, None) if mesh is None else tuple(jax.typeof(x).sharding.spec)[:2]
    sizes = {} if mesh is None else mesh.shape
    ways = _ways(length, sizes)
    own = shape[1] // ways
    tokens, parts = shape[0] // _ways(rows, sizes) * own, 1
    while tokens > above and own % (2 * parts) == 0 and tokens > most * parts:
        parts *= 2
    if parts == 1 or size_of("tensor") > 1:
        return function(x)

    def reshape(x: Array, shape: tuple[int, ...]) -> Array:
        if mesh is None:
            return x.reshape(shape)
        spec = P(rows, length, *(None,) * (len(shape) - 2))
        return jax.lax.reshape(x, shape, out_sharding=spec)

    each = (shape[0], ways, own // parts, shape[2])

    @jax.checkpoint
    def part(x: Array) -> Array:
        return reshape(function(reshape(x, (shape[0], ways * own // parts, shape[2]))), each)

    x = jnp.moveaxis(reshape(x, (*each[:2], parts, *each[2:])), 2, 0)
    return reshape(jnp.moveaxis(jax.lax.map(part, x), 0, 2), shape)


def per_device(
    function: Callable[..., Any], in_axes: Sequence[Axes], out_axes: Axes | list[Axes]
) -> Callable[..., Any]:
    """`function` on the part of its arguments that each device holds: how kernels run.

    Args:
      in_axes: logical axes of each argument; an argument of None is passed on as it is.
      out_axes: of the result, or a list of those of each result; names are those of `in_axes`.
    """
    mesh = _explicit_mesh()
    if mesh is None:
        return function

    def call(*args: Any) -> Any:
        present = [(a, axes) for a, axes in zip(args, in_axes, strict=True) if a is not None]
        entries: dict[str | None, Entry] = {}
        for a, axes in present:
            entries |= dict(zip(axes, _compute_spec(mesh, a.shape, axes), strict=True))

        def spec(axes: Axes) -> P:
            return P(*(entries[name] if name else None for name in axes))

        def local(*parts: Any) -> Any:
            left = iter(parts)
            return function(*(None if a is None else next(left) for a in args))

        return jax.shard_map(
            local,
            in_specs=tuple(spec(axes) for _, axes in present),
            out_specs=jax.tree.map(spec, out_axes, is_leaf=_is_axes),
            check_vma=False,
        )(*(jax.reshard(a, spec(axes)) for a, axes in present))

    return call


def size_of(axis: str) -> int:
    """Size of a mesh axis of the mesh that is set; 1 with none."""
    mesh = _explicit_mesh()
    return 1 if mesh is None else mesh.shape[axis]


def _explicit_mesh() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and mesh.are_all_axes_explicit else None


def _compute_spec(mesh: Any, shape: tuple[int, ...], axes: Axes) -> P:
    """Rules of `COMPUTE`, leaving out mesh axes that do not divide (a batch of one, one token)."""
    return P(*(_fits(mesh, n, COMPUTE.get(name)) for n, name in zip(shape, axes, strict=True)))


def _fits(mesh: Any, size: int, entry: Entry) -> Entry:
    return entry if size % _ways(entry, mesh.shape) == 0 else None


def _ways(entry: Entry, sizes: Any) -> int:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(sizes[name] for name in names)


def _check_divides(what: str, size: int, entry: Entry, sizes: dict[str, int]) -> None:
    if size % (ways := _ways(entry, sizes)):
        names = " x ".join((entry,) if isinstance(entry, str) else entry or ())
        raise UserError(
            f"{what}: {size} does not divide over {names} = {ways}; choose another layout"
        )


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)
