"""What the phases of pre-training read: length-selected views of the corpus, enhancement data.

The long phase of InternLM2 keeps half of its data short: "short/NAME" is the source NAME cut into
short documents, "long/NAME" its long documents only. The third phase reads retrieved STEM data,
special domains and selected high-quality text; here these are "stem" (generated tasks with their
answers), "special" (questions and answers about the corpus itself) and "selected" (the best
documented quarter of the corpus).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from internlm2_jax.data import packing, tasks
from internlm2_jax.data.documents import TextDocument
from internlm2_jax.data.manifest import TokenReader, open_split
from internlm2_jax.data.packing import PackableSource, PackedSource, TokenDocuments
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.data.windows import WINDOW_TOKENS, WindowedSource, count_long
from internlm2_jax.errors import UserError

WhenShort = Literal["share", "error"]
IN_MEMORY = 2**30  # tokens; a larger source stays on the disk


def encode(texts: Sequence[str], vocabulary: Tokenizer) -> TokenDocuments:
    """Each text as `<s> ... </s>`."""
    docs = [[vocabulary.bos_id, *ids, vocabulary.eos_id] for ids in vocabulary.encode_batch(texts)]
    flat = (
        np.concatenate([np.asarray(d, np.int32) for d in docs]) if docs else np.zeros(0, np.int32)
    )
    return TokenDocuments(flat, np.array([len(d) for d in docs], np.int64))


def at_least(source: PackableSource, length: int) -> TokenDocuments:
    """The documents of at least `length` tokens; all of them when there is none."""
    lengths = np.asarray(source.lengths, np.int64)
    keep = lengths >= length
    if not keep.any():
        return TokenDocuments(source.tokens, lengths)
    return TokenDocuments(source.tokens[np.repeat(keep, lengths)], lengths[keep])


def shortened(source: PackableSource, length: int) -> TokenDocuments:
    """The documents cut into pieces of `length` transitions; neighbours share one token."""
    lengths = np.asarray(source.lengths, np.int64)
    doc, start, transitions = packing.cut(lengths, length)
    size = transitions + 1
    first = (np.cumsum(lengths) - lengths)[doc] + start
    at = np.arange(size.sum()) + np.repeat(first - (np.cumsum(size) - size), size)
    return TokenDocuments(source.tokens[at], size)


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the documents of a source become rows.

    Attributes:
        length: tokens of a row.
        short_length: "short/NAME" is the source NAME cut into pieces of so many transitions.
        long_length: "long/NAME" is its documents of at least so many tokens.
        window_tokens, windows: what of a source on the disk is packed together, and how many such
            windows are in memory (windows.py).
        folder: where counts of long documents are kept, by the process that `writes`.
    """

    length: int
    short_length: int
    long_length: int
    window_tokens: int = WINDOW_TOKENS
    windows: int = 16
    folder: Path = Path()
    writes: bool = True

    def pack(
        self, name: str, sources: Mapping[str, PackableSource | TokenReader]
    ) -> PackedSource | WindowedSource | None:
        """Rows of the source that a mixture calls `name`; None when there is no such source."""
        kind, _, base = name.rpartition("/")
        source = sources.get(base)
        if kind not in ("", "short", "long"):
            raise UserError(
                f"mixture: {name!r} begins with {kind!r}; a source is NAME, short/NAME or long/NAME"
            )
        if isinstance(source, TokenReader):
            return self._windowed(kind, base, source) if len(source) else None
        if source is None or not len(source.lengths):
            return None
        return PackedSource(self._view(kind)(source), self.length)

    def _windowed(self, kind: str, base: str, reader: TokenReader) -> WindowedSource:
        counts, view = None, self._view(kind)
        if kind == "long":
            path = self.folder / f"long-{base}-{self.long_length}.npy"
            counts = count_long(reader, self.long_length, path, writes=self.writes)
            if not counts.any():
                counts, view = None, self._view("")
        return WindowedSource(
            reader,
            self.length,
            window_tokens=self.window_tokens,
            kept=self.windows,
            view=view,
            counts=counts,
        )

    def _view(self, kind: str) -> Callable[[PackableSource], PackableSource]:
        return {
            "": lambda source: source,
            "short": lambda source: shortened(source, self.short_length),
            "long": lambda source: at_least(source, self.long_length),
        }[kind]


