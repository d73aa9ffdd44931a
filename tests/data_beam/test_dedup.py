"""The parts of the search for duplicates, without Beam: labels, buckets, equal texts, hops."""

import dataclasses
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_corpus import doc

from data_beam.dedup import blobs, buckets, components, equal, verify
from data_beam.dedup.local import collapse, refs, row_of, shard_of
from data_beam.dedup.near import NearDuplicates
from data_beam.kernels import labels
from internlm2_jax.errors import UserError

# --- labels -----------------------------------------------------------------------------------


def as_columns(some: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(some), ">u8").astype(np.uint64).reshape(-1, 5)


def test_the_newest_dump_is_best_then_the_newest_time_the_longest_the_smallest_id():
    base = doc("some text")._replace(id="5" * 32, dump="CC-MAIN-2019-04", timestamp=50)
    better = [
        base._replace(dump="CC-MAIN-2023-50", timestamp=0),
        base._replace(timestamp=51, text="short"),
        base._replace(text=base.text + "!", id="f" * 32),
        base._replace(id="4" * 32),
    ]
    for other in better:
        assert labels.label_of(other) < labels.label_of(base)
    assert labels.label_of(base)[-16:].hex() == base.id
    rows = as_columns([labels.label_of(one) for one in [base, *better]])
    assert labels.to_ids(rows[:, 3:]) == [one.id for one in [base, *better]]


@given(st.lists(st.tuples(st.integers(0, 999999), st.integers(0, 2**34), st.integers(1, 10**7)),
                min_size=2, max_size=30))  # fmt: skip
