"""Models of this project as a worker holds them: a folder in, plain numbers out.

The one module of `data_beam` that imports jax; `handlers` imports it inside a worker, when a model
is loaded. Methods take and give plain values, because a model shared between processes is called
through a proxy that pickles them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data_beam.scoring import perplexity
from data_beam.scoring.curves import Calibration
from data_beam.scoring.fasttext_model import summary
from data_beam.scoring.windows import Buckets, windows
from internlm2_jax import files
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.losses.classification import pooled_logits
from internlm2_jax.losses.language_model import token_logprobs

_LOGITS_AT_ONCE = 256  # positions whose vocabulary-sized rows are in memory together, per text


class TextClassifier:
    """The decoder classifier that stage `classifier` left in a folder.

    `compilations` counts the programs that were traced: at most one per bucket.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        tokens_per_batch: int = 8192,
        max_windows: int = 64,
        buckets: Sequence[int] | None = None,
    ):
        from internlm2_jax.train.checkpoint import load_model

        folder = Path(folder)
        described = files.read_json(folder / "classifier.json")
        self._vocabulary = Tokenizer.load(folder / "tokenizer.model")
        if described["tokenizer_sha256"] != self._vocabulary.sha256:
            raise UserError(f"{folder}/tokenizer.model is not the one that was trained with")
        self._model, params = load_model(folder)
        self._params = jax.device_put(params)
        longest = described["row_length"]
        self._buckets = (
            Buckets.up_to(longest, tokens_per_batch)
            if buckets is None
            else Buckets(tuple(buckets), tokens_per_batch)
        )
        if self._buckets.lengths[-1] > longest:
            raise UserError(
                f"a bucket of {self._buckets.lengths[-1]} tokens is longer than the {longest} that "
                f"{folder} was trained with"
            )
        self._most = max_windows
        self._calibration = Calibration(**described["calibration"])
        self.compilations = 0

        def logits(params, tokens, lengths):
            self.compilations += 1
            return pooled_logits(self._model, params, tokens, lengths, described["pooling"])

        self._logits = jax.jit(logits)

    def score(self, texts: Sequence[str]) -> list[dict[str, float | int]]:
        """{"score": mean, "max_score", "windows"} over the windows of each text."""
        rows: list[list[int]] = []
        ends = []
        size = self._buckets.lengths[-1] - 1
        for text in texts:
            found = windows(text, self._vocabulary.encode_batch, size, self._most)
            rows += [[self._vocabulary.bos_id, *ids] for ids in found]
            ends.append(len(rows))
        logits = np.zeros(len(rows))
        for chosen, tokens, lengths in self._buckets.batches(rows, self._vocabulary.pad_id):
            logits[chosen] = np.asarray(self._logits(self._params, tokens, lengths))[: len(chosen)]
        _require_finite(logits)
        probabilities = self._calibration.probability(logits)
        return [summary(probabilities[s:e]) for s, e in zip([0, *ends], ends, strict=False)]