def of_corpus(
    tokens: Path, vocabulary: Tokenizer, wanted: Mapping[str, float], rows: Rows
) -> dict[str, PackedSource | WindowedSource]:
    """Those of the wanted sources that a folder of tokens has, as training rows.

    Errors: UserError when it has none of them.
    """
    corpus = open_split(tokens, "train", in_memory=IN_MEMORY, tokenizer_sha256=vocabulary.sha256)
    packed = {name: rows.pack(name, corpus) for name in wanted}
    found = {name: source for name, source in packed.items() if source is not None and len(source)}
    if not found:
        raise UserError(
            f"the mixture names {', '.join(wanted)} but the corpus has "
            f"{', '.join(sorted(corpus))}; change the mixture"
        )
    return found


def limited(
    weights: Mapping[str, float],
    rows: Mapping[str, int],
    epochs: Mapping[str, float],
    *,
    total: int,
    row_length: int,
    when_short: WhenShort = "share",
    label: str = "mixture",
) -> dict[str, float]:
    """Shares of `total` rows with no source repeated more often than its `epochs` allow.

    Args:
      weights: wanted shares, of any sum; rows: how many each source has.
      epochs: source -> how often it may be gone through; those not named, without end.
      when_short: what a source has too little of is taken from the others in proportion to their
        weights ("share"), or is an error ("error").

    Errors: UserError that says how many tokens are missing: of a source, or of all together.
    """
    for name in epochs:
        if name not in weights:
            raise UserError(
                f"{label}: epochs name {name!r}, which is not in the mixture of "
                f"{', '.join(sorted(weights))}"
            )
        if not epochs[name] > 0:
            raise UserError(
                f"{label}: epochs of {name!r} are {epochs[name]}; give a number above 0, or leave "
                "the source out of the mixture"
            )
    limits = {name: int(epochs[name] * rows[name]) for name in epochs}
    wanted = sum(weights.values())
    shares = {name: weight / wanted for name, weight in weights.items()}
    fixed: dict[str, float] = {}
    while True:
        free = {name: w for name, w in shares.items() if name not in fixed}
        left, weight = 1 - sum(fixed.values()), sum(free.values())
        given = {name: left * w / weight for name, w in free.items()}
        short = [n for n in given if n in limits and given[n] * total > limits[n]]
        if not short:
            return fixed | given
        missing = {n: given[n] * total - limits[n] for n in short}
        if when_short == "error" or len(short) == len(free):
            lacking = sum(missing.values()) * row_length
            names = ", ".join(f"{n!r} ({epochs[n]:g} x {rows[n]} rows)" for n in short)
            raise UserError(
                f"{label}: {names} cannot give its share of {total} rows: {lacking:,.0f} tokens "
                "are missing; train fewer steps, allow more epochs, or add a source"
            )
        # Half a row less: mixing rounds the rows of a share up.
        fixed |= {name: max(limits[name] - 0.5, 0.0) / total for name in short}


# ------------------------------------------------------------------ enhancement

ENHANCEMENT = ("stem", "special", "selected")
_PROSE = re.compile(r"[^\W\d_]{2,}[^\n]*[.!?:;]\s*$", re.MULTILINE)
_COMMENT = re.compile(r"^\s*#.*$|\"\"\"[\s\S]*?\"\"\"", re.MULTILINE)


def documented(document: TextDocument) -> float:
    """A quality score in 0..1: the share of a program that explains it, or of lines that are prose.

    Rules stand in for the report's classifiers here, which need labelled data.
    """
    text = document.text
    if document.source == "code":
        explained = sum(len(match) for match in _COMMENT.findall(text))
        share = explained / max(len(text), 1)
        return share if share < 0.6 else 0.0  # almost no code: a stub or a licence
    lines = [line for line in text.splitlines() if line.strip()]
    return len(_PROSE.findall(text)) / max(len(lines), 1)


def enhancement(
    documents: Iterable[TextDocument],
    instructions: Sequence[Mapping],
    *,
    num_tasks: int,
    seed: int,
    selected_share: float = 0.25,
) -> dict[str, list[str]]:
    """Texts of "stem" (tasks, and sessions of facts with questions), "special" and "selected".

    `instructions` are rows of the SFT set; those about the corpus make up "special".
    """
    by_source: dict[str, list[TextDocument]] = {}
    for document in documents:
        by_source.setdefault(document.source, []).append(document)
    selected = []
    for rows in by_source.values():
        ranked = sorted(rows, key=documented, reverse=True)
        selected += [d.text for d in ranked[: max(1, int(len(ranked) * selected_share))]]
    generated = tasks.generate(num_tasks, seed, "train")
    families = {task.family for task in generated}
    special = [
        "\n".join(message["content"] for message in row["messages"])
        for row in instructions
        if row["family"] not in families
    ]
    return {
        "stem": [f"Question: {task.prompt}\nAnswer: {task.answer}" for task in generated]
        + tasks.recall_sessions(num_tasks // 8, seed),
        "special": special,
        "selected": selected,
    }
