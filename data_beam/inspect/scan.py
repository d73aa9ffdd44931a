"""What the page shows of the attributes, counted shard by shard: two passes, memory that does not
grow with the corpus, the same result however often it is run.

The first pass counts documents by source, language and outcome, and finds each signal's range; the
second counts every rule's histogram between edges fitted to that range, what the rule drops alone,
first and only, and keeps a few sample documents. Shares are of the shards that were looked at.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from data_beam.inspect.corpus import DECISION, Corpus, Place
from data_beam.mix import curves
from data_beam.mix import rules as rules_module
from data_beam.mix.curves import MAXIMUM, MINIMUM, Axis, Direction, Histogram
from data_beam.mix.rules import Rule, rules_for
from data_beam.schema import hash63

KEPT = ""  # the stage of a document that was not dropped
SAMPLES = 3  # documents of each kind per rule
_MAX_NAMES = 10_000  # different values of a column of names that are counted apart
# Bytes of a document, 64 to an octave: quantiles to 1 %.
LENGTHS = 2.0 ** (np.arange(40 * 64 + 1) / 64)
_FACTS = ("facts.id", "facts.source", "facts.num_bytes")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A document to judge a rule by. `fate` is the (stage, reason) that dropped it, if any did."""

    id: str
    place: Place
    value: float
    fate: tuple[str, str] | None


@dataclasses.dataclass
class RuleCount:
    """A rule of a source over the documents it applies to; pairs are (documents, bytes).

    alone: the rule is broken. first: no earlier rule is, so this one is the reason of the drop.
    only: no other rule is broken at all. `of`: all that the rule applies to. `histograms` has one
    per finite limit (one without limits when there is none), `names` the most frequent values of a
    column of names. `samples` by kind: "dropped near", "kept near", "dropped", "kept".
    """

    source: str
    number: int
    rule: Rule
    axis: Axis | None = None
    of: tuple[int, int] = (0, 0)
    alone: tuple[int, int] = (0, 0)
    first: tuple[int, int] = (0, 0)
    only: tuple[int, int] = (0, 0)
    histograms: dict[Direction, Histogram] = dataclasses.field(default_factory=dict)
    names: Counter[str] = dataclasses.field(default_factory=Counter)
    samples: dict[str, list[tuple[tuple[float, int], Sample]]] = dataclasses.field(
        default_factory=dict
    )
    is_flag: bool = False  # true or false, or nothing but ones and zeros
    is_whole: bool = False  # whole numbers

    @property
    def has_names(self) -> bool:
        return self.rule.allowed is not None

    def chosen(self, kind: str) -> list[Sample]:
        return [sample for _, sample in self.samples.get(kind, [])]


@dataclasses.dataclass
class Scan:
    """`outcomes`: (source, language, stage) -> (documents, bytes), with the stage KEPT for kept
    ones. `lengths`: (source, kept?) -> histogram of the documents' bytes. `rules` by source, in
    their order."""

    outcomes: dict[tuple[str, str, str], tuple[int, int]]
    lengths: dict[tuple[str, bool], Histogram]
    rules: dict[str, list[RuleCount]]

    @property
    def documents(self) -> int:
        return sum(count for count, _ in self.outcomes.values())


def scan(corpus: Corpus) -> Scan:
    """Both passes over the shards of `corpus`."""
    result = Scan({}, {}, {})
    rough: dict[tuple[str, int], Histogram] = {}
    for shard in corpus.shards:
        _survey(Part(corpus, shard), result, rough)
    for source, counts in result.rules.items():
        for count in counts:
            if (source, count.number) in rough:
                _fit(count, corpus, rough[source, count.number])
    for shard in corpus.shards:
        _measure(Part(corpus, shard), result)
    return result


