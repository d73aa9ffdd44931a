"""Candidate pairs from locality-sensitive hashing: who is compared with whom.

Documents that agree in a band form a bucket. Comparing all pairs of a bucket is quadratic, and
comparing all with one member misses the copies that a bucket of boilerplate holds besides. So a
bucket of more than two is also read as a tree: eight minima from outside the band, a byte each,
divide it finer and finer, and every group of the tree gives a star around its preferred member. A
chain through the members in the tree's order links neighbours. That is linear in the bucket's size,
and depends on the set of its members alone, not on their order, place or number per shard.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_beam.kernels import minhash
from data_beam.kernels.labels import order, run_starts

# One member of one bucket. `digest` stands for the whole signature, `worth` sorts the better
# document first, `ref` says where it lies.
MEMBER = np.dtype(
    [("key", "<u8"), ("split", "<u8"), ("worth", "<u8"), ("digest", "<u8"), ("ref", "<u8")]
)
# A better document and one to compare with it.
PAIR = np.dtype([("left", "<u8"), ("right", "<u8")])
_SPLIT_ROWS = 8
# Bytes of `split` that the groups of the tree agree in.
_DEPTHS = (0, 1, 2, 4, 8)


class Candidates(NamedTuple):
    pairs: np.ndarray  # distinct
    hot: int  # buckets of more than `max_bucket` distinct signatures
    largest: int  # distinct signatures of the largest bucket


def band_members(
    signatures: np.ndarray, worth: np.ndarray, digest: np.ndarray, ref: np.ndarray,
    bands: int, rows: int,
) -> np.ndarray:  # fmt: skip
    """[D x bands] MEMBER, from compact signatures [D, num_perm]."""
    count, num_perm = signatures.shape
    table = np.empty((count, bands), MEMBER)
    table["key"] = minhash.band_keys(signatures, bands, rows)
    bytes_ = (signatures & 0xFF).astype(np.uint64)
    for band in range(bands):
        split = np.zeros(count, np.uint64)
        for step in range(_SPLIT_ROWS):
            # The rows after the band, round the end: where there are no others, the band's own.
            split = split << np.uint64(8) | bytes_[:, ((band + 1) * rows + step) % num_perm]
        table["split"][:, band] = split
    for name, values in (("worth", worth), ("digest", digest), ("ref", ref)):
        table[name] = values[:, None]
    return table.reshape(-1)


def candidates(members: np.ndarray, max_bucket: int) -> Candidates:
    """The pairs of whole buckets. A group of the tree with more than `max_bucket` members gives no
    star, only its finer groups do, down to the finest, which always does."""
    members = _crowded(members)
    key, split = members["key"], members["split"]
    rank = order((members["worth"], members["digest"]))
    best = np.empty(len(members), np.int64)
    best[rank] = np.arange(len(members))  # the smaller the better
    first = run_starts(key)
    sizes = np.diff(np.append(np.flatnonzero(first), len(key)))
    pairs = [_chain(members, best, np.flatnonzero(~first))]
    rows = np.arange(len(members))
    for depth in _DEPTHS:
        prefix = split[rows] >> np.uint64(64 - 8 * depth) if depth else np.zeros(len(rows))
        starts = np.flatnonzero(run_starts(key[rows], prefix))
        counts = np.diff(np.append(starts, len(rows)))
        if not len(starts):
            break
        centre = np.repeat(rank[np.minimum.reduceat(best[rows], starts)], counts)
        starred = np.repeat((counts <= max_bucket) | (depth == _DEPTHS[-1]), counts)
        starred &= centre != rows
        pairs.append(_pairs(members, centre[starred], rows[starred]))
        # A group of two has been compared, whatever finer groups it has.
        rows = rows[np.repeat(counts > 2, counts)]
    return Candidates(
        distinct(np.concatenate(pairs)), int((sizes > max_bucket).sum()), int(sizes.max(initial=0))
    )


def _crowded(members: np.ndarray) -> np.ndarray:
    """Members of buckets with two or more distinct signatures, one member per signature, sorted by
    bucket and by the order of the tree."""
    members = members[np.argsort(members["key"])]
    first = run_starts(members["key"])
    alone = first & np.append(first[1:], True)
    members = members[~alone]
    members = members[order([members[name] for name in ("key", "digest", "worth", "ref")])]
    members = members[run_starts(members["key"], members["digest"])]
    first = run_starts(members["key"])
    members = members[~(first & np.append(first[1:], True))] if len(members) else members
    return members[order([members[name] for name in ("key", "split", "worth", "digest")])]


def _chain(members: np.ndarray, best: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Each of `rows` with the member before it, the better one first."""
    swap = best[rows] < best[rows - 1]
    return _pairs(members, np.where(swap, rows, rows - 1), np.where(swap, rows - 1, rows))


def _pairs(members: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    table = np.empty(len(left), PAIR)
    table["left"], table["right"] = members["ref"][left], members["ref"][right]
    return table


def distinct(pairs: np.ndarray) -> np.ndarray:
    """Sorted, each pair once."""
    pairs = pairs[order((pairs["left"], pairs["right"]))]
    return pairs[run_starts(pairs["left"], pairs["right"])]
