"""`build(cfg, head)`: a model as functions of a plain nested dict of parameters.

    model = build(preset("demo"))
    params = model.init(jax.random.key(0))
    logits = model.logits(params, tokens)

The flax graph is split once; everything a training loop, an optimizer or a checkpoint sees is

    {"embed": ..., "layers": {every leaf with a leading layer axis}, "norm": ..., "head": ...}

and, with multi-token prediction, "mtp": {every leaf with a leading layer axis}. The trunk is all
but "head", so a critic or a reward model is an actor's trunk with another head.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from internlm2_jax.errors import UserError
from internlm2_jax.models.config import Head, ModelConfig
from internlm2_jax.models.decoder import Block, Cache, Decoder
from internlm2_jax.models.remat import Remat

Params = dict[str, Any]
STACKED = ("layers", "mtp")  # parts of the parameters whose leaves have a leading layer axis


@dataclasses.dataclass(frozen=True)
class Model:
    """Functions of (params, tokens). Equal configurations make equal, hashable models.

    Common arguments:
      tokens: [B, T] int32.
      positions: [B, T] int32, default 0..T-1; they restart at every packed document.
      segment_ids: [B, T] int32. Attention is causal within equal ids; 0 is padding.
      rope_length: [B] int32, how many tokens each row is rotated for, where RoPE depends on it.
        By default its own length, the largest position plus one; see rope.py.
    """

    cfg: ModelConfig
    head: Head = "lm"
    attention: str = "auto"

    @functools.cached_property
    def _split(self) -> tuple[Any, Any]:
        make = functools.partial(Decoder, self.cfg, self.head)
        return nnx.split(nnx.eval_shape(make, jax.random.key(0)))

    @functools.cached_property
    def _block(self) -> Any:
        make = functools.partial(Block, self.cfg)
        return nnx.split(nnx.eval_shape(make, jax.random.key(0), jnp.int32(0)))[0]

    @functools.cached_property
    def abstract(self) -> Params:
        """ShapeDtypeStruct of every parameter."""
        return nnx.to_pure_dict(self._split[1])

    @functools.cached_property
    def axes(self) -> Params:
        """Tuple of logical axis names of every parameter; stacked leaves begin with "layer"."""
        names = {path: leaf.get_metadata()["logical_axes"] for path, leaf in self._leaves()}
        stacked = {
            path: ("layer", *axes) if path[0] in STACKED else axes for path, axes in names.items()
        }
        return nnx.traversals.unflatten_mapping(stacked)

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters."""
        return _init(self, key)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        rope_length: Int[Array, " B"] | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm. `remat`: see remat.py."""
        return self._merge(params).hidden(
            tokens, positions, segment_ids, rope_length, remat=remat, impl=self.attention
        )

    def mtp_hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        hidden: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        rope_length: Int[Array, " B"] | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "M B T D"]:
        """Hidden states of the M multi-token-prediction layers, for `unembed`.

        Entry [k - 1, b, t] predicts tokens[b, t + k + 1] from tokens[b, : t + k + 1]. Where that
        lies past the row or in another segment it means nothing: leave it out of the loss.

        Args:
          hidden: what `hidden` returned for the same rows.

        Source: MiMo (arXiv 2505.07608), as vLLM and SGLang run its checkpoints: the trunk's state
        after the final norm, and each layer's after its own, goes on to the next.
        """
        if not self.cfg.num_mtp_layers:
            raise UserError("this model has no multi-token-prediction layer; set num_mtp_layers")
        return self._merge(params).predict(
            tokens, hidden, positions, segment_ids, rope_length, remat=remat, impl=self.attention
        )

    def unembed(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, float32, of hidden states."""
        self._require("lm")
        return self._merge(params).logits(hidden)

    def logit_factors(
        self, params: Params, hidden: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """The two arrays whose product `unembed` is, for losses that never hold all of it.

        The first arguments of `kernels.cross_entropy.linear_cross_entropy` and `linear_logprobs`.
        """
        self._require("lm")
        return self._merge(params).logit_factors(hidden)

    def logits(
        self, params: Params, tokens: Int[Array, "B T"], **rows: Any
    ) -> Float[Array, "B T V"]:
        """Next-token logits, float32; `rows` are the keyword arguments of `hidden`."""
        return self.unembed(params, self.hidden(params, tokens, **rows))

    def score(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Scores, float32, of hidden states."""
        self._require("scalar")
        return self._merge(params).scores(hidden)

    def scores(self, params: Params, tokens: Int[Array, "B T"], **rows: Any) -> Float[Array, "B T"]:
        """One float32 score per position; `rows` are the keyword arguments of `hidden`."""
        return self.score(params, self.hidden(params, tokens, **rows))

    def extend(
        self, params: Params, tokens: Int[Array, "B T"], cache: Cache, counts: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """As `decode`, but hidden states: a long prompt needs the logits of one position only.

        Takes the parameters of `unstacked` too.
        """
        if not isinstance(params["layers"], tuple):
            return self._merge(params).extend(tokens, cache, counts)
        blocks = [nnx.merge(self._block, layer) for layer in params["layers"]]
        return self._merge(params).extend(tokens, cache, counts, blocks)

    def decode(
        self, params: Params, tokens: Int[Array, "B T"], cache: Cache, counts: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Logits of new tokens after those in `cache`; prefill and single steps alike.

        Args:
          counts: [B] int32, how many of the T tokens of each row are new; the rest is padding,
            which is not kept and whose results mean nothing.
        """
        hidden, cache = self.extend(params, tokens, cache, counts)
        return self.unembed(params, hidden), cache

    def _merge(self, params: Params) -> Decoder:
        if isinstance(params["layers"], tuple):
            params = {**params, "layers": self.abstract["layers"]}  # nobody will look at them
        return nnx.merge(self._split[0], params)

    def _leaves(self) -> list[tuple[Any, Any]]:
        return [(path, leaf) for path, leaf in nnx.to_flat_state(self._split[1])]

    def _require(self, head: Head) -> None:
        if self.head != head:
            raise UserError(
                f"this model has a {self.head!r} head; build(cfg, head={head!r}) is needed"
            )


@functools.cache
def build(cfg: ModelConfig, head: Head = "lm", attention: str = "auto") -> Model:
    """The model of `cfg` with a language-model or a scalar head.

    Args:
      attention: implementation of the attention kernel (kernels/attention.py).
    """
    if head not in ("lm", "scalar"):
        raise UserError(f"no head {head!r}; there are lm, scalar")
    return Model(cfg, head, attention)


def swap_head(params: Params, new_head: Params) -> Params:
    """The same trunk (shared arrays) with another head: params["head"] of a model of its kind."""
    return {**{name: part for name, part in params.items() if name != "head"}, "head": new_head}


@jax.jit
def unstacked(params: Params) -> Params:
    """The same weights with "layers" a tuple of one tree a layer, for `unembed` and `extend`.

    A scan cuts every layer's weights out of the stack each time it comes by. A TPU does that while
    it computes; on a CPU a step over few tokens, which is bound by reading weights, takes twice as
    long for it.
    """
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count))
    return {**params, "layers": layers}


def head_of(params: Params) -> Head:
    """Which head these parameters end in."""
    head = params.get("head")
    return "scalar" if head and jnp.shape(head["weight"])[-1] == 1 else "lm"


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Model, key: Array) -> Params:
    return nnx.to_pure_dict(nnx.split(Decoder(model.cfg, model.head, key))[1])
