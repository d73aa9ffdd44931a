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
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from internlm2_jax.data import packing, tasks
from internlm2_jax.data.documents import TextDocument
from internlm2_jax.data.packing import PackableSource
from internlm2_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass
class TokenDocuments:
    """Documents end to end: tokens [all], lengths [documents]."""

    tokens: np.ndarray
    lengths: np.ndarray


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


def view(
    name: str, sources: Mapping[str, PackableSource], *, short_length: int, long_length: int
) -> PackableSource | None:
    """The source that a mixture calls `name`; None when the corpus has no such source."""
    kind, _, base = name.rpartition("/")
    source = sources.get(base)
    if source is None or not len(source.lengths):
        return None
    if kind == "short":
        return shortened(source, short_length)
    return at_least(source, long_length) if kind == "long" else source


# ------------------------------------------------------------------ enhancement

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
