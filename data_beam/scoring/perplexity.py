"""The long-context filter of InternLM2 (section 3.1.3): does what comes before help to predict?

A pair (S1, S2) of spans of one document is scored by a causal language model twice: ppl(S2 | S1)
with S1 before it, ppl(S2) without. In a coherent long document S1 helps; in a list, a log, or
several texts glued together it does not, and may mislead. The report drops a document whose
difference has the wrong sign, with thresholds per domain and language; only the difference is used,
so that a document is not judged by how hard it is. LongWanjuan's concrete protocol (its published
code): chunks of 4096 tokens, the last 1024 scored with 3072 and with 1024 tokens before them.

`gain` here is log ppl(S2) - log ppl(S2 | S1), nats per token: positive when S1 helps, and on a
scale that does not grow with the perplexity itself.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import pyarrow as pa

from data_beam.schema import Document, hash63
from internlm2_jax.errors import UserError

if TYPE_CHECKING:
    from data_beam.scoring.handlers import ScoreHandler
    from data_beam.scoring.score import Candidates

Placement = Literal["adjacent", "apart"]

_CHARACTERS_PER_TOKEN = 4
_SLACK = 8  # tokens near the cut of a slice may differ from those of the whole text
_BREAK = 64  # characters within which a span's start looks for white space


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How pairs are drawn; lengths in tokens.

    Attributes:
        target: of S2, the span that is scored.
        context: of S1.
        alone_context: what S2 keeps before it even when it is scored "alone": 0 is the report's
            ppl(S2), 1024 LongWanjuan's.
        pairs: of each document, one in each of as many equal parts of it.
        placement: "apart", S1 is any stretch before S2: half of the pairs of two documents glued
            together then straddle the joint. "adjacent", S2 follows S1 (LongWanjuan), which sees a
            joint only where one happens to fall into a pair.
        seed: of the places, together with the document's id.
    """

    target: int = 1024
    context: int = 3072
    alone_context: int = 0
    pairs: int = 4
    placement: Placement = "apart"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target < 1 or self.context < 1 or self.pairs < 1:
            raise UserError("perplexity: target, context and pairs must be at least 1")
        if not 0 <= self.alone_context < self.context:
            raise UserError(
                f"perplexity: alone_context {self.alone_context} must be at least 0 and below "
                f"context {self.context}"
            )
        if self.placement not in get_args(Placement):
            raise UserError(
                f"perplexity: placement {self.placement!r} is unknown; choose adjacent or apart"
            )


LONGWANJUAN = Protocol(target=1024, context=3072, alone_context=1024, placement="adjacent")


class Pair(NamedTuple):
    """Token ids: `context` is S1, `short` what stays of the context when S2 is scored alone."""

    context: list[int]
    short: list[int]
    target: list[int]


def pairs(
    identity: str,
    text: str,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    protocol: Protocol,
) -> Iterator[Pair]:
    """The pairs of a document; none when it is shorter than one.

    Only the text around the spans is tokenised, so a book costs no more than an article.
    """
    head = _first_tokens(text, 0, protocol.context, encode)
    tail = _last_tokens(text, len(text), protocol.target, encode)
    lowest, highest = len(decode(head)), len(text) - len(decode(tail))
    if len(head) < protocol.context or len(tail) < protocol.target or lowest > highest:
        return
    for number in range(protocol.pairs):
        part = (number + _uniform(identity, number, "place", protocol)) / protocol.pairs
        start = _at_break(text, lowest + int(part * (highest - lowest + 1)), highest)
        before = start
        if protocol.placement == "apart":
            share = _uniform(identity, number, "context", protocol)
            before = _at_break(text, lowest + int(share * (start - lowest + 1)), start)
        target = _first_tokens(text, start, protocol.target, encode)
        context = _last_tokens(text, before, protocol.context, encode)
        short = _last_tokens(text, start, protocol.alone_context, encode)
        yield Pair(context, short, target)


def _uniform(identity: str, number: int, purpose: str, protocol: Protocol) -> float:
    return hash63(f"{identity} {number}", protocol.seed, f"perplexity {purpose}") / 2**63


def _at_break(text: str, place: int, highest: int) -> int:
    """The first place from `place` on that follows white space, if one is near."""
    place = min(place, highest)
    for at in range(place, min(place + _BREAK, highest) + 1):
        if at == 0 or text[at - 1].isspace():
            return at
    return place


def _first_tokens(
    text: str, start: int, count: int, encode: Callable[[str], list[int]]
) -> list[int]:
    """The first `count` tokens from `start` on; fewer where the text ends."""
    size = count * _CHARACTERS_PER_TOKEN
    while count:
        ids = encode(text[start : start + size])
        if len(ids) >= count + _SLACK or start + size >= len(text):
            return ids[:count]
        size *= 2
    return []


def _last_tokens(text: str, end: int, count: int, encode: Callable[[str], list[int]]) -> list[int]:
    """The last `count` tokens before `end`; fewer where the text begins."""
    size = count * _CHARACTERS_PER_TOKEN
    while count:
        ids = encode(text[max(0, end - size) : end])
        if len(ids) >= count + _SLACK or size >= end:
            return ids[-count:]
        size *= 2
    return []


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Scorer of the attribute "perplexity": see `score.Scorer`.

    Attributes:
        model: folder of a stage with a language model, or a Hugging Face InternLM2 folder.
        min_bytes: shorter documents are not scored (nulls): the report's filter is for long ones.
    """

    model: str
    protocol: Protocol = Protocol()
    min_bytes: int = 32 * 1024
    tokens_per_batch: int = 8192
    share_model: bool = False
    max_failed_share: float = 0.01
    name: str = "perplexity"

    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("ppl_alone", pa.float32()),
            ("ppl_given", pa.float32()),
            ("gain", pa.float32()),
            ("pairs", pa.int32()),
        ]
    )

    def settings(self) -> dict[str, Any]:
        return {"protocol": dataclasses.asdict(self.protocol), "min_bytes": self.min_bytes}

    def selects(self, document: Document) -> bool:
        return len(document.text) >= self.min_bytes or document.num_bytes >= self.min_bytes

    def example(self, document: Document) -> tuple[str, str]:
        return document.id, document.text

    def handler(self) -> ScoreHandler:
        from data_beam.scoring import handlers

        load = functools.partial(
            handlers.load_spans, self.model, self.protocol, self.tokens_per_batch
        )
        # Pairs are long: a few documents fill a batch.
        rows = self.tokens_per_batch // (1 + self.protocol.context + self.protocol.target)
        documents = max(1, 4 * rows // self.protocol.pairs)
        return handlers.ScoreHandler(load, documents, share=self.share_model)

    def run(
        self,
        output: str | os.PathLike,
        beam_options: Sequence[str] = (),
        candidates: Candidates | None = None,
    ) -> dict[str, Any]:
        """Scores the documents below `output`; see `score.run`."""
        from data_beam.scoring import score

        return score.run(
            output,
            self,
            candidates=candidates,
            max_failed_share=self.max_failed_share,
            beam_options=beam_options,
        )
