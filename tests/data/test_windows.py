"""Rows of a corpus on the disk: every transition once, an order of the place alone, few windows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from token_folder import write_tokens

from internlm2_jax.data import mixture
from internlm2_jax.data.manifest import TokenReader, TokenSource, open_split
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.windows import Order, WindowedSource, count_long
from internlm2_jax.errors import UserError

LENGTHS = np.random.default_rng(0).integers(2, 70, 400)
VOCAB = int(LENGTHS.sum()) + 1


def write(folder, lengths=LENGTHS, shards=3):
    """Documents with the tokens 0, 1, 2, ... through all of them, so that a token is a place."""
    documents = np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1])
    return write_tokens(folder, {"train": {"text": documents}}, vocab_size=VOCAB, shards=shards)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def reader(folder):
    return TokenReader(folder, "train", "text")


def transitions(rows):
    """(token, next token) of every position that counts."""
    return Counter(
        pair
        for row in rows
        for pair, counts in zip(
            zip(row["tokens"].tolist(), row["targets"].tolist(), strict=True),
            row["loss_mask"],
            strict=True,
        )
        if counts
    )


def expected(lengths=LENGTHS):
    ends = set((np.cumsum(lengths) - 1).tolist())
    return Counter((t, t + 1) for t in range(int(lengths.sum())) if t not in ends)


@pytest.mark.parametrize("window_tokens", [1, 900, 3000, 10**9])
def test_every_transition_once(reader, window_tokens):
    source = WindowedSource(reader, 64, window_tokens=window_tokens, kept=2)
    assert transitions(source[row] for row in range(len(source))) == expected()
    # Less than a row is empty in each window.
    windows = len(source.first_row) - 1
    assert len(source) <= (LENGTHS.sum() - len(LENGTHS)) / 64 + windows


def test_rows_are_counted_without_reading(reader, monkeypatch):
    monkeypatch.setattr(TokenReader, "_record", lambda *_: pytest.fail("read a record"))
    assert len(WindowedSource(reader, 64, window_tokens=900)) > 100


def test_no_more_windows_in_memory_than_kept(reader):
    source = WindowedSource(reader, 32, window_tokens=900, kept=3)
    order = Order(source, 0)
    opened = []
    real, source._window = source._window, lambda n: opened.append(n) or real(n)
    for place in range(2 * len(source)):
        source[order(place)]
        assert len(source._windows) <= 3
    # Of each three windows all rows are taken before the next: two epochs read each window twice.
    loads = [n for i, n in enumerate(opened) if n not in opened[max(0, i - 400) : i]]
    assert len(loads) <= 2 * (len(source.first_row) - 1) + 3


def test_an_epoch_has_every_row_once_in_a_new_order(reader):
    source = WindowedSource(reader, 32, window_tokens=900, kept=3)
    order = Order(source, 5)
    count = len(source)
    epochs = [[order(e * count + i) for i in range(count)] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert [order(place) for place in (count + 3, 1, 0)] == [
        epochs[1][3], epochs[0][1], epochs[0][0]
    ]  # fmt: skip
    assert [Order(source, 6)(i) for i in range(count)] != epochs[0]
    # Neighbours come from different windows, not from one after the other.
    window = np.searchsorted(source.first_row, epochs[0][:40], side="right")
    assert len(set(window.tolist())) == 3


def test_batches_from_the_disk_and_from_memory_together(folder, reader):
    loaded = {"text": TokenSource(folder, "train", "text")}
    sources = {
        "disk": WindowedSource(reader, 64, window_tokens=900, kept=3),
        "memory": mixture.Rows(64, 8, 32).pack("text", loaded),
    }
    batches = Batches(sources, {"disk": 3, "memory": 1}, batch_size=8, seed=1)
    forward = [batches(step) for step in range(12)]
    again = Batches(sources, {"disk": 3, "memory": 1}, batch_size=8, seed=1)
    for step in (11, 4, 0):
        for name, array in again(step).items():
            np.testing.assert_array_equal(array, forward[step][name])
    assert sum(int((b["source"] == 0).sum()) for b in forward) == 72


def test_views(folder, reader, tmp_path):
    short = mixture.Rows(64, short_length=8, long_length=50, window_tokens=900, folder=tmp_path)
    cut = short.pack("short/text", {"text": reader})
    rows = [cut[row] for row in range(len(cut))]
    assert transitions(rows) == expected()
    assert max(int(row["positions"].max()) for row in rows) == 7
    long = short.pack("long/text", {"text": reader})
    starts = np.cumsum(LENGTHS) - LENGTHS
    wanted = Counter(
        (int(t), int(t) + 1)
        for s, n in zip(starts, LENGTHS, strict=True)
        if n >= 50
        for t in range(s, s + n - 1)
    )
    assert transitions(long[row] for row in range(len(long))) == wanted
    # None is that long: all of them, as in memory.
    everything = mixture.Rows(64, 8, 10**6, folder=tmp_path).pack("long/text", {"text": reader})
    assert transitions(everything[row] for row in range(len(everything))) == expected()


def test_long_documents_are_counted_once(reader, tmp_path, monkeypatch):
    path = tmp_path / "counts.npy"
    counts = count_long(reader, 50, path)
    assert counts.sum(axis=0).tolist() == [(LENGTHS >= 50).sum(), LENGTHS[LENGTHS >= 50].sum()]
    with monkeypatch.context() as patched:
        patched.setattr(TokenReader, "records", lambda *_: pytest.fail("read again"))
        np.testing.assert_array_equal(count_long(reader, 50, path), counts)
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(count_long(reader, 50, path), counts)


def test_small_sources_are_kept_in_memory(folder):
    tokens = int(LENGTHS.sum())
    assert isinstance(open_split(folder, "train", in_memory=tokens)["text"], TokenSource)
    assert isinstance(open_split(folder, "train", in_memory=tokens - 1)["text"], TokenReader)


def test_mistakes_and_damage(reader, tmp_path):
    with pytest.raises(UserError, match="window_tokens is 0 and 16 windows"):
        WindowedSource(reader, 64, window_tokens=0)
    lengths = np.array([5, 0, 7])
    source = WindowedSource(TokenReader(write(tmp_path, lengths, shards=1), "train", "text"), 8)
    with pytest.raises(UserError, match=r"records 0 to 1 do not hold the transitions"):
        source[0]
