"""Exact and near duplicates, as verdicts on document ids.

Texts never travel here: only a fingerprint of a few hundred bytes per document does. Exact
duplicates share a hash of their normalised text. Near duplicates are found by MinHash LSH; every
candidate pair is checked with the full signature before it counts (unchecked, one boilerplate
paragraph chains unrelated documents into a single cluster), then connected components give the
clusters. The survivor of a cluster is its newest document, then its longest, then the one with the
smallest id: InternLM2 keeps the most recent (section 3.1.1).
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data_beam.kernels import minhash
from data_beam.kernels.tokens import Tokens
from data_beam.runners import beam
from data_beam.schema import Document, Drop
from data_beam.transforms.normalize import text_hash
from internlm2_jax.errors import UserError

Label = bytes  # sorts by preference; the last 16 bytes are the document id
Edge = tuple[Label, Label, float]

# Representatives kept per bucket: a member is compared with these, not with every other member.
_MAX_REPRESENTATIVES = 64
_TOP = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """Settings of the near-duplicate search. `threshold` is the Jaccard similarity, estimated from
    `num_perm` hashes, from which two documents count as copies."""

    ngram: int = 5
    num_perm: int = 128
    bands: int = 16
    rows: int = 8
    threshold: float = 0.7

    def __post_init__(self):
        if min(self.ngram, self.num_perm, self.bands, self.rows) < 1:
            raise UserError("ngram, num_perm, bands and rows must be at least 1")
        if self.bands * self.rows > self.num_perm:
            raise UserError(
                f"bands x rows = {self.bands} x {self.rows} needs {self.bands * self.rows} hashes "
                f"but num_perm is {self.num_perm}; raise num_perm or lower bands or rows"
            )
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold {self.threshold} is not in (0, 1]; the report uses 0.7")


class Fingerprint(NamedTuple):
    """What de-duplication knows of a document."""

    label: Label
    text_hash: bytes
    bands: bytes  # uint64 per band
    signature: bytes  # `minhash.compact`


def dump_number(dump: str) -> int:
    """A number that grows with the date of a crawl: "CC-MAIN-2023-50" -> 202350."""
    return int("".join(re.findall(r"\d+", dump)) or 0) % (1 << 63)


def label_of(document: Document) -> Label:
    """Newest first, then longest, then smallest id."""
    newness = dump_number(document.dump), max(document.timestamp, 0), len(document.text)
    inverted = (_TOP - min(value, _TOP) for value in newness)
    return struct.pack(">QQQ", *inverted) + bytes.fromhex(document.id)


def id_of(label: Label) -> str:
    return label[-16:].hex()


def fingerprint(document: Document, words: Tokens, near: NearDuplicates, seed: int) -> Fingerprint:
    minima = minhash.signature(minhash.shingles(words.hashes, near.ngram), near.num_perm, seed)
    return Fingerprint(
        label_of(document),
        text_hash(document.text),
        minhash.band_keys(minima, near.bands, near.rows).astype("<u8").tobytes(),
        minhash.compact(minima),
    )


def exact_duplicates(fingerprints: Iterable[Fingerprint]) -> tuple[Fingerprint, list[Drop]]:
    """The survivor among documents of equal text, and the drops of the others."""
    first, *others = sorted(fingerprints)
    drops = [Drop(id_of(f.label), "exact_dedup", "exact_duplicate", 1.0, id_of(first.label))
             for f in others]  # fmt: skip
    return first, drops


def verified_edges(members: Iterable[tuple[Label, bytes]], threshold: float) -> Iterator[Edge]:
    """Pairs of one LSH bucket whose signatures agree: (preferred, other, similarity).

    Members are taken in the order of preference; each is compared with the representatives so
    far and linked to the first that is similar enough, else it becomes one itself. The work is
    linear in the size of the bucket, and the result does not depend on the order of arrival.
    """
    ordered = sorted(members)
    if len(ordered) < 2:
        return
    table = np.frombuffer(b"".join(signature for _, signature in ordered), "<u2")
    table = table.reshape(len(ordered), -1)
    representatives = [0]
    for row in range(1, len(ordered)):
        similar = minhash.similarity(table[representatives], table[row])
        best = int(np.argmax(similar >= threshold))
        if similar[best] >= threshold:
            yield ordered[representatives[best]][0], ordered[row][0], float(similar[best])
        elif len(representatives) < _MAX_REPRESENTATIVES:
            representatives.append(row)


def components(edges: Iterable[Edge]) -> Iterator[Drop]:
    """Drops of every document of a cluster but the preferred one. `value` is the highest verified
    similarity of the dropped document to another member. Union-find in one worker: good for some
    tens of millions of edges."""
    parent: dict[Label, Label] = {}
    similarity: dict[Label, float] = {}

    def find(label: Label) -> Label:
        root = label
        while parent.setdefault(root, root) != root:
            root = parent[root]
        while parent[label] != root:
            parent[label], label = root, parent[label]
        return root

    for left, right, value in edges:
        low, high = sorted((find(left), find(right)))
        parent[high] = low
        for label in (left, right):
            similarity[label] = max(value, similarity.get(label, 0.0))
    for label in sorted(parent):
        root = find(label)
        if root != label:
            value = round(similarity[label], 4)
            yield Drop(id_of(label), "near_dedup", "near_duplicate", value, id_of(root))


def final_survivor(exact: Iterable[Drop], near: Iterable[Drop]) -> Iterator[Drop]:
    """Drops of exact copies of one document, given the drop of that document itself, if it was in
    turn a near duplicate: they then name the document that is left."""
    of_id = next((drop.of_id for drop in near), None)
    for drop in exact:
        yield drop if of_id is None else drop._replace(of_id=of_id)


def _bands(print_: Fingerprint) -> Iterator[tuple[bytes, tuple[Label, bytes]]]:
    for start in range(0, len(print_.bands), 8):
        # The band's key already depends on its number.
        yield print_.bands[start : start + 8], (print_.label, print_.signature)


class _ExactVerdicts(beam.DoFn):
    def process(self, group):
        survivor, drops = exact_duplicates(Fingerprint(*item) for item in group[1])
        yield tuple(survivor)
        for drop in drops:
            yield beam.pvalue.TaggedOutput("drops", drop)


class Deduplicate(beam.PTransform):
    """PCollection of `Fingerprint` -> PCollection of (id, encoded Drop), for exact and near
    duplicates. Shuffles 16 bands x about 300 bytes per distinct document."""

    def __init__(self, near: NearDuplicates):
        super().__init__()
        self.near = near

    def expand(self, fingerprints):
        threshold = self.near.threshold
        exact = (
            fingerprints
            | "KeyByText" >> beam.Map(lambda f: (f[1], tuple(f))).with_output_types(
                beam.typehints.KV[bytes, tuple])
            | "GroupEqualTexts" >> beam.GroupByKey()
            | "ExactVerdicts" >> beam.ParDo(_ExactVerdicts()).with_outputs("drops", main="kept")
        )  # fmt: skip
        near = (
            exact.kept
            | "Bands" >> beam.FlatMap(lambda f: _bands(Fingerprint(*f))).with_output_types(
                beam.typehints.KV[bytes, tuple])
            | "GroupBuckets" >> beam.GroupByKey()
            | "VerifyCandidates" >> beam.FlatMap(lambda g: verified_edges(g[1], threshold))
            | "OneWorker" >> beam.Map(lambda edge: (b"", edge)).with_output_types(
                beam.typehints.KV[bytes, tuple])
            | "GroupEdges" >> beam.GroupByKey()
            | "Components" >> beam.FlatMap(lambda g: components(g[1]))
        )  # fmt: skip
        resolved = (
            {
                "exact": exact.drops | "KeyBySurvivor" >> _key_drops(lambda drop: drop.of_id),
                "near": near | "KeyByDropped" >> _key_drops(lambda drop: drop.id),
            }
            | "JoinSurvivors" >> beam.CoGroupByKey()
            | "FinalSurvivor" >> beam.FlatMap(
                lambda kv: final_survivor(_drops(kv[1]["exact"]), _drops(kv[1]["near"])))
        )  # fmt: skip
        encode = beam.Map(lambda drop: (drop.id, drop.to_bytes()))
        return (
            resolved | "EncodeExact" >> encode,
            near | "EncodeNear" >> encode,
        ) | beam.Flatten()


def _key_drops(key: Callable[[Drop], str]) -> beam.PTransform:
    return beam.Map(lambda drop: (key(drop), drop.to_bytes())).with_output_types(
        beam.typehints.KV[str, bytes]
    )


def _drops(encoded: Iterable[bytes]) -> list[Drop]:
    return [Drop.from_bytes(one) for one in encoded]
