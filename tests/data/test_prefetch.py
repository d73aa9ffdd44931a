"""Made ahead, bounded, in order from anywhere; errors arrive where their step is asked for."""

from __future__ import annotations

import threading
import time

import pytest

from internlm2_jax.data.prefetch import Prefetch
from internlm2_jax.errors import UserError


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_makes_ahead_but_not_further_than_its_depth_and_stops_at_the_end():
    made = []
    with Prefetch(lambda step: made.append(step) or step * 10, 6, depth=2) as prefetch:
        assert prefetch(0) == 0
        until(lambda: made == [0, 1, 2])
        time.sleep(0.02)
        assert made == [0, 1, 2]
        assert [prefetch(step) for step in range(1, 6)] == [10, 20, 30, 40, 50]
        until(lambda: len(made) == 6)
    assert made == [0, 1, 2, 3, 4, 5]


def test_goes_on_from_any_step():
    with Prefetch(lambda step: step, 100, depth=3) as prefetch:
        assert [prefetch(s) for s in (40, 41, 42, 7, 8, 99, 98)] == [40, 41, 42, 7, 8, 99, 98]


def test_other_arguments_start_anew():
    made = []
    with Prefetch(lambda step, skipped: made.append((step, skipped)) or step + skipped, 9) as fetch:
        assert [fetch(2, 0), fetch(3, 0), fetch(4, 5), fetch(5, 5)] == [2, 3, 9, 10]
    assert made.count((4, 5)) == 1


def test_an_error_is_raised_for_its_own_step():
    def make(step):
        if step == 2:
            raise UserError("shard 7 is damaged")
        return step

    with Prefetch(make, 5) as prefetch:
        assert [prefetch(0), prefetch(1)] == [0, 1]
        with pytest.raises(UserError, match="shard 7 is damaged"):
            prefetch(2)
        assert prefetch(3) == 3


def test_counts_the_time_spent_waiting():
    gate = threading.Event()
    with Prefetch(lambda step: gate.wait(10), 2, depth=1) as prefetch:
        threading.Timer(0.1, gate.set).start()
        prefetch(0)
        waited = prefetch.waited_s
        assert 0.05 < waited < 5
        until(lambda: prefetch._ahead[0][1].done())
        prefetch(1)
        assert prefetch.waited_s - waited < 0.05


def test_closing_ends_the_thread():
    prefetch = Prefetch(lambda step: step, 1000, depth=4)
    prefetch(0)
    prefetch.close()
    assert not any(t.name.startswith("prefetch") for t in threading.enumerate())


def test_bad_depth():
    with pytest.raises(UserError, match="depth is 0"):
        Prefetch(lambda step: step, 3, depth=0)
