"""Context-parallel causal attention: the tokens of a row lie on several devices.

A row of T tokens is cut into 2P chunks, and device i of P holds chunks i and 2P - 1 - i (zig-zag
order; Llama 3, arXiv 2407.21783, section 3.3.2). In natural order the first device would be done
at once and the last would see every key; in this one all of them have the same work, and none of it
is masked out. Call a device's chunks low and high, and the keys at hand those of device j:

    j = i    causal attention within the device's own tokens, low before high
    j < i    low keys are seen by low and by high queries; high keys by none
    j > i    high queries see low and high keys; low queries none

So every step but the first is two chunk-by-chunk products without a mask: high queries with low
keys, and one more whose operands are chosen by comparing j with i.

`ring` (arXiv 2310.01889) passes keys and values on to the next device while the ones at hand are
attended to. Outputs are merged by their log-sum-exp. The backward pass runs the ring again, and the
float32 gradients of keys and values travel with them, so nothing of size T is ever stored.
`all_gather` collects keys and values at the start, and scatters their gradients at the end: the
same bytes in fewer and larger messages, which use every link of a torus at once but do not overlap
with the products, and T x K x H memory. Either way keys and values of the K heads are never
repeated.

Tokens, targets, positions, segment ids and loss masks are put in zig-zag order once, on the host
(`sharding.place_rows`); every other part of a decoder and of its loss works token by token.
Positions must be explicit: they no longer count up along the row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from internlm2_jax.errors import UserError
from internlm2_jax.kernels import flash_gqa, partial_attention
from internlm2_jax.kernels.attention import platform

EMPTY = partial_attention.EMPTY


# ---------------------------------------------------------------- on the mesh
def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    axis: str = "context",
    impl: Literal["ring", "all_gather"] = "ring",
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention within equal segment ids of rows in zig-zag order; differentiable.

    The arrays are cut along T over mesh axis `axis` of the explicit mesh in use; rows may be cut
    over further axes, and heads over one that divides K. Without such an axis it is attention on
    one device. Under `jax.checkpoint` the names "attention_out" and "attention_lse" can be saved,
    as with `flash_gqa`.

    Args:
      window: must be None; see below.
      interpret: run the TPU's kernel op by op on any platform; for tests.

    Errors: UserError for a window (which key a query sees first would depend on the device), an
    unknown `impl`, a length that twice the axis does not divide, and kv heads that the mesh axis
    of the query heads does not divide.
    """
    if impl not in LOOPS:
        raise UserError(f"no context-parallel attention {impl!r}; there are {', '.join(LOOPS)}")
    if window is not None:
        raise UserError(
            f"a sliding window of {window} positions cannot be cut along the {axis} axis; use a "
            f"layout with {axis}=1, or no window"
        )
    flash = interpret or platform(q) == "tpu"
    case = _Case.of(q, k, axis, impl, flash, interpret)
    q, k, v = (case.move(x, case.heads) for x in (q, k, v))
    if segment_ids is not None:
        segment_ids = case.move(segment_ids, case.rows)
    return _attention(case, q, k, v, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(case, q, k, v, segment_ids):
    return _attention_forward(case, q, k, v, segment_ids)[0]


def _attention_forward(case, q, k, v, segment_ids):
    local = functools.partial(_forward, case)
    specs = (case.heads, case.heads, case.heads, case.rows)
    out, lse = case.run(local, (q, k, v, segment_ids), specs, (case.heads, case.statistics))
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segment_ids, out, lse)


def _attention_backward(case, residuals, dout):
    local = functools.partial(_backward, case)
    specs = (case.heads, case.heads, case.heads, case.rows, case.heads, case.statistics, case.heads)
    return (*case.run(local, (*residuals, dout), specs, (case.heads,) * 3), None)


_attention.defvjp(_attention_forward, _attention_backward)


# ---------------------------------------------------------------- one device's part
def _forward(case, q, k, v, ids):
    out, lse = case.attend(q, k, v, ids, ids, causal=True)
    low, high = zip(*(_halves(x) for x in (out.astype(jnp.float32), _rows_first(lse))), strict=True)
    queries = _halves((q, ids))

    def step(state, keys, earlier):
        low, high = state
        keys_low, keys_high = _halves(keys)
        high = _merge(high, *_attend_all(case, queries[1], keys_low))
        mine = _choose(earlier, *queries)
        more, lse = _attend_all(case, mine, _choose(earlier, keys_low, keys_high))
        low = _merge(low, more, jnp.where(earlier, lse, EMPTY))
        high = _merge(high, more, jnp.where(earlier, EMPTY, lse))
        return (low, high), ()

    (low, high), _ = LOOPS[case.impl](case, (k, v, ids), (low, high), (), step)
    out, lse = (jnp.concatenate(pair, axis=1) for pair in zip(low, high, strict=True))
    return out.astype(q.dtype), _rows_first(lse)


