"""Linear head and softmax cross-entropy in one, without the logits of a whole batch.

The logits of 4 rows of 4096 tokens over 92,544 pieces are 6 GB in float32, and their gradient as
much again. Here a chunk of tokens at a time is multiplied with the head, reduced to its
statistics, and forgotten:

    loss(h, y) = log sum_v exp(h w_v) - h w_y + z_loss * (log sum_v exp(h w_v))^2

The gradient of a *sum* of losses is known up to one scalar as soon as the logits are, so
`linear_cross_entropy` forms dh and dW in the same pass over the chunks: three products of
2 B T D V operations, as many as the plain path takes, and none repeated (Liger Kernel, arXiv
2410.10989, section 3.2). `linear_logprobs` meets a gradient that differs from token to token and is
known only later, so it makes the logits again: four products.

On a mesh with explicit axes the arrays' types say how they lie and nothing else need be told.
Tokens may be cut over any axes (batch and context parallelism); the vocabulary over others (each
device then has some columns of a chunk's logits, and only per-token statistics are reduced, as in
Megatron's vocabulary-parallel loss); the head may rest cut along D over the axes of the tokens
(FSDP): it is gathered before the chunks, in the products' dtype, and its gradient is summed over
the chunks in float32 and scattered back. Where that gradient is large, the vocabulary goes in
parts, one after another, so that a device holds one part of the head and of its gradient. A token's
normaliser must then be known first, so the logits are made twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from internlm2_jax.errors import UserError
from internlm2_jax.kernels.attention import platform

# A chunk's float32 logits on one device take about this much: on a CPU what its cache holds, else
# what memory can spare. Fewer bytes mean more passes over the [D, V] float32 gradient of the head.
CHUNK_BYTES = {"cpu": 2**23, "other": 2**29}
# Of the float32 gradient of a part of a head that is gathered.
PART_BYTES = 2**29


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"] | Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
    parts: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`losses.language_model.cross_entropy` of `hidden @ weight`: (sum of losses, sum of weights).

    Products are in hidden's dtype with float32 sums, all else is float32. Differentiable with
    respect to `hidden`, `weight` and a float `loss_mask`.

    Args:
      z_loss: coefficient of the squared normaliser (PaLM, section 5).
      chunk: tokens per device and step; by default as many as keep a chunk's float32 logits
        within CHUNK_BYTES.
      parts: of the vocabulary; by default as many as keep the gradient of a gathered head within
        PART_BYTES, and one of a head that every device has whole.

    Errors: UserError when `chunk` or `parts` is not positive.
    """
    sums, weights = linear_cross_entropy_by_row(
        hidden, weight, targets, loss_mask, z_loss=z_loss, chunk=chunk, parts=parts
    )
    return sums[0], jnp.sum(weights)


def linear_cross_entropy_by_row(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"] | Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
    parts: int | None = None,
) -> tuple[tuple[Float[Array, ""], Float[Array, " B"]], Float[Array, " B"]]:
    """As `linear_cross_entropy`: ((sum of losses, sum of each row's losses), each row's weights).

    Only the sum of all is differentiable: the rows' are for looking at.
    """
    hidden, weight, (targets, weights), layout = _normal_form(
        hidden, weight, targets, loss_mask.astype(jnp.float32)
    )
    cuts = _cuts(layout, hidden, weight, chunk, parts)
    total, losses = _cross_entropy(layout, cuts, float(z_loss), hidden, weight, targets, weights)
    return (total, jnp.sum(losses, axis=1)), jnp.sum(weights, axis=1)


def linear_logprobs(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk: int | None = None,
    parts: int | None = None,
) -> Float[Array, "B T"]:
    """`losses.language_model.token_logprobs` of `hidden @ weight`, float32 nats.

    `hidden[b, t]` must already predict `targets[b, t]`. Differentiable with respect to `hidden`
    and `weight`; `chunk` and `parts` as in `linear_cross_entropy`.
    """
    hidden, weight, (targets,), layout = _normal_form(hidden, weight, targets)
    cuts = _cuts(layout, hidden, weight, chunk, parts)
    return _logprobs(layout, cuts, hidden, weight, targets)


# ---------------------------------------------------------------- cross-entropy
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross_entropy(layout, cuts, z_loss, hidden, weight, targets, weights):
    def local(hidden, weight, targets, weights):
        picked, normaliser = _statistics(layout, cuts, hidden, weight, targets)
        return _losses(picked, normaliser, weights, z_loss)

    losses = layout.run(local, (hidden, weight, targets, weights), (layout.rows,))
    return jnp.sum(losses * weights), losses * weights


