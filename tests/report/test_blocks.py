"""Numbers as text."""

from __future__ import annotations

import pytest

from internlm2_jax.report.blocks import (
    clip,
    duration,
    megabytes,
    num,
    percent,
    pretty,
    share,
    size,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (float("inf"), "∞"), (0, "0"), (1234567, "1,234,567"),
     (2.7184, "2.72"), (-0.0314, "−0.0314"), (12345.6, "12,346"), (0.00031, "3.1 × 10⁻⁴"),
     (99.96, "100.0"), (1e-12, "1 × 10⁻¹²")],
)  # fmt: skip
def test_num(value, text):
    assert num(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (0.5, "50 %"), (0.051, "5.1 %"), (0, "0 %"), (1, "100 %")]
)
def test_percent(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.4567, "45.7 %"), (0.0512, "5.1 %"),
     (0.000423, "0.042 %"), (3e-7, "< 0.001 %")],
)  # fmt: skip
def test_share_tells_small_ones_apart(value, text):
    assert share(value) == text


def test_sizes_of_any_size():
    assert [size(n) for n in (None, 12, 1500, 64.2e6, 3.21e9, 1.5e15)] == [
        "–", "12 B", "1.50 kB", "64.2 MB", "3.21 GB", "1,500 TB",
    ]  # fmt: skip


def test_sizes_times_and_names():
    assert [megabytes(n) for n in (64.2e6, 400e3, 805, None)] == [
        "64.2 MB", "400 kB", "805 B", "–",
    ]  # fmt: skip
    assert [duration(s) for s in (3.21, 388.1, 7620)] == ["3.2 s", "6 min 28 s", "2 h 07 min"]
    assert [pretty(n) for n in ("ppo_round_1", "sft", "")] == ["PPO round 1", "SFT", ""]
    assert clip("a" * 10, 4) == "aaaa … (6 more characters)"