def _backward(case, q, k, v, ids, out, lse, dout):
    dq, dk, dv = case.attend_backward(q, k, v, out, lse, dout, ids, ids, causal=True)
    queries = _halves((q, out, _rows_first(lse), dout, ids))

    def step(state, keys, earlier):
        low, high = state
        keys_low, keys_high = _halves(keys)
        first, dkeys_low = _gradients(case, queries[1], keys_low)
        mine = _choose(earlier, *queries)
        second, dkeys = _gradients(case, mine, _choose(earlier, keys_low, keys_high))
        low = low + jnp.where(earlier, second, 0.0)
        high = high + first + jnp.where(earlier, 0.0, second)
        dkeys_low = jax.tree.map(lambda a, b: a + jnp.where(earlier, b, 0.0), dkeys_low, dkeys)
        dkeys_high = jax.tree.map(lambda b: jnp.where(earlier, 0.0, b), dkeys)
        return (low, high), _whole(dkeys_low, dkeys_high)

    state, (dk, dv) = LOOPS[case.impl](case, (k, v, ids), _halves(dq), (dk, dv), step)
    return _whole(*state).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _attend_all(case, queries, keys):
    """Output and log-sum-exp [B, T, N] of queries that come after all of these keys."""
    (q, q_ids), (k, v, kv_ids) = queries, keys
    out, lse = case.attend(q, k, v, q_ids, kv_ids, causal=False)
    return out, _rows_first(lse)


def _gradients(case, queries, keys):
    (q, out, lse, dout, q_ids), (k, v, kv_ids) = queries, keys
    dq, *dkeys = case.attend_backward(
        q, k, v, out, _rows_first(lse), dout, q_ids, kv_ids, causal=False
    )
    return dq, tuple(dkeys)


def _merge(state, out: Float[Array, "B T N H"], lse: Float[Array, "B T N"]):
    """Attention over two sets of keys from that over each."""
    before, lse_before = state
    share = jax.nn.sigmoid(lse - lse_before)[..., None]
    return before + share * (out.astype(jnp.float32) - before), jnp.logaddexp(lse_before, lse)


def _halves(tree: Any) -> tuple[Any, Any]:
    """Arrays [B, T, ...] as those of the low chunk and those of the high one."""
    size = jax.tree.leaves(tree)[0].shape[1] // 2
    return jax.tree.map(lambda x: x[:, :size], tree), jax.tree.map(lambda x: x[:, size:], tree)


def _whole(low: Any, high: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), low, high)


