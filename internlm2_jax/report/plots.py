"""Charts without a time axis: bars, dots, histograms, shares, heat maps. No legends beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from internlm2_jax.report.blocks import num, percent
from internlm2_jax.report.svg import (
    COLOURS,
    INK,
    MUTED,
    RULE,
    TEXT,
    TICKS,
    WIDE,
    Draw,
    axes_inside,
    letters,
    name_axes,
    tick,
)

# A series is told by its shape too, not by colour alone.
_MARKERS, _SHAPES = "os^DvP", "●■▲◆▼✚"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def bar_chart(rows: Sequence[tuple[str, float, str]], x: str, *, colour: int = 0) -> Draw:
    """Horizontal bars from the top down: (name, value, text at the bar's end)."""

    def draw(figure: Figure, width: float, height: float) -> None:
        left = max((letters(name) for name, _, _ in rows), default=0) + 10
        right = max((letters(text) for _, _, text in rows), default=0) + 8
        axes = axes_inside(figure, width, height, left=left, right=right, top=6)
        places = np.arange(len(rows))
        axes.barh(places, [value for _, value, _ in rows], color=COLOURS[colour], height=0.62)
        for place, (_, value, text) in zip(places, rows, strict=True):
            axes.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center",
                          annotation_clip=False)  # fmt: skip
        axes.set_yticks(places, [name for name, _, _ in rows], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, max([value for _, value, _ in rows] + [1e-12]))
        axes.xaxis.set_major_locator(MaxNLocator(6 if width == WIDE else 3))
        axes.xaxis.set_major_formatter(TICKS)
        axes.set_xlabel(x, labelpad=3)

    return draw


def dot_chart(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], x: str, *, chance: float | None = None
) -> Draw:
    """Shares in 0..1: per row one dot a series; the last one's number stands at the right.

    rows: (name, [(series, value), ...]); a series keeps its colour and shape over all rows.
    """
    order = list(dict.fromkeys(name for _, dots in rows for name, _ in dots))

    def draw(figure: Figure, width: float, height: float) -> None:
        left = max((letters(name) for name, _ in rows), default=0) + 10
        key = _key_lines(order, width - left) if len(order) > 1 else []
        lifted = int(chance is not None)
        top = 8 + 16 * (len(key) + lifted)
        axes = axes_inside(figure, width, height, left=left, right=46, top=top)
        if chance is not None:
            axes.axvline(chance, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
            axes.annotate("chance", (chance, 1), (0, 3), xycoords=("data", "axes fraction"),
                          textcoords="offset points", color=MUTED, fontsize=TEXT - 1, ha="center",
                          annotation_clip=False)  # fmt: skip
        for place, (_, dots) in enumerate(rows):
            values = [value for _, value in dots]
            axes.plot([min(values), max(values)], [place] * 2, color=RULE, linewidth=3, zorder=1)
            for name, value in dots:
                number = order.index(name)
                axes.plot(
                    value,
                    place,
                    _MARKERS[number % 6],
                    color=_colour(number),
                    markersize=max(9 - 2 * number, 5),
                )
            axes.annotate(
                percent(values[-1]), (1, place), (6, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", color=_colour(order.index(dots[-1][0])),
            )  # fmt: skip
        for line, entries in enumerate(key):
            for number, offset in entries:
                _name_series(axes, order[number], number, offset, len(key) - 1 - line + lifted)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks(np.linspace(0, 1, 5), [f"{n} %" for n in range(0, 101, 25)])
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(x, labelpad=3)

    return draw


def _key_lines(names: Sequence[str], width: float) -> list[list[tuple[int, float]]]:
    """Breaks the names of series into lines: per line (series, pixels from the left)."""
    lines: list[list[tuple[int, float]]] = [[]]
    offset = 0.0
    for number, name in enumerate(names):
        if lines[-1] and offset + letters(name) + 14 > width:
            lines.append([])
            offset = 0.0
        lines[-1].append((number, offset))
        offset += letters(name) + 26
    return lines


def _name_series(axes: Axes, name: str, number: int, offset: float, row: int) -> None:
    axes.annotate(
        f"{_SHAPES[number % 6]} {name}", (0, 1), (offset, 6 + 16 * row), xycoords="axes fraction",
        textcoords="offset points", color=_colour(number), annotation_clip=False,
    )  # fmt: skip


def histogram(groups: Sequence[tuple[str, np.ndarray]], x: str, *, bins: int = 24) -> Draw:
    """Two outlined histograms on one axis, named above it, left and right, with their means."""
    values = np.concatenate([array for _, array in groups])
    edges = np.linspace(np.min(values) - 1e-6, np.max(values) + 1e-6, bins + 1)

    def draw(figure: Figure, width: float, height: float) -> None:
        axes = axes_inside(figure, width, height, top=40)
        for number, (_, array) in enumerate(groups):
            counts, _ = np.histogram(array, edges)
            axes.stairs(counts, edges, color=COLOURS[number], linewidth=1.6, zorder=3)
            axes.stairs(counts, edges, color=COLOURS[number], fill=True, alpha=0.15)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylim(bottom=0)
        name_axes(axes, x, "pairs", left=46, above=16)
        for number, (name, array) in enumerate(groups):
            axes.annotate(
                f"{name}, mean {num(float(np.mean(array)), 2)}", (number, 1), (0, 5),
                xycoords="axes fraction", textcoords="offset points", annotation_clip=False,
                ha="left" if number == 0 else "right", color=COLOURS[number],
            )  # fmt: skip

    return draw


def binned(
    edges: np.ndarray,
    counts: np.ndarray,
    x: str,
    y: str,
    *,
    limits: tuple[float, float] = (-np.inf, np.inf),
    log: bool = False,
) -> Draw:
    """A histogram that was counted elsewhere, [edges - 1] counts on a log axis, so that a tail of a
    few documents is seen beside the millions. Bins outside `limits` have the second colour, and the
    finite limits a line with their number. `log` spaces the edges in proportion."""
    inside = (edges[:-1] >= limits[0]) & (edges[1:] <= limits[1])
    # A bin that a limit cuts in two (whole numbers lie in the middle of theirs) goes by its centre.
    middle = (edges[:-1] + edges[1:]) / 2
    inside |= (middle >= limits[0]) & (middle <= limits[1])

    def draw(figure: Figure, width: float, height: float) -> None:
        axes = axes_inside(figure, width, height, left=52, right=14, top=40)
        axes.set_yscale("log")
        floor = 0.7
        for number, shown in ((0, inside), (1, ~inside)):
            # Each bar for itself: neighbours of the other colour must not be drawn at all.
            starts = np.flatnonzero(shown & (counts > 0))
            axes.bar(edges[starts], counts[starts] - floor, np.diff(edges)[starts], floor,
                     align="edge", color=COLOURS[number], linewidth=0)  # fmt: skip
        axes.set_ylim(floor, max(float(np.max(counts, initial=1)), 10) * 1.4)
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        _value_axis(axes, edges[0], edges[-1], log, width)
        _cut_lines(axes, [limit for limit in limits if np.isfinite(limit)])
        name_axes(axes, x, y, left=52, above=16)

    return draw


@dataclass(frozen=True)
class Shares:
    """One line of `share_curves`: `y` [points] in 0..1, NaN where there is none."""

    label: str
    y: np.ndarray
    dashed: bool = False


def share_curves(
    thresholds: np.ndarray,
    lines: Sequence[Shares],
    x: str,
    y: str,
    *,
    cut: float | None = None,
    log: bool = False,
    small: bool = False,
) -> Draw:
    """Shares over a threshold, `cut` marked. `small` draws them on a log axis from 0.01 %, for
    shares of which a hundredth matters."""

    def draw(figure: Figure, width: float, height: float) -> None:
        axes = axes_inside(figure, width, height, left=52, right=14, top=40)
        for number, line in enumerate(lines):
            axes.plot(
                thresholds, np.maximum(line.y, 1e-9), color=COLOURS[number], linewidth=1.7,
                linestyle="--" if line.dashed else "-",
            )  # fmt: skip
        if small:
            axes.set_yscale("log")
            axes.set_ylim(1e-4, 1.25)
            ticks = [1e-4, 1e-3, 1e-2, 0.1, 1.0]
        else:
            axes.set_ylim(-0.02, 1.03)
            ticks = [0, 0.25, 0.5, 0.75, 1]
        _value_axis(axes, float(thresholds[0]), float(thresholds[-1]), log, width)
        if cut is not None:
            _cut_lines(axes, [cut])
        name_axes(axes, x, y, left=52, above=16)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        offset = 0.0
        for number, line in reversed(list(enumerate(lines))):
            text = f"{'╌╌' if line.dashed else '──'} {line.label}"
            axes.annotate(
                text, (1, 1), (-offset, 22), xycoords="axes fraction", ha="right", va="bottom",
                textcoords="offset points", color=COLOURS[number], annotation_clip=False,
            )  # fmt: skip
            offset += letters(text) + 16

    return draw


def _value_axis(axes: Axes, low: float, high: float, log: bool, width: float) -> None:
    """An x axis over [low, high]."""
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=9 if width == WIDE else 5))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(9 if width == WIDE else 5))
    axes.set_xlim(low, high)