class Part:
    """The columns of one shard."""

    def __init__(self, corpus: Corpus, shard: int):
        wanted = [*_FACTS, corpus.lang]
        wanted += [c for some in corpus.rules.values() for rule in some for c in rule.columns]
        if corpus.is_decided:
            wanted += [f"{DECISION}.stage", f"{DECISION}.reason"]
        self.shard, self.corpus = shard, corpus
        self.columns = corpus.columns(shard, wanted)
        self.ids: list[str] = self.columns["facts.id"].to_pylist()
        self.sources = _codes(self.columns["facts.source"])
        self.langs = _codes(self.columns[corpus.lang])
        self.num_bytes = self.columns["facts.num_bytes"].to_numpy()
        self.stages = (
            _codes(self.columns[f"{DECISION}.stage"])
            if corpus.is_decided
            else (np.zeros(len(self.ids), np.int64), [KEPT])
        )

    def of_source(self, source: str) -> np.ndarray:
        codes, names = self.sources
        return codes == names.index(source) if source in names else np.zeros(len(codes), bool)

    def mine(self, source: str, rule: Rule) -> np.ndarray:
        """[documents] bool: those that a rule of a source speaks of."""
        mine = self.of_source(source)
        return (
            mine
            if rule.lang is None
            else mine & rules_module.among(self.columns[self.corpus.lang], rule.lang)
        )

    def fate(self, row: int) -> tuple[str, str] | None:
        stage = self.stages[1][self.stages[0][row]]
        return (stage, self.columns[f"{DECISION}.reason"][row].as_py()) if stage else None


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """A column of names as numbers into a list of names; null is ""."""
    encoded = column.combine_chunks().dictionary_encode()
    names = [*encoded.dictionary.to_pylist(), ""]
    codes = encoded.indices.fill_null(len(names) - 1).to_numpy()
    if "" in names[:-1]:
        codes = np.where(codes == len(names) - 1, names.index(""), codes)
    return codes.astype(np.int64), names


# --- first pass -------------------------------------------------------------------------------


def _survey(part: Part, result: Scan, rough: dict[tuple[str, int], Histogram]) -> None:
    (sources, source_names), (langs, lang_names) = part.sources, part.langs
    stages, stage_names = part.stages
    keys = (sources * len(lang_names) + langs) * len(stage_names) + stages
    present, where = np.unique(keys, return_inverse=True)
    documents = np.bincount(where, minlength=len(present))
    sizes = np.bincount(where, part.num_bytes, minlength=len(present))
    for key, count, size in zip(present.tolist(), documents.tolist(), sizes.tolist(), strict=True):
        rest, stage = divmod(key, len(stage_names))
        source, lang = divmod(rest, len(lang_names))
        _add(result.outcomes, (source_names[source], lang_names[lang], stage_names[stage]),
             (count, int(size)))  # fmt: skip
    is_kept = stages == (stage_names.index(KEPT))
    for code in np.unique(sources):
        source = source_names[code]
        for kept in (False, True):
            some = (sources == code) & (is_kept == kept)
            counted = curves.histogram(part.num_bytes[some], part.num_bytes[some], LENGTHS)
            before = result.lengths.get((source, kept))
            result.lengths[source, kept] = before + counted if before else counted
        if source not in result.rules:
            result.rules[source] = [
                RuleCount(source, number, rule)
                for number, rule in enumerate(rules_for(source, part.corpus.rules))
            ]
        for count in result.rules[source]:
            if count.has_names:
                continue
            mine = part.mine(source, count.rule)
            if count.rule.of is not None:
                mine &= rules_module.broken(count.rule, part.columns)
            values = rules_module.numeric(part.columns[count.rule.signal])[mine]
            counted = curves.histogram(values)
            before = rough.get((source, count.number))
            rough[source, count.number] = before + counted if before else counted


def _add(sums: dict[Any, tuple[int, int]], key: Any, count: tuple[int, int]) -> None:
    before = sums.get(key, (0, 0))
    sums[key] = (before[0] + count[0], before[1] + count[1])


def _fit(count: RuleCount, corpus: Corpus, rough: Histogram) -> None:
    """Chooses the edges of a rule's histogram."""
    attribute, _, name = count.rule.signal.partition(".")
    kind = corpus.schema(attribute).field(name).type
    flags = curves.histogram(np.array([0.0, 1.0])).documents > 0
    count.is_flag = pa.types.is_boolean(kind) or (
        pa.types.is_integer(kind) and not rough.documents[~flags].any()
    )
    count.is_whole = count.is_flag or pa.types.is_integer(kind)
    if count.is_flag:
        count.axis = Axis(np.array([-0.5, 0.5, 1.5]), False)
    else:
        limits = (count.rule.minimum, count.rule.maximum)
        count.axis = curves.axis_for(rough, limits, count.is_whole)


