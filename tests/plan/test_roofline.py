"""Pods, their links, and the estimate: figures worked out by hand."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from internlm2_jax.chips import CHIPS, parse_topology
from internlm2_jax.errors import UserError
from internlm2_jax.plan import hlo, roofline
from internlm2_jax.plan.hlo import Collective, Loop, Program, Wait, Work
from internlm2_jax.plan.links import HOP_SECONDS, Links

V5P = CHIPS["v5p"]


def devices(shape, slices=1):
    coords = itertools.product(*(range(side) for side in reversed(shape)))
    return [
        SimpleNamespace(id=i, coords=tuple(reversed(c)), slice_index=s)
        for i, (s, c) in enumerate(itertools.product(range(slices), coords))
    ]


def collective(kind, groups, payload=0.0, sent=0.0, name="c", asynchronous=False, axes="fsdp"):
    groups = np.array(groups)
    return Collective(
        name, kind, axes, payload, sent, groups.shape[1], groups, asynchronous, hbm_bytes=0.0
    )


# --------------------------------------------------------------------------------- pods


def test_names_of_pods():
    pod = parse_topology("2xv5p:4x4x8")
    assert (pod.chip.name, pod.shape, pod.slices, pod.num_devices) == ("v5p", (4, 4, 8), 2, 256)
    assert (str(pod), pod.name) == ("2xv5p:4x4x8", "v5p:4x4x8")
    assert parse_topology("h100:1x8x8").num_devices == 64


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p:2x2x2", (False,) * 3),
        ("v5p:4x4x4", (True,) * 3),
        ("v5e:8x16", (False, True)),
        ("v6e:16x16", (True, True)),
    ],
)
def test_rings(name, wraps):
    assert parse_topology(name).wraps == wraps


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("v5p:3x4x4", ["does not exist", "the nearest is v5p:4x4x4 (64 chips)"]),
        ("v5e:16x17", ["does not exist", "v5e:16x16"]),
        ("v7x:4x4x4", ["no chip 'v7x'", "there are v4, v5e"]),
        ("v5:4x4x4", ["no chip 'v5'", "did you mean v5"]),
        ("h100:8", ["partitions x hosts x GPUs", "h100:1x1x8"]),
        ("h100:1x1x16", ["up to 8", "h100:1x2x8"]),
        ("a pod", ["not of the form CHIP:AxB"]),
    ],
)
def test_pods_that_do_not_exist(text, parts):
    with pytest.raises(UserError) as error:
        parse_topology(text)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- links


def test_a_whole_torus_uses_all_its_links():
    pod = parse_topology("v5p:4x4x4")
    links = Links(pod, devices(pod.shape))
    got = links.seconds(collective("all-gather", [range(64)], sent=6 * V5P.link))
    assert got == pytest.approx(1.0 + HOP_SECONDS * 6)


def test_one_ring_uses_two_links_and_a_line_one():
    pod = parse_topology("v5p:4x4x4")
    links = Links(pod, devices(pod.shape))
    ring, line = [[0, 1, 2, 3]], [[0, 1]]
    assert links.seconds(collective("all-gather", ring, sent=2 * V5P.link)) == pytest.approx(
        1.0 + HOP_SECONDS * 2
    )
    assert links.seconds(collective("reduce-scatter", line, sent=V5P.link)) == pytest.approx(
        1.0 + HOP_SECONDS
    )


def test_groups_of_the_same_devices_in_the_same_order_are_told_apart():
    pod = parse_topology("v5p:4x4x4")
    links = Links(pod, devices(pod.shape))
    whole = collective("all-gather", np.arange(64).reshape(1, 64), sent=6 * V5P.link)
    rings = collective("all-gather", np.arange(64).reshape(16, 4), sent=2 * V5P.link)
    for _ in range(2):  # known by then
        assert links.seconds(whole) == pytest.approx(1.0 + HOP_SECONDS * 6)
        assert links.seconds(rings) == pytest.approx(1.0 + HOP_SECONDS * 2)


def test_interleaved_groups_share_a_link():
    pod = parse_topology("v5p:4x4x4")
    links = Links(pod, devices(pod.shape))
    apart = collective("all-gather", [[0, 2], [1, 3]], sent=V5P.link)
    assert links.seconds(apart) == pytest.approx(2.0 + HOP_SECONDS)


def test_between_slices_the_network_counts():
    pod = parse_topology("2xv5p:2x2x1")
    links = Links(pod, devices(pod.shape, slices=2))
    across = collective("all-reduce", [[0, 4], [1, 5], [2, 6], [3, 7]], sent=V5P.network)
    assert links.medium(across) == "network"
    assert links.seconds(across) == pytest.approx(1.0, rel=1e-3)


def test_all_to_all_is_bound_by_the_middle_of_a_ring():
    pod = parse_topology("v5p:4x4x4")
    links = Links(pod, devices(pod.shape))
    got = links.seconds(collective("all-to-all", [[0, 1, 2, 3]], payload=2 * V5P.link))
    assert got == pytest.approx(1.0 + HOP_SECONDS * 2)  # 4 / 8 of the payload over each link


def test_permutations_pay_for_their_distance():
    pod = parse_topology("v5e:8x8")
    links = Links(pod, devices(pod.shape))
    chip = CHIPS["v5e"]
    near = links.seconds(collective("collective-permute", [[0, 1]], payload=chip.link))
    far = links.seconds(collective("collective-permute", [[0, 7]], payload=chip.link))
    assert far == pytest.approx(7 * near)


def test_gpus_within_and_between_hosts():
    pod = parse_topology("h100:1x2x8")
    links = Links(pod, [SimpleNamespace(id=i) for i in range(16)])
    chip = CHIPS["h100"]
    inside = collective("all-gather", [range(8)], sent=chip.link)
    assert links.medium(inside) == "nvlink"
    assert links.seconds(inside) == pytest.approx(1.0, rel=1e-3)
    # Two GPUs of two hosts: each takes the other's half over its own network card.
    across = collective("all-gather", [[0, 8], [1, 9]], sent=chip.network)
    assert links.medium(across) == "network"
    assert links.seconds(across) == pytest.approx(1.0, rel=1e-3)
    # All of both hosts: half the payload comes in over 8 cards, faster than NVLink passes it on.
    both = collective("all-gather", [range(16)], sent=chip.link)
    assert links.seconds(both) == pytest.approx(1.0, rel=1e-3)


# ----------------------------------------------------------------------------- estimate


def second(c: Collective) -> float:
    return c.sent


def work(seconds: float) -> Work:
    return Work("w", seconds * V5P.flops, 0.0)


def estimate(*events):
    return roofline.estimate(Program(tuple(events), ()), V5P, second)


def gather(seconds, name="g", asynchronous=True, axes="fsdp"):
    return collective(
        "all-gather", [[0, 1]], sent=seconds, name=name, asynchronous=asynchronous, axes=axes
    )


def test_a_synchronous_collective_counts_whole():
    got = estimate(work(3), gather(2, asynchronous=False))
    assert (got.compute, got.exposed, got.seconds) == (3, {"fsdp": 2}, 5)


def test_an_asynchronous_one_counts_as_far_as_nothing_hides_it():
    hidden = estimate(gather(2), work(3), Wait(("g",)))
    assert (hidden.exposed, hidden.seconds) == ({}, 3)
    longer = estimate(gather(5), work(3), Wait(("g",)))
    assert (longer.links, longer.exposed, longer.seconds) == ({"fsdp": 5}, {"fsdp": 2}, 5)


def test_collectives_of_one_axis_queue_and_of_two_do_not():
    same = estimate(gather(3, "a"), gather(3, "b"), work(3), Wait(("a",)), Wait(("b",)))
    assert same.exposed == {"fsdp": 3}
    other = estimate(
        gather(3, "a"), gather(3, "b", axes="tensor"), work(3), Wait(("a",)), Wait(("b",))
    )
    assert other.exposed == {}


def test_loops_repeat_their_second_round():
    # The gather of the next round is under way while this round computes.
    body = (Wait(("g",)), gather(2), work(3))
    got = estimate(gather(2), Loop(10, True, body), Wait(("g",)))
    assert got.exposed == {"fsdp": pytest.approx(2)}  # only the first is waited for
    sync = estimate(Loop(10, True, (gather(2, asynchronous=False), work(3))))
    assert (sync.exposed, sync.seconds) == ({"fsdp": pytest.approx(20)}, pytest.approx(50))


def test_memory_bound_work():
    events = (Work("w", V5P.flops, 2 * V5P.hbm_bandwidth),)
    got = roofline.estimate(Program(events, ()), V5P, second)
    assert (got.compute, got.memory, got.seconds, got.bound) == (1, 2, 2, "memory")
    assert hlo.Program(events, ()).hbm_bytes == 2 * V5P.hbm_bandwidth