def _cut_lines(axes: Axes, cuts: Sequence[float]) -> None:
    """Dashed lines where a rule cuts, with their numbers over the axes."""
    for place, cut in enumerate(sorted(cuts)):
        axes.axvline(cut, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        across = axes.transAxes.inverted().transform(axes.transData.transform((cut, 1)))[0]
        align = "left" if across < 0.15 else "right" if across > 0.85 else "center"
        if len(cuts) > 1:
            align = "left" if across < 0.15 or (place and across < 0.85) else "right"
        axes.annotate(
            f"cut-off {tick(cut)}", (cut, 1), (0, 3), xycoords=("data", "axes fraction"), ha=align,
            textcoords="offset points", color=INK, fontsize=TEXT - 1, annotation_clip=False,
        )  # fmt: skip


def heat_map(
    scores: np.ndarray, columns: Sequence[str], rows: Sequence[str], x: str, y: str
) -> Draw:
    """Cells of scores in 0..1 as per cent; `scores` is [rows, columns], NaN = not measured."""
    shades = colormaps["viridis"]

    def draw(figure: Figure, width: float, height: float) -> None:
        axes = axes_inside(figure, width, height, top=28)
        edges = np.arange(scores.shape[1] + 1), np.arange(scores.shape[0] + 1)
        axes.pcolormesh(*edges, np.ma.masked_invalid(scores), cmap=shades, vmin=0, vmax=1,
                        edgecolor="face", linewidth=0.3)  # fmt: skip
        small = scores.shape[1] > 8
        for (row, column), score in np.ndenumerate(scores):
            if np.isnan(score):
                continue
            colour = "white" if score < 0.6 else "black"
            axes.text(column + 0.5, row + 0.5, f"{100 * score:.0f}", ha="center", va="center",
                      fontsize=TEXT - 2 - 2 * small, color=colour)  # fmt: skip
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylim(scores.shape[0], 0)
        axes.set_xlabel(x, labelpad=3)
        axes.annotate(y, (0, 1), (-44, 8), xycoords="axes fraction", textcoords="offset points",
                      color=MUTED, annotation_clip=False)  # fmt: skip

    return draw
