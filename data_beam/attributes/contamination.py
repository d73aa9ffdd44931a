"""Which evaluation examples stand in a document, where, and how much of each.

Two ways to act on it, chosen in the mix: drop the document (`matched_ngrams` above a limit), or cut
the spans in `removed` out of it, as GPT-3 did (Brown et al. 2020, appendix C: 200 characters to
each side go as well, rests of less than 200 characters too, and a document in more than ten pieces
is dropped: `num_spans`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from data_beam.attributes.base import Examined
from data_beam.contamination import index as indices
from data_beam.contamination.words import Words, offsets, words_of
from data_beam.io import storage
from data_beam.kernels import ngrams
from data_beam.kernels.ngrams import Runs
from internlm2_jax.errors import UserError

_NOTHING: dict[str, Any] = {
    "matched_ngrams": 0, "covered": 0.0, "longest_run": 0, "num_examples": 0, "example_share": 0.0,
    "answer_hit": False, "num_spans": 0,
}  # fmt: skip


class _Hits(NamedTuple):
    """Matches of one kind: the words [start, start + length) and the postings of each, in a row."""

    starts: np.ndarray
    lengths: np.ndarray
    owner: np.ndarray  # of each posting, a match
    values: np.ndarray  # example * 2 + bit
    keys: np.ndarray  # [matches] uint64


@dataclasses.dataclass(frozen=True)
class Contamination:
    """Columns, all of the document:

    matched_ngrams  runs of 13 words, and short questions whole, that an evaluation set has
    covered         share of the document's words in them
    longest_run     words in the longest stretch of them
    set             the evaluation set with most of them
    examples        ids of the examples hit, the most complete first; num_examples, how many
    example_share   the largest share of one question's or solution's runs found here
    answer_hit      the final answer of an example hit stands near it as well
    removed         what to cut, [start, end, ...] in characters; num_spans, how many cuts
    ngrams          hashes of the runs of 13 words matched (for `contamination.common`)

    `index` is a file of `contamination.index.build` and `digest` its digest; `ignore` a file of
    `contamination.common.write`, with `ignore_digest`. An answer is near when it stands within
    `answer_words` words after the match. Use `Contamination.of` to fill in the digests.
    """

    name: ClassVar[str] = "contamination"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema([
        ("matched_ngrams", pa.int32()), ("covered", pa.float32()), ("longest_run", pa.int32()),
        ("set", pa.string()), ("examples", pa.list_(pa.string())), ("num_examples", pa.int32()),
        ("example_share", pa.float32()), ("answer_hit", pa.bool_()),
        ("removed", pa.list_(pa.int32())), ("num_spans", pa.int32()),
        ("ngrams", pa.list_(pa.uint64())),
    ])  # fmt: skip

    index: str
    digest: str
    margin: int = 200
    min_piece: int = 200
    answer_words: int = 200
    ignore: str = ""
    ignore_digest: str = ""

    @classmethod
    def of(cls, index: str, ignore: str = "", **settings: int) -> Contamination:
        ignored = storage.digest(ignore) if ignore else ""
        return cls(index, storage.digest(index), ignore=ignore, ignore_digest=ignored, **settings)

    def setup(self) -> None:
        self._index()

    def _index(self) -> indices.Index:
        return _loaded(self.index, self.digest, self.ignore, self.ignore_digest)

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        index = self._index()
        rows = [self._examine(index, examined) for examined in batch]
        return {name: [row.get(name) for row in rows] for name in self.schema.names}

    def _examine(self, index: indices.Index, examined: Examined) -> dict[str, Any]:
        text = examined.document.text
        words = words_of(text, None if "_" in text else examined.signals.words)
        runs = Runs(words.hashes)
        found = [*_long(index, runs), *_short(index, runs)]
        if not found:
            return _NOTHING
        near = _Answers(index, text, words, runs, self.answer_words)
        found = [hits for some in found if len((hits := near.confirmed(some)).starts)]
        return self._describe(index, text, words, found, near) if found else _NOTHING

    def _describe(self, index, text, words: Words, found: list[_Hits], near) -> dict[str, Any]:
        starts = np.concatenate([hits.starts for hits in found])
        ends = starts + np.concatenate([hits.lengths for hits in found])
        first, last = ngrams.merge(starts, ends)
        shares = _shares(index, found)
        ranked = sorted(shares, key=lambda e: (-shares[e], e))
        of_set = np.concatenate([_sets(index, hits) for hits in found])
        spans = self._spans(text, words, first, last)
        return {
            "matched_ngrams": len(np.unique(starts)),
            "covered": float((last - first).sum() / len(words.hashes)),
            "longest_run": int((last - first).max()),
            "set": index.sets[int(np.bincount(of_set).argmax())]["name"],
            "examples": [index.examples[example]["id"] for example in ranked],
            "num_examples": len(ranked),
            "example_share": shares[ranked[0]],
            "answer_hit": near.any(found),
            "removed": spans.ravel().tolist(),
            "num_spans": len(spans),
            "ngrams": np.unique(found[0].keys).tolist() if found[0].lengths[0] == index.n else [],
        }

    def _spans(self, text: str, words: Words, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """[spans, 2] characters to remove: the matches with their margins and small rests."""
        characters = offsets(
            text, np.stack([words.starts[first], words.ends[last - 1]]), words.lowered_length
        )
        starts = np.maximum(characters[0] - self.margin, 0)
        ends = np.minimum(characters[1] + self.margin, len(text))
        starts, ends = ngrams.merge(starts, ends, gap=self.min_piece)
        starts[starts < self.min_piece] = 0
        ends[ends > len(text) - self.min_piece] = len(text)
        return np.stack([starts, ends], axis=1)


_cache: dict[tuple[str, str, str, str], indices.Index] = {}


def _loaded(path: str, digest: str, ignore: str, ignore_digest: str) -> indices.Index:
    key = (path, digest, ignore, ignore_digest)
    if key not in _cache:
        index = indices.load(path, digest)
        if ignore:
            value = storage.read_json(ignore)
            if value.get("index") != digest:
                raise UserError(f"{ignore} was counted with another index than {path}; count again")
            index = index.ignoring(np.array(value["ngrams"], np.uint64))
        _cache.clear()
        _cache[key] = index
    return _cache[key]


def _hits(postings: ngrams.Postings, starts, length: int, rows: np.ndarray) -> _Hits:
    owner, values = postings.of(rows)
    return _Hits(starts, np.full(len(starts), length), owner, values, postings.keys[rows])


def _long(index: indices.Index, runs: Runs) -> list[_Hits]:
    starts, rows = index.gram_set.find(runs.all(index.n))
    return [_hits(index.grams, starts, index.n, rows)] if len(starts) else []


def _short(index: indices.Index, runs: Runs) -> list[_Hits]:
    """Short questions, found by their last words first."""
    found = []
    at, _ = index.anchors.find(runs.all(indices.ANCHOR))
    for length in index.run_lengths if len(at) else ():
        starts = at + indices.ANCHOR - length
        starts = starts[starts >= 0]
        where, rows = index.run_set.find(runs.at(starts, length))
        if len(where):
            found.append(_hits(index.runs, starts[where], length, rows))
    return found


class _Answers:
    """Looks for the final answers of examples in the words after a match."""

    def __init__(self, index: indices.Index, text: str, words: Words, runs: Runs, reach: int):
        self.index, self.words, self.runs, self.reach = index, words, runs, reach
        self.lowered = text.lower()

    def near(self, example: int, end: int) -> bool:
        """Whether an answer of the example stands within `reach` words from the word `end` on."""
        stop = min(end + self.reach, len(self.words.hashes))
        if stop == end:
            return False
        there: set[str] | None = None
        for final in self.index.examples[example]["finals"]:
            if indices.number(final) == final:
                if there is None:
                    window = slice(self.words.starts[end] - 1, self.words.ends[stop - 1])
                    there = indices.numbers(self.lowered[window])
                if final in there:
                    return True
                continue
            wanted = words_of(final).hashes
            starts = np.arange(end, stop - len(wanted) + 1)
            if (self.runs.at(starts, len(wanted)) == np.uint64(Runs(wanted).whole())).any():
                return True
        return False

    def confirmed(self, hits: _Hits) -> _Hits:
        """Without the matches that count only with an answer near them and have none."""
        if hits.lengths[0] == self.index.n:
            return hits
        ends = (hits.starts + hits.lengths)[hits.owner].tolist()
        values = hits.values.tolist()
        keep = np.array([
            value % 2 == indices.ALONE or self.near(value // 2, end)
            for value, end in zip(values, ends, strict=True)
        ], bool)  # fmt: skip
        kept, owner = np.unique(hits.owner[keep], return_inverse=True)
        return _Hits(hits.starts[kept], hits.lengths[kept], owner, hits.values[keep],
                     hits.keys[kept])  # fmt: skip

    def any(self, found: list[_Hits]) -> bool:
        """Whether the answer to one of the examples follows its question, or stands in or after
        the last run of its solution."""
        last: dict[int, int] = {}  # posting -> word from which on to look
        for hits in found:
            starts, lengths = hits.starts[hits.owner], hits.lengths[hits.owner]
            solution = (hits.values % 2 == indices.ANSWER) & (lengths == self.index.n)
            words = np.where(solution, starts, starts + lengths)
            for value, word in zip(hits.values.tolist(), words.tolist(), strict=True):
                last[value] = max(last.get(value, 0), word)
        return any(self.near(value // 2, word) for value, word in last.items())


def _shares(index: indices.Index, found: list[_Hits]) -> dict[int, float]:
    """Of every example hit, the share of its question's (or its solution's) runs found."""
    shares: dict[int, float] = {}
    for hits in found:
        long = int(hits.lengths[0]) == index.n
        pairs = np.unique(np.stack([hits.values.astype(np.uint64), hits.keys[hits.owner]]), axis=1)
        values, counts = np.unique(pairs[0].astype(np.int64), return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            example, bit = divmod(value, 2)
            total = index.examples[example]["totals"][bit if long else indices.QUESTION]
            shares[example] = max(shares.get(example, 0.0), min(1.0, count / max(total, 1)))
    return shares


def _sets(index: indices.Index, hits: _Hits) -> np.ndarray:
    return np.array([index.examples[value // 2]["set"] for value in hits.values.tolist()])