class SpanModel:
    """A causal language model that scores spans with and without another span before them.

    `folder` is a stage of a run (pretrain, sft, ...) or a Hugging Face InternLM2 folder; the
    tokenizer is the folder's own, or the run's.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        protocol: perplexity.Protocol,
        *,
        tokens_per_batch: int = 8192,
    ):
        import internlm2_jax

        opened = internlm2_jax.open(folder)
        if opened.tokenizer is None:
            raise UserError(f"{folder} has no tokenizer.model; put the model's own there")
        self._model, self._vocabulary = opened.model, opened.tokenizer
        self._protocol = protocol
        longest = 1 + protocol.context + protocol.target
        limit = opened.cfg.length_limit
        if limit is not None and longest > limit:
            raise UserError(
                f"{folder} reads {limit} tokens, the protocol needs {longest}; lower its context "
                "or target"
            )
        if self._model.head != "lm":
            raise UserError(f"{folder} holds a reward model; give a language model")
        self._params = jax.device_put(opened.params)
        self._tokens_per_batch = tokens_per_batch
        self.compilations = 0

        def loss(params, tokens, first, count):
            self.compilations += 1
            return _span_loss(self._model, params, tokens, first, count, protocol.target)

        self._loss = jax.jit(loss)

    def score(self, examples: Sequence[tuple[str, str]]) -> list[dict[str, float | int]]:
        """{"ppl_alone", "ppl_given", "gain", "pairs"} of each (document id, text).

        The first three are NaN for a document too short for the protocol. `gain` is
        log(ppl_alone / ppl_given), nats per token, over all pairs of the document.
        """
        pairs: list[perplexity.Pair] = []
        ends = []
        for identity, text in examples:
            encode = self._vocabulary.encode
            pairs += perplexity.pairs(
                identity, text, encode, self._vocabulary.decode, self._protocol
            )
            ends.append(len(pairs))
        bos = self._vocabulary.bos_id
        given = self._losses([([bos, *p.context], p.target) for p in pairs], self._protocol.context)
        alone = self._losses(
            [([bos, *p.short], p.target) for p in pairs], self._protocol.alone_context
        )
        sizes = np.array([len(p.target) for p in pairs], np.float64)
        results = []
        for start, end in zip([0, *ends], ends, strict=False):
            tokens = math.fsum(sizes[start:end])
            if not tokens:
                empty = {"ppl_alone": math.nan, "ppl_given": math.nan, "gain": math.nan, "pairs": 0}
                results.append(empty)
                continue
            means = [math.fsum(losses[start:end]) / tokens for losses in (alone, given)]
            results.append(
                {
                    "ppl_alone": math.exp(min(means[0], 700.0)),
                    "ppl_given": math.exp(min(means[1], 700.0)),
                    "gain": means[0] - means[1],
                    "pairs": end - start,
                }
            )
        return results

    def _losses(self, rows: list[tuple[list[int], list[int]]], context: int) -> np.ndarray:
        """Summed loss, nats, of each target after its context; all rows of one shape."""
        length = 1 + context + self._protocol.target
        size = max(1, self._tokens_per_batch // length)
        losses = np.zeros(len(rows))
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            tokens = np.full((size, length), self._vocabulary.pad_id, np.int32)
            first, count = np.ones(size, np.int32), np.zeros(size, np.int32)
            for at, (before, target) in enumerate(chosen):
                ids = [*before, *target]
                tokens[at, : len(ids)] = ids
                first[at], count[at] = len(before), len(target)
            found = np.asarray(self._loss(self._params, tokens, first, count))
            losses[start : start + size] = found[: len(chosen)]
        _require_finite(losses)
        return losses


def _require_finite(values: np.ndarray) -> None:
    """A NaN would become a null that no one counts."""
    if not np.isfinite(values).all():
        raise ValueError("the model gave a number that is not finite")


def _span_loss(model, params, tokens, first, count, target):
    """[B] float32: sum of -log p of the `count` tokens from place `first` on, given what precedes.

    The logits are formed some positions at a time: at 92,544 pieces a row of 1,024 positions would
    be 380 MB.
    """
    hidden = model.hidden(params, tokens, rope_length=first + count)
    block = min(_LOGITS_AT_ONCE, target)
    blocks = -(-target // block)
    step = jnp.arange(blocks * block)
    at = jnp.minimum(first[:, None] + step, tokens.shape[1] - 1)  # of the predicted tokens
    inside = step < count[:, None]
    targets = jnp.take_along_axis(tokens, at, axis=1)
    states = jnp.take_along_axis(hidden, at[:, :, None] - 1, axis=1)

    def some(xs):
        states, targets, inside = xs
        logprobs = token_logprobs(model.unembed(params, states), targets)
        return -jnp.sum(jnp.where(inside, logprobs, 0.0), axis=1)

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, block, *x.shape[2:]), 1, 0)

    return jnp.sum(jax.lax.map(some, (split(states), split(targets), split(inside))), axis=0)