def test_the_short_preference_agrees_with_the_label_but_for_near_ties(rows):
    documents = [
        doc("x" * min(size, 50))._replace(dump=str(dump), timestamp=seconds)
        for dump, seconds, size in rows
    ]
    full = as_columns([labels.label_of(one) for one in documents])
    full[:, 2] = [labels.TOP - size for _, _, size in rows]
    short = labels.preference(full, np.zeros(len(full), np.uint64))
    for a, (dump_a, time_a, size_a) in enumerate(rows):
        for b, (dump_b, time_b, size_b) in enumerate(rows):
            key_a, key_b = (dump_a, time_a // 86400), (dump_b, time_b // 86400)
            if key_a > key_b or (key_a == key_b and size_a > 1.1 * size_b):
                assert short[a] < short[b]


@pytest.mark.parametrize("text", ["", " ", "a", " a  b\t\nc ", "a\u00a0b\u3000 c", "x\x1cy",
                                  "\u4e2d\n\u6587  x"])  # fmt: skip
def test_the_hash_of_a_text_ignores_white_space_alone(text):
    assert labels.text_hash(text) == labels.text_hash(" ".join(text.split()))
    assert labels.text_hash(text) == labels.text_hash("\n\t " + text + "\u2003")
    assert labels.text_hash(text) != labels.text_hash(text + ".")
    assert labels.text_hash("ab") != labels.text_hash("a b")


# --- equal texts ------------------------------------------------------------------------------


def random_rows(rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
    """labels, text, digest, signed of documents with many equal texts and equal signatures."""
    text = rng.integers(0, count // 3, count).astype(np.uint64)
    # Equal texts have equal words; some different texts too.
    digest = text // np.uint64(2)
    full = np.zeros((count, 5), np.uint64)
    full[:, 2] = rng.integers(0, 3, count)
    full[:, 3:] = rng.integers(0, 1 << 63, (count, 2)).astype(np.uint64)
    return full, np.stack([text, text], 1), np.stack([digest, digest], 1), digest % 5 > 0


@pytest.mark.parametrize("shards", [1, 4])
def test_equal_texts_and_words_whatever_the_shards(shards):
    """The best of each text, and one connected star per signature, by the plain definition."""
    rng = np.random.default_rng(0)
    full, text, digest, signed = random_rows(rng, 600)
    key = [tuple(row) for row in full.tolist()]
    home = rng.integers(0, shards, 600)
    tables, place, leaves = [], {}, []
    for shard in range(shards):
        rows = np.flatnonzero(home == shard)
        local = collapse(len(rows), np.arange(len(rows)), full[rows], text[rows], digest[rows],
                         signed[rows])  # fmt: skip
        place |= {int(ref): int(row) for ref, row in
                  zip(refs(shard, np.arange(len(rows))), rows, strict=True)}  # fmt: skip
        leaves += zip(rows.tolist(), rows[local.same_text].tolist(),
                      rows[local.same_words].tolist(), strict=True)  # fmt: skip
        tables.append(equal.text_records(shard, local))
    edges, copies = equal.compare_texts(np.concatenate(tables))

    copied = {place[ref] for ref in copies.tolist()} | {a for a, best, _ in leaves if a != best}
    best_of: dict[int, int] = {}
    for row in sorted(range(600), key=key.__getitem__):
        best_of.setdefault(int(text[row, 0]), row)
    assert copied == set(range(600)) - set(best_of.values())

    parent = {a: best for a, _, best in leaves}
    for left, right in zip(edges["node"].tolist(), edges["other"].tolist(), strict=True):
        # From the best of all to the best of a shard, which has no other edge.
        assert parent[place[right]] == place[right]
        parent[place[right]] = place[left]
    best_words: dict[int, int] = {}
    for row in sorted(range(600), key=key.__getitem__):
        best_words.setdefault(int(digest[row, 0]), row)
    for row in range(600):
        root = parent[parent[row]]
        assert root == best_words[int(digest[row, 0])]


# --- buckets ----------------------------------------------------------------------------------


def members_of(signatures: np.ndarray, seed: int = 0, bands: int = 16) -> np.ndarray:
    """Members with random worth and refs; equal rows of `signatures` get equal digests."""
    rng = np.random.default_rng(seed)
    _, digest = np.unique(signatures, axis=0, return_inverse=True)
    worth = rng.integers(0, 1 << 40, len(signatures)).astype(np.uint64)
    ref = np.arange(len(signatures), dtype=np.uint64)
    return buckets.band_members(signatures, worth, digest.astype(np.uint64), ref, bands, 8)


def noisy(rng: np.random.Generator, base: np.ndarray, copies: int, keep: float) -> np.ndarray:
    """Signatures that agree with `base` in each minimum with probability `keep`."""
    fresh = rng.integers(0, 1 << 16, (copies, base.shape[-1]), dtype=np.uint16)
    return np.where(rng.random(fresh.shape) < keep, base, fresh)


def as_set(pairs: np.ndarray) -> set[tuple[int, int]]:
    return set(zip(pairs["left"].tolist(), pairs["right"].tolist(), strict=True))


def test_pairs_depend_on_the_set_of_members_alone():
    """Not on their order, nor on how many shards send the same signature."""
    rng = np.random.default_rng(1)
    families = rng.integers(0, 1 << 16, (30, 128), dtype=np.uint16)
    members = members_of(np.concatenate([noisy(rng, one, 8, 0.9) for one in families]))
    found = buckets.candidates(members, 50)
    assert len(found.pairs) > 200
    again = members.copy()
    again["worth"] += 1 << 45  # a worse document with the same signature, in another shard
    again["ref"] += 1 << 32
    for order in range(3):
        shuffled = np.random.default_rng(order).permutation(np.concatenate([members, again]))
        assert as_set(buckets.candidates(shuffled, 50).pairs) == as_set(found.pairs)


def test_buckets_of_two_and_three_give_all_their_pairs():
    rng = np.random.default_rng(2)
    base = rng.integers(0, 1 << 16, (1, 128), dtype=np.uint16)
    for size in (2, 3):
        rows = np.repeat(base, size, axis=0)
        rows[:, 127] = range(size)  # equal in 15 bands
        pairs = as_set(buckets.candidates(members_of(rows), 100).pairs)
        assert {frozenset(pair) for pair in pairs} == {
            frozenset((a, b)) for a in range(size) for b in range(a)
        }


def test_the_better_one_comes_first():
    rng = np.random.default_rng(3)
    rows = noisy(rng, rng.integers(0, 1 << 16, (1, 128), dtype=np.uint16), 100, 0.9)
    members = members_of(rows)
    worth = dict(zip(members["ref"].tolist(), members["worth"].tolist(), strict=True))
    for left, right in as_set(buckets.candidates(members, 1000).pairs):
        assert worth[left] < worth[right]


def test_copies_meet_in_a_bucket_full_of_boilerplate():
    """3,000 unrelated documents share a band; the pairs of copies among them must still meet, most
    of them in this band alone, whether or not the bucket is over the limit."""
    rng = np.random.default_rng(4)
    rows = rng.integers(0, 1 << 16, (3000, 128), dtype=np.uint16)
    for pair in range(200):
        rows[2 * pair + 1] = noisy(rng, rows[2 * pair], 1, 0.9)
    rows[:, :8] = rows[0, :8]
    members = members_of(rows)[0::16]  # the first band only
    for limit, hot in ((10_000, 0), (100, 1)):
        found = buckets.candidates(members, limit)
        assert (found.hot, found.largest) == (hot, 3000)
        met = {frozenset(pair) for pair in as_set(found.pairs)}
        hits = sum(frozenset((2 * p, 2 * p + 1)) in met for p in range(200))
        assert hits >= 150, (limit, hits)
        assert len(found.pairs) <= 3 * 3000


def hot_bucket(count: int) -> tuple[float, int, np.ndarray]:
    """CPU seconds, peak bytes and pairs for `count` near-identical documents."""
    rng = np.random.default_rng(5)
    base = rng.integers(0, 1 << 16, (1, 128), dtype=np.uint16)
    rows = noisy(rng, base, count, 0.95)
    digest = np.arange(count, dtype=np.uint64)
    members = buckets.band_members(rows, digest, digest, digest, 16, 8)
    tracemalloc.start()
    start = time.process_time()
    pairs = buckets.candidates(members, 2000).pairs
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    values = np.concatenate([
        minhash_similarity(rows, pairs[start : start + 100_000])
        for start in range(0, len(pairs), 100_000)
    ])  # fmt: skip
    good = pairs[values >= 0.7]
    forest = components.local(components.edges(good["left"], good["right"]))
    assert len(forest) == count - 1  # all in one component
    return seconds, peak, pairs


def minhash_similarity(rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return (rows[pairs["left"].astype(int)] == rows[pairs["right"].astype(int)]).mean(axis=1)


@pytest.mark.parametrize("count", [28_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_a_hot_bucket_is_linear_in_time_and_memory(count):
    small_seconds, small_peak, small = hot_bucket(count // 4)
    seconds, peak, pairs = hot_bucket(count)
    assert len(pairs) < 16 * count and len(pairs) < 6 * len(small)
    assert peak < 5 * small_peak
    assert seconds < 9 * small_seconds


# --- hops and blobs ---------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 40))
def test_routed_records_arrive_once_at_their_destination(destinations, piece):
    table = np.empty(len(destinations), buckets.PAIR)
    table["left"], table["right"] = np.arange(len(table)), destinations
    arrived: dict[int, list[bytes]] = {}
    before = blobs.PIECE_BYTES
    try:
        blobs.PIECE_BYTES = piece
        for destination, content in blobs.route(table, np.array(destinations, int)):
            arrived.setdefault(destination, []).append(content)
            assert len(content) <= max(piece, table.itemsize)
    finally:
        blobs.PIECE_BYTES = before
    rows = [blobs.gather(pieces, buckets.PAIR) for pieces in arrived.values()]
    assert sum(map(len, rows)) == len(table)
    for destination, some in zip(arrived, rows, strict=True):
        assert set(some["right"].tolist()) == {destination}


@pytest.mark.parametrize("piece", [60, 300, 1 << 20])
def test_evidence_travels_with_every_pair(piece, monkeypatch):
    monkeypatch.setattr(blobs, "PIECE_BYTES", piece)
    rng = np.random.default_rng(0)
    pairs = np.empty(200, buckets.PAIR)
    pairs["left"] = refs(3, rng.integers(0, 20, 200))
    pairs["right"] = refs(0, rng.integers(0, 50, 200)) | rng.integers(0, 4, 200).astype(
        np.uint64) << np.uint64(32)  # fmt: skip
    pairs = buckets.distinct(pairs)
    lefts = np.unique(pairs["left"])
    content = {int(left): bytes(rng.integers(0, 256, 4 * rng.integers(0, 9), dtype=np.uint8))
               for left in lefts}  # fmt: skip
    evidence = np.frombuffer(b"".join(content[int(left)] for left in lefts), np.uint8)
    begins = np.append(0, np.cumsum([len(content[int(left)]) for left in lefts]))
    arrived = []
    for shard, blob in verify.send(pairs, evidence, begins):
        here, given_, lengths, index, rights = verify.unpack(blob)
        ends = np.cumsum(lengths)
        assert (shard_of(rights) == shard).all() and len(given_) == lengths.sum()
        for number, right in zip(index.tolist(), rights.tolist(), strict=True):
            left = int(here[number])
            mine = given_[ends[number] - lengths[number] : ends[number]].tobytes()
            assert mine == content[left]
            arrived.append((left, right))
    assert len(arrived) == len(pairs) and set(arrived) == as_set(pairs)


def test_the_highest_similarity_of_a_document_counts():
    table = np.array([(5, 0.7), (6, 0.9), (5, 0.8), (5, 0.75)], verify.SIMILARITY)
    assert verify.strongest(table).tolist() == [(5, np.float32(0.8)), (6, np.float32(0.9))]


def test_refs_hold_shard_and_row():
    made = refs(70_000, np.array([0, 1, (1 << 32) - 1]))
    assert shard_of(made).tolist() == [70_000] * 3
    assert row_of(made).tolist() == [0, 1, (1 << 32) - 1]


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"bands": 20}, "needs 160 hashes"), ({"threshold": 70}, "threshold 70"),
    ({"verify": "maybe"}, "verify 'maybe' is unknown"), ({"ngram": 0}, "at least 1"),
    ({"components": "all"}, "components 'all'"), ({"max_bucket": 1}, "max_bucket"),
])  # fmt: skip
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        NearDuplicates(**changes)


def test_settings_that_only_divide_the_work_do_not_change_the_key():
    near = NearDuplicates()
    other = dataclasses.replace(
        near, components="local", rounds=2, partition_bytes=1000, max_memory=1
    )
    assert other.result_settings() == near.result_settings()
    assert dataclasses.replace(near, threshold=0.8).result_settings() != near.result_settings()
