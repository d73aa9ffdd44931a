"""Line charts over steps, with phases behind them and names where the lines end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from internlm2_jax.report.blocks import Picture, num, percent
from internlm2_jax.report.load import Series
from internlm2_jax.report.svg import (
    BAND,
    COLOURS,
    INK,
    MUTED,
    RULE,
    TEXT,
    WIDE,
    Draw,
    axes_inside,
    letters,
    name_axes,
    picture,
    tick,
)

_ROW = 15  # pixels of a line of small text above the axes


@dataclass(frozen=True)
class Line:
    """One line of a chart; `faint` ones (raw values behind their mean) get no label.

    `low`, `high`: values of the same steps between which a band is drawn, as over seeds.
    """

    series: Series
    label: str = ""
    colour: int = 0
    faint: bool = False
    dashed: bool = False
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def over_seeds(found: Sequence[Series], label: str = "", colour: int = 0) -> Line:
    """Mean, lowest and highest of several runs, over the steps that all of them have."""
    if len(found) == 1:
        return Line(found[0], label, colour)
    steps = found[0].x
    for other in found[1:]:
        steps = np.intersect1d(steps, other.x)
    values = np.stack([s.y[np.isin(s.x, steps)] for s in found])
    band = {"low": values.min(axis=0), "high": values.max(axis=0)} if len(steps) else {}
    return Line(Series(steps, values.mean(axis=0)), label, colour, **band)


@dataclass(frozen=True)
class Span:
    """A range of steps behind the lines, named at the top; `brief` where the name does not fit."""

    start: float
    stop: float
    label: str
    brief: str = ""
    shaded: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal reference line."""

    y: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A vertical line where something happened."""

    x: float
    label: str


def with_mean(values: Series, window: int | None = None) -> list[Line]:
    """The values, and before them their mean over `window` steps (None: a twentieth, from twenty
    values on)."""
    if window is None:
        if len(values.y) < 20:
            return [Line(values)]
        window = max(len(values.y) // 20, 3)
    return [Line(values, faint=True), Line(values.smooth(window))]


def change(
    name: str,
    unit: str,
    of: Series,
    lines: Sequence[Line],
    *,
    over: str,
    source: str,
    bottom: float | None = None,
    **chart: Any,
) -> Picture:
    """Lines under a title that compares the means of the first and last tenth of `of`.

    Shares, by their unit, are written in percent; `chart` goes to `line_chart`.
    """
    part = max(len(of.y) // 10, 1)
    write = percent if unit.startswith("share") else num
    first, last = (write(float(values.mean())) for values in (of.y[:part], of.y[-part:]))
    return picture(
        title=f"{name}: {first} → {last}",
        alt=f"Line chart of {name.lower()} ({unit}) over {over}, from {first} to {last}.",
        source=source,
        draw=line_chart(lines, "iteration", unit, bottom=bottom, **chart),
        height=240,
    )


def line_chart(
    lines: Sequence[Line],
    x: str,
    y: str,
    *,
    spans: Sequence[Span] = (),
    levels: Sequence[Level] = (),
    marks: Sequence[Mark] = (),
    bottom: float | None = None,
    top: float | None = None,
    places: Mapping[float, str] | None = None,
) -> Draw:
    """Lines over steps. `bottom`, `top` fix an end of the y axis, which otherwise fits the data;
    `places` are the ticks of the x axis and their names."""
    shown = [line for line in lines if line.series]

    def draw(figure: Figure, width: float, height: float) -> None:
        names = [line.label for line in shown if line.label] + [level.label for level in levels]
        right = max([letters(name) for name in names], default=0) + 12
        limits = _limits(shown, levels, bottom, top)
        ticks = MaxNLocator(5)
        left = max(letters(tick(value)) for value in ticks.tick_values(*limits)) + 14
        rows = 2 if marks else 1 if spans else 0
        axes = axes_inside(figure, width, height, left=left, right=right, top=24 + _ROW * rows)
        for line in shown:
            if line.low is not None and line.high is not None:
                axes.fill_between(
                    line.series.x, line.low, line.high, color=COLOURS[line.colour], alpha=0.18,
                    linewidth=0,
                )  # fmt: skip
            markers = "o" if len(line.series.y) < 3 else ""
            axes.plot(
                line.series.x, line.series.y, color=COLOURS[line.colour], marker=markers,
                markersize=4, linewidth=0.7 if line.faint else 1.7,
                alpha=0.45 if line.faint else 1.0, linestyle="--" if line.dashed else "-",
            )  # fmt: skip
        for level in levels:
            axes.axhline(level.y, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.set_ylim(*limits)
        axes.margins(x=0.01)
        if spans:  # charts side by side cover the same steps, whatever they have no value for
            axes.update_datalim([(spans[0].start, limits[0]), (spans[-1].stop, limits[0])])
            axes.autoscale_view(scaley=False)
        axes.xaxis.set_major_locator(
            MaxNLocator(8 if width == WIDE else 4, integer=True, min_n_ticks=1)
        )
        axes.yaxis.set_major_locator(ticks)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        name_axes(axes, x, y, left=left, above=_ROW * rows)
        if places:
            axes.set_xticks(list(places), list(places.values()))
        _draw_spans(axes, spans, marks, width)
        ends = [(float(line.series.y[-1]), line.label, COLOURS[line.colour])
                for line in shown if line.label]  # fmt: skip
        _end_labels(axes, ends + [(level.y, level.label, INK) for level in levels], height)

    return draw


def _limits(
    lines: Sequence[Line], levels: Sequence[Level], bottom: float | None, top: float | None
) -> tuple[float, float]:
    """Ends of the y axis: clear lines, levels, and all but the spikes of faint lines."""
    values = [np.array([level.y for level in levels])]
    for line in lines:
        values.append(np.percentile(line.series.y, [2, 98]) if line.faint else line.series.y)
    together = np.concatenate(values) if lines else np.array([0.0, 1.0])
    low, high = float(np.min(together)), float(np.max(together))
    low = low if bottom is None else min(bottom, low)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low - pad if bottom is None else bottom, high + pad if top is None else top)


def _draw_spans(axes: Axes, spans: Sequence[Span], marks: Sequence[Mark], width: float) -> None:
    low, high = axes.get_xlim()
    pixels = axes.get_position().width * width / (high - low)
    for number, span in enumerate(spans):
        start, stop = max(span.start, low), min(span.stop, high)
        if stop <= start:
            continue
        if span.shaded if any(s.shaded for s in spans) else number % 2:
            axes.axvspan(start, stop, color=BAND, linewidth=0, zorder=0)
        if number:
            axes.axvline(start, color=RULE, linewidth=0.8, zorder=0.5)
        room = (stop - start) * pixels
        name = next((n for n in (span.label, span.brief) if n and letters(n) < room), "")
        _above(axes, (start + stop) / 2, name, "center", row=0)
    for mark in marks:
        axes.axvline(mark.x, color=INK, linewidth=1.0, linestyle=(0, (1, 2)))
        _above(axes, mark.x, mark.label, "center", row=1)


def _above(axes: Axes, x: float, text: str, align: str, row: int) -> None:
    """Small text above the axes, in row 0 next to them or in row 1 over that."""
    axes.annotate(
        text, (x, 1), (0, 3 + _ROW * row), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha=align, va="bottom", color=MUTED, fontsize=TEXT - 1,
        annotation_clip=False,
    )  # fmt: skip


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]], height: float) -> None:
    """Names right of the axes at their values, pushed apart until none overlap."""
    low, high = axes.get_ylim()
    pixels = axes.get_position().height * height
    ends = sorted(ends)
    places = [(np.clip(y, low, high) - low) / (high - low) * pixels for y, _, _ in ends]
    gap = TEXT + 3
    for _ in range(50):
        for i in range(len(places) - 1):
            overlap = gap - (places[i + 1] - places[i])
            if overlap > 0:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    for (_, text, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            text, (1, 0), (5, place), xycoords="axes fraction", textcoords="offset points",
            color=colour, va="center", annotation_clip=False,
        )  # fmt: skip
