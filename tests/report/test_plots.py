"""Plots: colours that can be read, labels that do not meet, curves that say what the data say."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from internlm2_jax.report import curves, plots, svg
from internlm2_jax.report.load import Record, Series, series

CSS = (Path(svg.__file__).parent / "page.css").read_text()


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_colours_have_contrast_in_light_dark_and_print():
    themes = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    assert len(themes) == 3
    for theme in themes:
        values = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        paper = luminance(values["paper"])
        for name in ["ink", "muted", *(f"c{i}" for i in range(6))]:
            bright, dark = sorted([luminance(values[name]), paper], reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (name, values[name])


def test_stand_in_colours_are_those_of_the_light_page():
    light = dict(re.findall(r"--(\w+): (#\w{6})", CSS))
    assert [light[f"c{i}"] for i in range(6)] == list(svg.COLOURS)


def drawn(draw) -> str:
    return svg.picture("title", "what it shows", "file", draw).narrow


def line(values, label: str, colour: int = 0) -> curves.Line:
    return curves.Line(Series(np.arange(len(values)) * 1.0, np.array(values)), label, colour)


def label_heights(text: str, names: list[str]) -> list[float]:
    """y of each named text in the SVG, in pixels from the top."""
    found = []
    for name in names:
        block = re.search(rf"<text([^>]*)>{name}</text>", text)[1]
        found.append(float(re.search(r"(?:translate\([-\d.]+ |\by=\")([-\d.]+)", block)[1]))
    return found


def test_end_labels_of_equal_lines_are_pushed_apart():
    lines = [line([3, 1.0 + i / 1000], f"name{i}", i) for i in range(4)]
    text = drawn(curves.line_chart(lines, "step", "loss"))
    heights = sorted(label_heights(text, [f"name{i}" for i in range(4)]))
    assert min(b - a for a, b in pairwise(heights)) >= svg.TEXT


def test_svg_uses_the_pages_colours_and_no_fixed_ones():
    text = drawn(curves.line_chart([line([3, 2, 1], "train")], "step", "loss"))
    assert "var(--c0)" in text
    assert "var(--muted)" in text
    assert not set(re.findall(r"#[0-9a-f]{6}\b", text)) & set(svg.COLOURS)
    assert "DejaVu" not in text


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0, 0.0, 0.0]])
def test_flat_and_single_values_can_be_drawn(values):
    assert "<path" in drawn(curves.line_chart([line(values, "x")], "step", "loss", bottom=None))
    groups = [("chosen", np.array(values)), ("rejected", np.array(values))]
    assert "<path" in drawn(plots.histogram(groups, "score"))


def bars(text: str, colour: int) -> int:
    return len(
        re.findall(rf'<path d="[^"]*" clip-path="[^"]*" style="fill: var\(--c{colour}\)', text)
    )


@pytest.mark.parametrize("log", [False, True])
def test_bars_outside_the_limits_have_the_other_colour(log):
    edges, counts = np.array([1.0, 2, 3, 4, 5, 6]), np.array([5, 0, 100_000, 7, 2])
    text = drawn(plots.binned(edges, counts, "value", "documents", limits=(3, 5), log=log))
    assert (bars(text, 0), bars(text, 1)) == (2, 2), "an empty bin is no bar"
    assert "cut-off 3<" in text and "cut-off 5<" in text
    free = drawn(plots.binned(edges, counts, "value", "documents"))
    assert (bars(free, 0), bars(free, 1)) == (4, 0) and "cut-off" not in free


def test_whole_numbers_in_the_middle_of_their_bins_are_told_apart():
    edges = np.arange(4.0) - 0.5
    text = drawn(plots.binned(edges, np.array([4, 4, 4]), "value", "documents", limits=(1, 9)))
    assert (bars(text, 0), bars(text, 1)) == (2, 1)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_share_curves_name_their_lines_and_the_cut_off(log, small):
    x, y = np.array([1.0, 10, 100]), np.array([0.0, 0.004, 1.0])
    lines = [plots.Shares("documents", y), plots.Shares("bytes", y / 2, dashed=True)]
    draw = plots.share_curves(x, lines, "cut", "dropped", cut=10, log=log, small=small)
    text = drawn(draw)
    for name in ("── documents", "╌╌ bytes", "cut-off 10", "100 %", "0.1 %" if small else "25 %"):
        assert name in text, name
    assert "stroke-dasharray" in text


def test_a_key_of_many_series_breaks_into_lines():
    names = [f"a rather long model name {i}" for i in range(8)]
    dots = [("row", [(name, 0.1 * i) for i, name in enumerate(names)])]
    text = drawn(plots.dot_chart(dots, "share"))
    assert all(name in text for name in names)


def test_smoothing_keeps_constants_and_ends():
    flat = Series(np.arange(9.0), np.full(9, 2.0))
    np.testing.assert_allclose(flat.smooth(5).y, 2.0)
    assert not Series(np.array([]), np.array([])).smooth(3)
    ramp = Series(np.arange(9.0), np.arange(9.0))
    np.testing.assert_allclose(ramp.smooth(3).y, [0.5, 1, 2, 3, 4, 5, 6, 7, 7.5])


def test_a_step_logged_twice_keeps_its_last_value_in_order():
    rows = [{"step": 2, "loss": 5}, {"step": 1, "loss": 9}, {"step": 2, "loss": 4}]
    found = series([Record(row, "f") for row in rows], "loss")
    assert (found.x.tolist(), found.y.tolist()) == ([1, 2], [9, 4])
