"""The InternLM2 decoder: embedding, L equal blocks, final norm, head.

Blocks are stacked along a leading layer axis and applied with `jax.lax.scan`, so that compile time
does not grow with depth. Each block is

    x += Wo attention(norm(x));    x += W2 (silu(W1 h) * W3 h),  h = norm(x)

Optional layers after the trunk predict further ahead (multi-token prediction, as MiMo has it):
layer k = 1, 2, ... joins the hidden state of position t with the token k places ahead and runs one
block more,

    h_k[t] = norm(block(W [norm(h_{k-1}[t]), norm(embed(x[t + k]))])),    h_0 the trunk's output,

from which the same head predicts x[t + k + 1].

The KV cache is an argument and a result: nothing here has state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from internlm2_jax import sharding
from internlm2_jax.errors import UserError
from internlm2_jax.models import heads, rope, stack
from internlm2_jax.models.attention import Attention, Pages, Rotation
from internlm2_jax.models.config import AttentionKind, Head, ModelConfig
from internlm2_jax.models.layers import MLP, Embedding, Linear, RMSNorm, depth_std
from internlm2_jax.models.remat import Remat, repeats_mlp
from internlm2_jax.models.remat import remat as rematerialise
from internlm2_jax.zigzag import zigzag

# A device's tokens in the MLP at a time (the weights then move in a seventh of a v5e's time), where
# it has more than so many: a loop over parts hides no gather of a weight.
PART_OF_MLP, WHOLE_MLP = 2048, 8192


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """Keys and values of the tokens already seen, in pages that rows own through `table`.

    pages: keys and values, [L, P, K, page, H]; of int8 also their scales [L, P, K, page] (float32).
    table: the pages of each row in order. On a mesh that cuts the batch, the P pages are cut with
      it and a row's table counts from the first page of its own part.
    used: how many tokens each row holds.
    rope_length: how many tokens each row is rotated for (rope.py).
    """

    pages: Pages
    table: Int[Array, "B n"]
    used: Int[Array, " B"]
    rope_length: Int[Array, " B"]


class Block(nnx.Module):
    """One layer."""

    def __init__(self, cfg: ModelConfig, key: Array, layer: Int[Array, ""]) -> None:
        attention, mlp = jax.random.split(key)
        std = cfg.initializer_range
        out_std = depth_std(std, layer) if cfg.residual_init == "depth" else std
        self.attention_norm = RMSNorm(cfg.embed_dim, cfg.norm_eps)
        self.attention = Attention(cfg, attention, out_std)
        self.mlp_norm = RMSNorm(cfg.embed_dim, cfg.norm_eps)
        self.mlp = MLP(cfg, mlp, out_std)
        self.scale = cfg.residual_scale

    def __call__(
        self,
        x: Array,
        rotation: Rotation,
        segment_ids: Array | None,
        impl: str,
        window: int | None = None,
        frugal: bool = False,
    ) -> Float[Array, "B T D"]:
        x = self.add(x, self.attention(self.attention_norm(x), rotation, segment_ids, impl, window))
        return self.feed_forward(x, frugal)

    def feed_forward(self, x: Float[Array, "B T D"], frugal: bool = False) -> Array:
        """x + mlp(norm(x)).

        The backward pass has six arrays of the MLP's width alive, more than of anything else.
        `frugal` takes a device's tokens in parts, each computed again for its gradient, so that the
        six are of one part. Gradients of the weights are then summed over the parts in the dtype
        of the products.
        """
        weights = self.mlp.in_use(x.dtype)

        def apply(x: Array) -> Array:
            return self.add(x, self.mlp(self.mlp_norm(x), weights))

        if not frugal:
            return apply(x)
        x = sharding.in_parts(apply, x, PART_OF_MLP, WHOLE_MLP)
        return sharding.constrain(x, "batch", "residual_length", None)

    def add(self, x: Float[Array, "B T D"], branch: Float[Array, "B T D"]) -> Array:
        return x + (branch if self.scale == 1.0 else branch * self.scale)


class PredictionLayer(nnx.Module):
    """One layer of multi-token prediction."""

    def __init__(self, cfg: ModelConfig, key: Array, layer: Int[Array, ""]) -> None:
        project, block = jax.random.split(key)
        d = cfg.embed_dim
        self.hidden_norm = RMSNorm(d, cfg.norm_eps)
        self.token_norm = RMSNorm(d, cfg.norm_eps)
        axes = (None, "embed")
        self.project = Linear(project, (2 * d, d), axes, std=cfg.initializer_range)
        self.block = Block(cfg, block, layer)
        self.norm = RMSNorm(d, cfg.norm_eps)

    def __call__(
        self, hidden: Array, ahead: Array, rotation: Rotation, segment_ids: Array | None, impl: str
    ) -> Float[Array, "B T D"]:
        joined = jnp.concatenate([self.hidden_norm(hidden), self.token_norm(ahead)], axis=-1)
        return self.norm(self.block(self.project(joined), rotation, segment_ids, impl))


class Decoder(nnx.Module):
    """The whole model. `head` is "lm" (logits) or "scalar" (one score per position)."""

    def __init__(self, cfg: ModelConfig, head: Head, key: Array) -> None:
        embed, layers, out = jax.random.split(key, 3)
        ahead = jax.random.fold_in(key, 3)
        self.cfg = cfg
        self.embed = Embedding(embed, cfg.vocab_size, cfg.embed_dim, cfg.initializer_range)
        self.layers = nnx.vmap(partial(Block, cfg))(
            jax.random.split(layers, cfg.num_layers), jnp.arange(cfg.num_layers)
        )
        self.norm = RMSNorm(cfg.embed_dim, cfg.norm_eps)
        if cfg.num_mtp_layers:
            depths = jnp.arange(cfg.num_mtp_layers)
            self.mtp = nnx.vmap(partial(PredictionLayer, cfg))(
                jax.random.split(ahead, cfg.num_mtp_layers), cfg.num_layers + depths
            )
        if head == "scalar":
            self.head = heads.scalar(cfg, out)
        elif not cfg.tie_embeddings:
            self.head = heads.lm(cfg, out)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        rope_length: Int[Array, " B"] | None,
        *,
        remat: Remat,
        impl: str,
    ) -> Float[Array, "B T D"]:
        """Final-norm hidden states of whole rows; see `build.Model.hidden`."""
        rotation = self._rotation(tokens, positions, rope_length)

        def body(kind: AttentionKind, x: Array, block: Block) -> Array:
            x = checkpoint_name(x, "block_input")
            window = self.cfg.window(kind)
            return block(x, rotation, segment_ids, impl, window, repeats_mlp(remat))

        steps = [rematerialise(partial(body, kind), remat) for kind in self.cfg.attention_pattern]
        return self.norm(stack.apply(steps, self.embedded(tokens), self.layers))

    def predict(
        self,
        tokens: Int[Array, "B T"],
        hidden: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        rope_length: Int[Array, " B"] | None,
        *,
        remat: Remat,
        impl: str,
    ) -> Float[Array, "M B T D"]:
        """Hidden states of the M prediction layers; see `build.Model.mtp_hidden`."""
        rotation = self._rotation(tokens, positions, rope_length)

        def body(carry: tuple[Array, Array], layer: PredictionLayer) -> tuple[Any, Array]:
            hidden, tokens = carry
            hidden = checkpoint_name(hidden, "block_input")
            tokens = _next(tokens)
            hidden = layer(hidden, self.embedded(tokens), rotation, segment_ids, impl)
            return (hidden, tokens), hidden

        tokens = sharding.constrain(tokens, "batch", None)  # `_next` goes along the row
        return jax.lax.scan(rematerialise(body, remat), (hidden, tokens), self.mtp)[1]

    def embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = self.embed(tokens, jnp.dtype(self.cfg.dtype))
        return x if self.cfg.mup is None else x * self.cfg.mup.scale_emb

    def _rotation(
        self, tokens: Array, positions: Array | None, rope_length: Array | None
    ) -> Rotation:
        if positions is None:
            if (ways := sharding.size_of("context")) > 1:
                raise UserError(
                    f"with context={ways} rows come in zig-zag order and bring their positions: "
                    "use sharding.place_rows, or a layout without context"
                )
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if rope_length is None:
            rope_length = rope.lengths_of(positions)
        return rope.tables(self.cfg, positions, rope_length)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        counts: Int[Array, " B"],
        blocks: Sequence[Block] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final-norm hidden states of new tokens and the cache with them in it.

        Args:
          blocks: the layers one by one, in place of the stack.
        """
        cfg = self.cfg
        used, counts = (sharding.constrain(x, "batch") for x in (cache.used, counts))
        table = sharding.constrain(cache.table, "batch", None)
        positions = used[:, None] + jnp.arange(tokens.shape[1])
        rotation = rope.tables(cfg, positions, cache.rope_length)

        def body(window: int | None, carry: tuple[Array, Pages], xs: tuple[Block, Array]):
            (x, pages), (block, layer) = carry, xs
            y, pages = block.attention.step(
                block.attention_norm(x), rotation, pages, layer, table, used, counts, window
            )
            return block.feed_forward(block.add(x, y)), pages

        steps = [partial(body, cfg.window(kind)) for kind in cfg.attention_pattern]
        carry = (self.embedded(tokens), cache.pages)
        if blocks is None:
            x, pages = stack.apply(steps, carry, (self.layers, jnp.arange(cfg.num_layers)))
        else:
            for i, block in enumerate(blocks):
                carry = steps[i % len(steps)](carry, (block, jnp.int32(i)))
            x, pages = carry
        hidden = sharding.constrain(self.norm(x), "batch", None, None)
        return hidden, Cache(pages, table, used + counts, cache.rope_length)

    def logit_factors(
        self, hidden: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """The two arrays whose product `logits` is."""
        hidden = self._scaled(hidden)
        if self.cfg.tie_embeddings:
            return hidden, self.embed.weight[...].T
        return hidden, self.head.weight[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        hidden = self._scaled(hidden)
        if self.cfg.tie_embeddings:
            return self.embed.attend(hidden)
        return heads.logits(self.head, hidden)

    def _scaled(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return hidden if self.cfg.logit_scale == 1.0 else hidden * self.cfg.logit_scale

    def scores(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        return heads.scores(self.head, hidden)


def _next(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The token after each one, 0 after a row's last, in the order that rows have on the mesh."""
    length, ways = tokens.shape[1], sharding.size_of("context")
    if ways == 1:
        return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    order = zigzag(np.arange(length)[None], ways)[0]  # position that lies at each place
    after = np.argsort(order)[np.minimum(order + 1, length - 1)]
    found = tokens.at[:, after].get(out_sharding=jax.typeof(tokens).sharding)
    return jnp.where(order + 1 < length, found, 0)