def _cross_entropy_forward(layout, cuts, z_loss, hidden, weight, targets, weights):
    def at_once(hidden, weight, targets, weights):
        ((first, weight),) = layout.parts(weight, 1)
        weight = layout.gather(weight)

        def body(dweight, chunk):
            h, y, w = chunk
            logits = _logits(h, weight)
            picked, normaliser = layout.statistics(logits, y, first)
            losses = _losses(picked, normaliser, w, z_loss)
            scale = w * (1.0 + 2.0 * z_loss * normaliser)
            dlogits = _dlogits(logits, y, normaliser, scale, w, first).astype(h.dtype)
            dh, dw = _products(dlogits, h, weight)
            return dweight + dw, (losses, dh)

        zeros = jnp.zeros(weight.shape, jnp.float32)
        dweight, (losses, dhidden) = _scan(body, zeros, cuts.chunk, hidden, targets, weights)
        return losses, layout.sum_hidden(dhidden), layout.scatter(dweight.astype(weight.dtype))

    def in_parts(hidden, weight, targets, weights):
        picked, normaliser = _statistics(layout, cuts, hidden, weight, targets)
        scale = weights * (1.0 + 2.0 * z_loss * normaliser)
        gradients = _gradients(layout, cuts, hidden, weight, targets, normaliser, scale, weights)
        return _losses(picked, normaliser, weights, z_loss), *gradients

    specs = (layout.rows, layout.hidden, layout.weight)
    local = at_once if cuts.parts == 1 else in_parts
    losses, dhidden, dweight = layout.run(local, (hidden, weight, targets, weights), specs)
    return (jnp.sum(losses * weights), losses * weights), (losses, dhidden, dweight)


def _cross_entropy_backward(layout, cuts, z_loss, residuals, gradients):
    losses, dhidden, dweight = residuals
    g, _ = gradients  # no gradient goes through the losses of rows
    scaled = [(g * x.astype(jnp.float32)).astype(x.dtype) for x in (dhidden, dweight)]
    return (*scaled, None, g * losses)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _losses(picked: Array, normaliser: Array, weights: Array, z_loss: float) -> Array:
    """Token losses; zero, not a product with zero, where an infinite loss is masked out."""
    losses = normaliser - picked
    if z_loss:
        losses = losses + z_loss * jnp.square(normaliser)
    return jnp.where(weights != 0, losses, 0.0)


# ---------------------------------------------------------------- log-probabilities
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logprobs(layout, cuts, hidden, weight, targets):
    return _logprobs_forward(layout, cuts, hidden, weight, targets)[0]


def _logprobs_forward(layout, cuts, hidden, weight, targets):
    local = functools.partial(_statistics, layout, cuts)
    specs = (layout.rows, layout.rows)
    picked, normaliser = layout.run(local, (hidden, weight, targets), specs)
    return picked - normaliser, (hidden, weight, targets, normaliser)


def _logprobs_backward(layout, cuts, residuals, g):
    def local(hidden, weight, targets, normaliser, g):
        return _gradients(layout, cuts, hidden, weight, targets, normaliser, -g, -g)

    dhidden, dweight = layout.run(local, (*residuals, g), (layout.hidden, layout.weight))
    return dhidden, dweight, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


# ---------------------------------------------------------------- one device's part
@dataclasses.dataclass(frozen=True)
class _Cuts:
    """`chunk` tokens are taken at a time, the vocabulary in `parts`."""

    chunk: int
    parts: int


