"""The books of the pages: names, holders, eviction."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st

from internlm2_jax.infer import cache as kv


def test_names_speak_of_all_that_comes_before():
    a = kv.names([1, 2, 3, 4, 5, 6, 7], 2)
    assert len(a) == 3  # the page that is not full has none
    assert kv.names([1, 2, 3, 4], 2) == a[:2]
    assert kv.names([9, 2, 3, 4], 2)[1] != a[1]  # equal pages after another beginning
    assert kv.names([1, 2, 3, 4], 2, b"rotated for 9")[0] != a[0]


def test_pages_are_found_shared_and_evicted():
    pool = kv.Pool(4)
    first = pool.take([], 3)
    pool.publish(first[0], b"a")
    pool.publish(first[1], b"b")
    assert pool.find([b"a", b"b", b"c"]) == first[:2]
    assert not pool.fits([], 2) and pool.fits(first[:2], 1)
    second = pool.take(first[:2], 1)
    assert pool.held == 4
    pool.release(first)
    assert pool.held == 3  # those that the second request holds
    pool.release(second)
    assert pool.held == 0 and pool.available == 4
    assert pool.find([b"a", b"b"]) == first[:2]  # kept until their room is needed
    assert not pool.fits(pool.find([b"a"]), 4)  # a page cannot be both shared and taken
    pool.take([], 3)  # the end of the text goes first
    assert pool.find([b"a", b"b"]) == first[:1]
    pool.forget()
    assert pool.find([b"a"]) == []
    assert pool.available == 1


@hypothesis.given(st.data())
def test_no_page_is_lost_or_given_twice(data):
    pool, held, number = kv.Pool(6), [], 0
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["take", "release", "publish", "forget"]))
        if action == "take":
            wanted = [b"%d" % data.draw(st.integers(0, 4)) for _ in range(2)]
            shared = pool.find(wanted)
            count = data.draw(st.integers(0, 4))
            if pool.fits(shared, count):
                held.append(pool.take(shared, count))
        elif action == "release" and held:
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif action == "publish" and held and held[-1]:
            pool.publish(held[-1][-1], b"%d" % (number % 5))
            number += 1
        elif action == "forget":
            pool.forget()
        alive = {page for pages in held for page in pages}
        assert pool.held == len(alive)
        assert pool.available == 6 - len(alive)
    for pages in held:
        pool.release(pages)
    assert pool.held == 0 and sorted(pool.take([], 6)) == list(range(6))
