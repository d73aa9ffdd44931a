"""Candidates of a search: what is tried, in which order, and what is written."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from internlm2_jax import config
from internlm2_jax.chips import GIB, parse_topology
from internlm2_jax.errors import UserError
from internlm2_jax.plan import report, search
from internlm2_jax.plan.compile import Compiled
from internlm2_jax.plan.planners import planned
from internlm2_jax.sharding import Layout

SEVEN = Path(__file__).parents[2] / "experiments" / "pretraining" / "internlm2_7b.py"


@pytest.fixture(scope="module")
def short():
    devices = jax.devices()
    pipeline = config.build(config.load(SEVEN, ["layout=fsdp=8"]))
    return planned(pipeline, devices, only=("pretrain/short",))[0]


def test_layouts_use_every_chip_and_divide_the_model(short):
    found = list(search.layouts(short, parse_topology("v5p:4x4x4")))
    assert Layout(fsdp=64) in found and Layout(fsdp=16, tensor=4) in found
    assert all(layout.num_devices == 64 and layout.context == 1 for layout in found)
    two = list(search.layouts(short, parse_topology("2xv5p:4x4x4")))
    assert all(layout.data % 2 == 0 for layout in two)  # only `data` crosses slices


def test_candidates_keep_the_batch_and_come_likely_first(short):
    found = search.candidates(short, parse_topology("v5p:4x4x4"))
    assert all(short.rows % (c.accumulate * c.layout.batch_ways) == 0 for c in found)
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    assert found[0].layout.tensor == 1  # cutting heads of a 7B costs more than it gives


def test_what_cannot_fit_is_not_tried(short):
    small = search.candidates(short, parse_topology("v5e:8x8"))
    assert all(c.bytes < search.SLACK * 15.75 * GIB for c in small)
    with pytest.raises(UserError, match=r"fits v5e:2x2 in no layout: .* take 93 GB"):
        search.candidates(short, parse_topology("v5e:2x2"))


def test_the_winner_is_a_file_that_run_reads(short, tmp_path):
    pod = parse_topology("v5p:4x4x4")
    plan = report.make(short, pod, Compiled(None, 100 * GIB, None, 1.0), [])
    assert "does not fit" in search.table([plan])
    path = tmp_path / "best.overrides"
    search.write_overrides(plan, path)
    lines = config.read_overrides(path)
    assert "pretrain.layout=fsdp=8" in lines and "pretrain.remat=full" in lines
    assert config.build(config.load(SEVEN, lines)).stages["pretrain"].keywords["layout"] == "fsdp=8"


def test_overrides_that_are_not_there():
    with pytest.raises(UserError, match="cannot read overrides from nowhere"):
        config.read_overrides("nowhere")