def _statistics(
    layout: _Layout, cuts: _Cuts, hidden: Array, weight: Array, targets: Array
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The target's logit and the log-sum-exp of each token."""
    picked: list[Array] = []
    normalisers: list[Array] = []
    for first, part in layout.parts(weight, cuts.parts):
        whole = layout.gather(_after(part, normalisers[-1:]))

        def body(_, chunk, whole=whole, first=first):
            h, y = chunk
            return None, layout.statistics(_logits(h, whole), y, first)

        found = _scan(body, None, cuts.chunk, hidden, targets)[1]
        picked.append(found[0])
        normalisers.append(found[1])
    if len(picked) == 1:
        return picked[0], normalisers[0]
    return functools.reduce(jnp.add, picked), jax.nn.logsumexp(jnp.stack(normalisers), axis=0)


def _gradients(
    layout: _Layout,
    cuts: _Cuts,
    hidden: Array,
    weight: Array,
    targets: Array,
    normaliser: Array,
    softmax: Float[Array, "B T"],
    target: Float[Array, "B T"],
) -> tuple[Array, Array]:
    """Those of hidden states and head, where dlogits = softmax * p - target * onehot."""
    dhidden: list[Array] = []
    dweights: list[Array] = []
    for first, part in layout.parts(weight, cuts.parts):
        part, zero = _after((part, jnp.float32(0)), dweights[-1:] or [normaliser])
        whole = layout.gather(part)

        def body(dweight, chunk, whole=whole, first=first):
            h, y, n, s, t = chunk
            dlogits = _dlogits(_logits(h, whole), y, n, s, t, first).astype(h.dtype)
            dh, dw = _products(dlogits, h, whole)
            return dweight + dw, dh

        zeros = jnp.broadcast_to(zero, whole.shape)
        arrays = (hidden, targets, normaliser, softmax, target)
        dweight, dh = _scan(body, zeros, cuts.chunk, *arrays)
        dhidden.append(dh)
        dweights.append(layout.scatter(dweight.astype(weight.dtype)))
    if len(dhidden) == 1:
        return layout.sum_hidden(dhidden[0]), dweights[0]
    total = functools.reduce(jnp.add, [dh.astype(jnp.float32) for dh in dhidden])
    return layout.sum_hidden(total.astype(hidden.dtype)), jnp.concatenate(dweights, axis=1)


def _after(value: Any, done: list[Array]) -> Any:
    """`value`, not before `done` is there: else all parts would be made, and held, at once."""
    return jax.lax.optimization_barrier((value, done))[0] if done else value


def _logits(h: Float[Array, "C D"], weight: Float[Array, "D V"]) -> Float[Array, "C V"]:
    return jax.lax.dot(h, weight, preferred_element_type=jnp.float32)


def _is_target(logits: Float[Array, "C V"], targets: Int[Array, " C"], first: Any) -> Array:
    return jnp.arange(logits.shape[1], dtype=targets.dtype) + first == targets[:, None]


def _dlogits(
    logits: Array, targets: Array, normaliser: Array, softmax: Array, target: Array, first: Any
) -> Float[Array, "C V"]:
    """softmax * p - target * onehot, `softmax` and `target` being factors per token."""
    p = jnp.exp(logits - normaliser[:, None])
    is_target = _is_target(logits, targets, first)
    gradient = softmax[:, None] * p - jnp.where(is_target, target[:, None], 0.0)
    return jnp.where(target[:, None] != 0, gradient, 0.0)


def _products(
    dlogits: Float[Array, "C V"], h: Float[Array, "C D"], weight: Float[Array, "D V"]
) -> tuple[Float[Array, "C D"], Float[Array, "D V"]]:
    """Gradients of a chunk's hidden states, and of the head in float32."""
    dh = jax.lax.dot_general(dlogits, weight, (((1,), (1,)), ((), ())))
    dw = jax.lax.dot_general(
        h, dlogits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return dh, dw


def _scan(body: Callable, carry: Any, size: int, *arrays: Array) -> Any:
    """`jax.lax.scan` over chunks of `size` tokens of arrays [B, T, ...], results likewise.

    The last chunk is filled with zeros: weight 0, gradient 0.
    """
    batch, length = arrays[0].shape[:2]
    tokens = batch * length
    steps = -(-tokens // size)

    def cut(x: Array) -> Array:
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, ((0, steps * size - tokens), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(steps, size, *x.shape[1:])

    def join(x: Array) -> Array:
        x = x.reshape(steps * size, *x.shape[2:])[:tokens]
        return x.reshape(batch, length, *x.shape[1:])

    carry, results = jax.lax.scan(body, carry, tuple(map(cut, arrays)))
    return carry, jax.tree.map(join, results)


# ---------------------------------------------------------------- how the arrays lie
@dataclasses.dataclass(frozen=True)
class _Layout:
    """Mesh axes of each array axis, and the collectives that follow from them."""

    batch: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()  # of the head at rest; all of them cut tokens as well
    vocab: tuple[str, ...] = ()  # none of them cuts tokens
    on_mesh: bool = False

    rows = property(lambda self: P(self.batch, self.time))
    hidden = property(lambda self: P(self.batch, self.time, None))
    weight = property(lambda self: P(self.embed, self.vocab))

    def run(self, local: Callable, arguments: tuple[Array, ...], out: tuple[P, ...]) -> Any:
        """`local` on every device's part of hidden, weight and arrays of tokens."""
        if not self.on_mesh:
            return local(*arguments)
        specs = (self.hidden, self.weight, *(self.rows,) * (len(arguments) - 2))
        # Nothing is differentiated through it, so the checks for that are of no use.
        mapped = jax.shard_map(
            local, in_specs=specs, out_specs=out if len(out) > 1 else out[0], check_vma=False
        )
        return mapped(*arguments)

    def gather(self, weight: Array) -> Array:
        if not self.embed:
            return weight
        return jax.lax.all_gather(weight, self.embed, axis=0, tiled=True)

    def scatter(self, dweight: Array) -> Array:
        """Sums over the devices' tokens; each keeps the rows of the head that rest with it."""
        if self.embed:
            dweight = jax.lax.psum_scatter(dweight, self.embed, scatter_dimension=0, tiled=True)
        others = tuple(axis for axis in (*self.batch, *self.time) if axis not in self.embed)
        return jax.lax.psum(dweight, others) if others else dweight

    def sum_hidden(self, dhidden: Array) -> Array:
        return jax.lax.psum(dhidden, self.vocab) if self.vocab else dhidden

    def parts(self, weight: Float[Array, "D V"], count: int) -> list[tuple[Any, Array]]:
        """(piece of its first column, columns) of each part: whole tiles of 128 where it can be."""
        columns = weight.shape[1]
        own = jax.lax.axis_index(self.vocab) * columns if self.vocab else 0
        size = -(-columns // count)
        size = -(-size // 128) * 128 if count > 1 and size > 128 else size
        return [(own + at, weight[:, at : at + size]) for at in range(0, columns, size)]

    def statistics(
        self, logits: Float[Array, "C V"], targets: Int[Array, " C"], first: Any
    ) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """The target's logit, 0 where it is not among these, and the log-sum-exp of each token.

        `first`: the piece that the first of this device's columns stands for.
        """
        peak = jnp.max(logits, axis=1)
        peak = jax.lax.pmax(peak, self.vocab) if self.vocab else peak
        peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
        sums = jnp.stack(
            [
                jnp.sum(jnp.exp(logits - peak[:, None]), axis=1),
                jnp.sum(jnp.where(_is_target(logits, targets, first), logits, 0.0), axis=1),
            ]
        )
        total, picked = jax.lax.psum(sums, self.vocab) if self.vocab else sums
        return picked, jnp.log(total) + peak


def _normal_form(hidden: Array, weight: Array, *rows: Array) -> tuple:
    """The arrays moved (if need be) to a layout the kernel knows, and that layout."""
    weight = weight.astype(hidden.dtype)  # before it is gathered
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_explicit:
        return hidden, weight, rows, _Layout()
    batch, time, _ = _mesh_axes(hidden)
    embed, vocab = _mesh_axes(weight)
    vocab = tuple(axis for axis in vocab if axis not in batch)
    # Sequence parallelism cuts rows over the axis of the vocabulary as well; rows give way, since a
    # device's hidden states are smaller than the head.
    time = tuple(axis for axis in time if axis not in vocab)
    embed = tuple(axis for axis in embed if axis in batch + time)
    layout = _Layout(batch, time, embed, vocab, on_mesh=True)
    return (
        jax.reshard(hidden, layout.hidden),
        jax.reshard(weight, layout.weight),
        tuple(jax.reshard(x, layout.rows) for x in rows),
        layout,
    )


def _mesh_axes(x: Array) -> tuple[tuple[str, ...], ...]:
    entries = tuple(jax.typeof(x).sharding.spec)
    entries += (None,) * (x.ndim - len(entries))
    return tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)


def _cuts(
    layout: _Layout, hidden: Array, weight: Array, chunk: int | None, parts: int | None
) -> _Cuts:
    """Chunks are evened out, so that the last is nearly full."""
    for name, given in (("chunk", chunk), ("parts", parts)):
        if given is not None and given < 1:
            raise UserError(f"linear_cross_entropy: {name} is {given}; it must be 1 or more")
    ways = functools.partial(_ways, jax.sharding.get_abstract_mesh())
    tokens = hidden.shape[0] * hidden.shape[1] // ways(layout.batch + layout.time)
    dim, columns = weight.shape[0], weight.shape[1] // ways(layout.vocab)
    if parts is None:
        parts = -(-4 * dim * columns // PART_BYTES) if layout.embed else 1
    if chunk is None:
        budget = CHUNK_BYTES.get(platform(hidden), CHUNK_BYTES["other"])
        fits = budget // (4 * columns // parts)
        chunk = 2 ** int(math.log2(max(fits, 1)))
    steps = -(-tokens // chunk)
    return _Cuts(max(-(-tokens // max(steps, 1)), 1), parts)


def _ways(mesh: Any, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
