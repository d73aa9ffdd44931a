"""A batch depends on its step and the settings alone; weights and epochs are kept."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from internlm2_jax.data.packing import PackedSource
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.errors import UserError


class Rows:
    """`count` rows of one source that carry their own number."""

    def __init__(self, count: int, source: int = 0):
        self.count, self.source = count, source

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": np.full(4, index, np.int32), "which": np.array(self.source)}


SOURCES = {"code": Rows(300, 0), "text": Rows(150, 1), "tasks": Rows(40, 2)}
WEIGHTS = {"code": 0.6, "text": 0.3, "tasks": 0.1}


def rows(batches, first, last):
    """(source, row) of each row of the steps, in order."""
    found = [batches(step) for step in range(first, last)]
    return [
        (int(s), int(t))
        for batch in found
        for s, t in zip(batch["which"], batch["tokens"][:, 0], strict=True)
    ]


def test_a_batch_does_not_depend_on_what_was_read_before():
    first = Batches(SOURCES, WEIGHTS, batch_size=8, seed=3)
    forward = [first(step) for step in range(40)]
    resumed = Batches(SOURCES, WEIGHTS, batch_size=8, seed=3)
    for step in [39, 20, 0, 21, 20]:
        for name, array in resumed(step).items():
            np.testing.assert_array_equal(array, forward[step][name])
    for step, batch in zip(range(5), first, strict=False):
        np.testing.assert_array_equal(batch["tokens"], forward[step]["tokens"])


def test_the_same_batches_through_grain():
    batches = Batches(SOURCES, WEIGHTS, batch_size=8, seed=3)
    found = list(batches.dataset(5).to_iter_dataset())
    assert len(found) == 5
    for step, batch in enumerate(found):
        np.testing.assert_array_equal(batch["tokens"], batches(step)["tokens"])


def test_shapes_and_types():
    batch = Batches(SOURCES, WEIGHTS, batch_size=8, seed=0)(1_000_000)
    assert batch["tokens"].shape == (8, 4) and batch["tokens"].dtype == np.int32
    assert batch["which"].shape == (8,)


def test_every_row_once_an_epoch_in_a_new_order():
    batches = Batches({"only": Rows(30)}, batch_size=10, seed=0)
    epochs = [[t for _, t in rows(batches, 3 * e, 3 * e + 3)] for e in range(4)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(30))


def test_every_row_once_an_epoch_in_a_mixture():
    seen = rows(Batches(SOURCES, WEIGHTS, batch_size=10, seed=0), 0, 60)
    for source in SOURCES.values():
        own = [t for s, t in seen if s == source.source]
        assert len(own) > source.count
        for start in range(0, len(own) - source.count + 1, source.count):
            assert sorted(own[start : start + source.count]) == list(range(source.count))


@pytest.mark.parametrize(
    "weights",
    [WEIGHTS, {"code": 7, "text": 2, "tasks": 1}, {"code": 1, "text": 1 / 3, "tasks": 1e-3}],
)
def test_weights_are_kept(weights):
    batches = Batches(SOURCES, weights, batch_size=100, seed=0)
    counts = Counter(s for s, _ in rows(batches, 0, 40))
    for name, source in SOURCES.items():
        share = weights[name] / sum(weights.values())
        assert abs(counts[source.source] - 4_000 * share) <= 0.005 * 4_000 * share + 1
    assert batches.weights[name] == pytest.approx(share)


def test_no_long_run_without_a_source():
    sources = [s for s, _ in rows(Batches(SOURCES, WEIGHTS, batch_size=20, seed=0), 0, 50)]
    for start in range(0, 1000, 20):
        assert 1 <= sources[start : start + 20].count(2) <= 3


def test_seeds():
    def order(seed, **sources):
        return rows(Batches(sources or SOURCES, batch_size=8, seed=seed), 0, 10)

    assert order(1) == order(1)
    assert order(1) != order(2)
    # Two sources of one length do not go in step, and a source keeps its order beside others.
    twins = order(1, a=Rows(40, 0), b=Rows(40, 1))
    a, b = ([t for s, t in twins if s == k] for k in (0, 1))
    assert a != b
    alone = [t for _, t in order(1, a=Rows(40, 0))]
    assert a == alone[: len(a)]


def test_weight_zero_leaves_a_source_out():
    batches = Batches(SOURCES, {"code": 1, "text": 0, "tasks": 1}, batch_size=10, seed=0)
    assert Counter(s for s, _ in rows(batches, 0, 10)) == {0: 50, 2: 50}


@pytest.mark.parametrize("processes", [2, 4])
def test_parts_join_to_the_whole_batch(processes):
    """The cursor is the step: processes may come and go in the middle of a run."""
    whole = Batches(SOURCES, WEIGHTS, batch_size=8, seed=5)
    readers = [Batches(SOURCES, WEIGHTS, batch_size=8, seed=5) for _ in range(processes)]
    for step in (0, 1, 17):
        parts = [
            reader(step, slice(p * 8 // processes, (p + 1) * 8 // processes))
            for p, reader in enumerate(readers)
        ]
        for name, array in whole(step).items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)


def test_rows_carry_their_source():
    batches = Batches(SOURCES, WEIGHTS, batch_size=50, seed=0)
    assert batches.names == ["code", "tasks", "text"]
    batch = batches(3)
    assert batch["source"].dtype == np.int32
    names = [batches.names[i] for i in batch["source"]]
    assert [SOURCES[name].source for name in names] == batch["which"].tolist()


def test_a_ramp_takes_the_same_rows_in_smaller_batches():
    plain = Batches(SOURCES, WEIGHTS, batch_size=1, seed=2)
    ramped = Batches(SOURCES, WEIGHTS, batch_size=8, ramp=[(3, 2), (2, 4)], seed=2)
    assert [ramped.size(step) for step in range(7)] == [2, 2, 2, 4, 4, 8, 8]
    assert [ramped.first_row(step) for step in range(7)] == [0, 2, 4, 6, 10, 14, 22]
    taken = rows(ramped, 0, 7)
    assert taken == rows(plain, 0, 30)
    assert rows(ramped, 5, 6) == taken[14:22]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"code": 1, "txt": 1, "tasks": 1}, "'text' is in only one of them"),
        ({"code": -1, "text": 1, "tasks": 1}, "weight of source 'code' is -1"),
        ({"code": float("nan"), "text": 1, "tasks": 1}, "weight of source 'code' is nan"),
        ({"code": 0, "text": 0, "tasks": 0}, "no source has a weight above 0"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(UserError, match=message):
        Batches(SOURCES, weights, batch_size=8, seed=0)


def test_bad_sizes():
    with pytest.raises(UserError, match="source 'empty' has no rows"):
        Batches({"empty": Rows(0)}, batch_size=8, seed=0)
    with pytest.raises(UserError, match="batch_size is 4 for 0 steps"):
        Batches(SOURCES, batch_size=8, seed=0, ramp=[(0, 4)])
    with pytest.raises(UserError, match="batch_size is 0"):
        Batches(SOURCES, batch_size=0, seed=0)


def test_packed_rows_through_the_pipeline():
    lengths = np.full(64, 17)
    source = PackedSource(SimpleNamespace(tokens=np.arange(64 * 17), lengths=lengths), 32)
    batch = Batches({"s": source}, batch_size=4, seed=0)(0)
    assert {n: a.shape for n, a in batch.items()} == dict.fromkeys(
        ["tokens", "targets", "segment_ids", "positions", "loss_mask"], (4, 32)
    ) | {"source": (4,)}
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