# --- second pass ------------------------------------------------------------------------------


def _measure(part: Part, result: Scan) -> None:
    numbers = np.array([int(id[16:], 16) for id in part.ids], np.uint64)
    for source in sorted({part.sources[1][code] for code in np.unique(part.sources[0])}):
        counts = result.rules[source]
        broken = [
            part.mine(source, count.rule) & rules_module.broken(count.rule, part.columns)
            for count in counts
        ]
        times = np.sum(broken, axis=0) if broken else np.zeros(len(part.ids), np.int64)
        untouched = np.ones(len(part.ids), bool)
        for count, hit in zip(counts, broken, strict=True):
            mine = part.mine(source, count.rule)
            count.of = _plus(count.of, mine, part.num_bytes)
            count.alone = _plus(count.alone, hit, part.num_bytes)
            count.first = _plus(count.first, hit & untouched, part.num_bytes)
            count.only = _plus(count.only, hit & (times == 1), part.num_bytes)
            untouched &= ~hit
            column = part.columns[count.rule.signal]
            if count.has_names:
                _count_names(count, column, mine)
                values = np.full(len(part.ids), np.nan)
            else:
                values = rules_module.numeric(column)
                some = mine if count.rule.of is None else hit  # how alike the copies are
                _count_values(count, values[some], part.num_bytes[some])
            _sample(count, part, values, mine, hit, numbers)


def _plus(before: tuple[int, int], mask: np.ndarray, num_bytes: np.ndarray) -> tuple[int, int]:
    return before[0] + int(mask.sum()), before[1] + int(num_bytes[mask].sum())


def _count_names(count: RuleCount, column: pa.ChunkedArray, mine: np.ndarray) -> None:
    codes, names = _codes(column.filter(pa.array(mine)))
    for code, times in zip(*np.unique(codes, return_counts=True), strict=True):
        name = names[code]
        if name not in count.names and len(count.names) >= _MAX_NAMES:
            name = "(others)"
        count.names[name] += int(times)


def _count_values(count: RuleCount, values: np.ndarray, num_bytes: np.ndarray) -> None:
    assert count.axis is not None
    directions: list[Direction] = []
    if np.isfinite(count.rule.minimum):
        directions.append(MINIMUM)
    if np.isfinite(count.rule.maximum) or not directions:
        directions.append(MAXIMUM)
    for direction in directions:
        counted = curves.histogram(values, num_bytes, count.axis.edges, direction)
        before = count.histograms.get(direction)
        count.histograms[direction] = before + counted if before else counted