def _choose(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _rows_first(lse: Array) -> Array:
    """[B, N, T] to [B, T, N] and back."""
    return lse.swapaxes(1, 2)


# ---------------------------------------------------------------- where the keys come from
Step = Callable[[Any, Any, Array], tuple[Any, Any]]


def _ring(case: _Case, keys: Any, state: Any, gradients: Any, step: Step) -> tuple[Any, Any]:
    """Runs `step` on the keys of every other device, each in its turn.

    Args:
      keys: this device's own.
      gradients: of its own keys so far.
      step: (state, keys, whether their device is an earlier one) -> (state, gradients of the keys).

    Returns the last state, and the gradients of this device's own keys summed over all devices.
    """
    ways = case.ways
    if ways == 1:
        return state, gradients
    index = jax.lax.axis_index(case.axis)
    hops = [(i, (i + 1) % ways) for i in range(ways)]

    def pass_on(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.ppermute(x, case.axis, hops), tree)

    def add(tree: Any, more: Any) -> Any:
        return jax.tree.map(jnp.add, tree, more)

    def hop(carry: Any, number: Any, last: bool = False) -> Any:
        keys, state, travelling = carry
        # `step` depends on neither of these two: they travel while it computes.
        ahead = None if last else pass_on(keys)
        travelling = pass_on(travelling)
        state, more = step(state, keys, number <= index)
        return ahead, state, more if travelling is None else add(travelling, more)

    # The first and the last hop stand outside the loop, as they have less to pass on.
    carry = hop((pass_on(keys), state, None), 1, last=ways == 2)
    if ways > 3:
        inner = jnp.arange(2, ways - 1)
        carry, _ = jax.lax.scan(lambda carry, number: (hop(carry, number), None), carry, inner)
    _, state, travelling = carry if ways == 2 else hop(carry, ways - 1, last=True)
    return state, add(gradients, pass_on(travelling))


def _all_gather(case: _Case, keys: Any, state: Any, gradients: Any, step: Step) -> tuple[Any, Any]:
    """As `_ring`, from one gathered copy of the keys."""
    ways = case.ways
    if ways == 1:
        return state, gradients
    index = jax.lax.axis_index(case.axis)
    everyones = jax.tree.map(lambda x: jax.lax.all_gather(x, case.axis), keys)
    total = jax.tree.map(lambda x: jnp.zeros((ways, *x.shape), x.dtype).at[index].set(x), gradients)

    def turn(carry: Any, hop: Array) -> tuple[Any, None]:
        state, total = carry
        device = (index - hop) % ways
        theirs = jax.tree.map(lambda x: x[device], everyones)
        state, more = step(state, theirs, hop <= index)
        return (state, jax.tree.map(lambda t, x: t.at[device].set(x), total, more)), None

    (state, total), _ = jax.lax.scan(turn, (state, total), jnp.arange(1, ways))
    return state, jax.tree.map(lambda x: jax.lax.psum_scatter(x, case.axis), total)


LOOPS: dict[str, Callable] = {"ring": _ring, "all_gather": _all_gather}


# ---------------------------------------------------------------- how the arrays lie
@dataclasses.dataclass(frozen=True)
class _Case:
    """Everything static about one call: mesh axes and kernel."""

    axis: str
    ways: int
    impl: str
    flash: bool
    interpret: bool
    on_mesh: bool
    batch_axes: tuple[str, ...] = ()
    head_axes: tuple[str, ...] = ()

    heads = property(lambda self: P(self.batch_axes, self._time, self.head_axes, None))
    statistics = property(lambda self: P(self.batch_axes, self.head_axes, self._time))
    rows = property(lambda self: P(self.batch_axes, self._time))
    _time = property(lambda self: self.axis if self.ways > 1 else None)

    @classmethod
    def of(cls, q: Array, k: Array, axis: str, impl: str, flash: bool, interpret: bool) -> _Case:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or not mesh.are_all_axes_explicit:
            return cls(axis, 1, impl, flash, interpret, False)
        spec = tuple(jax.typeof(q).sharding.spec)
        spec += (None,) * (4 - len(spec))
        batch, heads = ((e,) if isinstance(e, str) else tuple(e or ()) for e in spec[::2])
        ways = mesh.shape.get(axis, 1)
        if ways > 1 and q.shape[1] % (2 * ways):
            raise UserError(
                f"rows of {q.shape[1]} tokens do not divide into two chunks for each of {ways} "
                f"devices along the {axis} axis; use a multiple of {2 * ways}"
            )
        across = int(np.prod([mesh.shape[name] for name in heads]))
        if k.shape[2] % across:
            raise UserError(
                f"{k.shape[2]} kv heads do not divide over mesh axes {heads} of {across}, over "
                "which the query heads are cut; use a smaller size"
            )
        return cls(axis, ways, impl, flash, interpret, True, batch, heads)

    def move(self, x: Array, spec: P) -> Array:
        return jax.reshard(x, spec) if self.on_mesh else x

    def run(self, local: Callable, arguments: tuple, specs: tuple[P, ...], out: tuple[P, ...]):
        if not self.on_mesh:
            return local(*arguments)
        present = tuple(s if x is not None else None for x, s in zip(arguments, specs, strict=True))
        # Nothing is differentiated through it, so the checks for that are of no use.
        return jax.shard_map(local, in_specs=present, out_specs=out, check_vma=False)(*arguments)

    def attend(self, q, k, v, q_ids, kv_ids, *, causal):
        options = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids, "causal": causal}
        if self.flash:
            return flash_gqa.attend(q, k, v, interpret=self.interpret, **options)
        return partial_attention.attend(q, k, v, **options)

    def attend_backward(self, q, k, v, out, lse, dout, q_ids, kv_ids, *, causal):
        options = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids, "causal": causal}
        if self.flash:
            options["interpret"] = self.interpret
            return flash_gqa.attend_backward(q, k, v, out, lse, dout, **options)
        return partial_attention.attend_backward(q, k, v, out, lse, dout, **options)