def _sample(
    count: RuleCount, part: Part, values: np.ndarray, mine: np.ndarray, hit: np.ndarray,
    numbers: np.ndarray,
) -> None:  # fmt: skip
    """Keeps the documents with the smallest hash, and those next to the limit, on both sides."""
    salt = np.uint64(hash63(f"{count.source}\0{count.rule.stage}\0{count.rule.reason}"))
    order = _mixed(numbers ^ salt)
    none = np.zeros(len(values))
    passed = mine & ~hit
    pools = {"dropped": (hit, none), "kept": (passed, none)}
    limits = [x for x in (count.rule.minimum, count.rule.maximum) if np.isfinite(x)]
    if limits and not count.is_flag and not count.has_names:
        with np.errstate(invalid="ignore"):
            distance = np.min([np.abs(values - limit) for limit in limits], axis=0)
        known = np.isfinite(distance)
        pools["dropped near"] = (hit & known, distance)
        pools["kept near"] = (passed & known, distance)
    for kind, (pool, distance) in pools.items():
        best = count.samples.setdefault(kind, [])
        for row in _smallest(pool, distance, order, SAMPLES):
            key = (float(distance[row]), int(order[row]))
            place = Place(part.shard, int(row))
            best.append((key, Sample(part.ids[row], place, float(values[row]), part.fate(row))))
        best.sort(key=lambda item: (item[0], item[1].id))
        del best[SAMPLES:]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """[documents] uint64: the finaliser of splitmix64, so that equal ids sort differently for
    different rules."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _smallest(pool: np.ndarray, distance: np.ndarray, order: np.ndarray, count: int) -> list[int]:
    """Rows of the pool with the smallest distance; of equally distant ones, the smallest order."""
    rows = np.flatnonzero(pool)
    if len(rows) > count:
        farthest = np.partition(distance[rows], count - 1)[count - 1]
        rows = rows[distance[rows] <= farthest]
    return rows[np.lexsort((order[rows], distance[rows]))[:count]].tolist()


# --- clusters ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Member:
    """A document that was dropped as a copy, with the similarity by which it was."""

    id: str
    place: Place
    stage: str
    value: float


@dataclasses.dataclass
class Clusters:
    """Copies by the document they were dropped for. `copies`: survivor -> how many."""

    copies: dict[str, int]
    members: dict[str, list[Member]]
    doubtful: list[tuple[str, Member]]

    def sizes(self) -> Mapping[int, int]:
        """Documents in a cluster, the survivor included -> how many clusters."""
        return Counter(count + 1 for count in self.copies.values())


def clusters(corpus: Corpus, largest: int = 5, random: int = 5, doubtful: int = 5) -> Clusters:
    """The clusters whose survivor lies in the shards looked at, members from anywhere: sizes of
    all, members of the `largest` and some `random` ones, and the `doubtful` least similar copies.

    Holds an id per cluster in memory: with very many, open the corpus with `max_shards`.
    """
    seen = set(corpus.shards)
    copies: Counter[str] = Counter()
    poorest: list[tuple[float, str, str, Member]] = []
    parts = range(corpus.documents.shards) if corpus.is_decided else range(0)
    for shard in parts:
        rows, table = _copies(corpus, shard, seen)
        of = table["of_id"]
        copies.update(of)
        near = [n for n, value in enumerate(table["value"]) if 0 < value < 1]
        near.sort(key=lambda n: (table["value"][n], table["id"][n]))
        for n in near[:doubtful]:
            poorest.append(
                (table["value"][n], table["id"][n], of[n], _member(table, n, shard, rows))
            )
        poorest.sort(key=lambda item: item[:3])
        del poorest[doubtful:]
    big = sorted(copies, key=lambda id: (-copies[id], id))[:largest]
    some = sorted(copies.keys() - set(big), key=lambda id: (hash63(id, purpose="cluster"), id))
    wanted = [*big, *some[:random]]
    members: dict[str, list[Member]] = {id: [] for id in wanted}
    for shard in parts if wanted else []:
        rows, table = _copies(corpus, shard, seen)
        for n, of_id in enumerate(table["of_id"]):
            if of_id in members:
                group = members[of_id]
                group.append(_member(table, n, shard, rows))
                group.sort(key=lambda member: (member.value, member.id))
                del group[SAMPLES:]
    return Clusters(dict(copies), members, [(of, member) for _, _, of, member in poorest])


def _copies(corpus: Corpus, shard: int, seen: set[int]) -> tuple[np.ndarray, dict[str, list]]:
    """The rows of a shard that were dropped for a document in the shards `seen`."""
    from data_beam.schema import shard_of

    names = ("id", "stage", "value", "of_id")
    columns = corpus.columns(shard, [f"{DECISION}.{name}" for name in names])
    rows = np.flatnonzero(columns[f"{DECISION}.of_id"].is_valid().to_numpy())
    table = {name: columns[f"{DECISION}.{name}"].take(pa.array(rows)).to_pylist() for name in names}
    if corpus.is_sampled:
        count = corpus.documents.shards
        some = [n for n, id in enumerate(table["of_id"]) if shard_of(id, count) in seen]
        rows, table = rows[some], {k: [v[n] for n in some] for k, v in table.items()}
    table["value"] = [np.nan if value is None else value for value in table["value"]]
    return rows, table


def _member(table: Mapping[str, list], n: int, shard: int, rows: np.ndarray) -> Member:
    place = Place(shard, int(rows[n]))
    return Member(table["id"][n], place, table["stage"][n], table["value"][n])
