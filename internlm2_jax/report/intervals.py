"""A chart of means with their confidence intervals, one row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from matplotlib.figure import Figure

from internlm2_jax.evals.intervals import Interval
from internlm2_jax.report.svg import COLOURS, INK, RULE, TEXT, Draw, axes_inside, letters

Zero = Literal["edge", "line", "absent"]
_ENDS = (0.1, 0.2, 0.5)  # of the axis of small shares


def interval_chart(
    rows: Sequence[tuple[str, float, float, float, str]],
    x: str,
    *,
    shares: bool,
    zero: Zero = "edge",
) -> Draw:
    """rows: (name, mean, low, high, how to write the mean). Shares lie in 0..1, and their axis ends
    at a tenth, a fifth or a half where all are below. Other axes begin at 0 ("edge"), or fit the
    rows, with 0 marked ("line") or of no interest ("absent").
    """

    def draw(figure: Figure, width: float, height: float) -> None:
        left = max(letters(name) for name, *_ in rows) + 10
        axes = axes_inside(figure, width, height, left=left, right=52, top=8)
        for place, (_, mean, low, high, written) in enumerate(rows):
            colour = COLOURS[place % len(COLOURS)]
            axes.plot([low, high], [place] * 2, color=colour, linewidth=3, alpha=0.45)
            axes.plot(mean, place, "o", color=colour, markersize=8)
            axes.annotate(
                written, (1, place), (6, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", color=colour, fontsize=TEXT,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        if shares:
            end = next((e for e in _ENDS if e >= max(high for *_, high, _ in rows)), 1.0)
            axes.set_xlim(-0.02 * end, 1.02 * end)
            ticks = [end * n / 4 for n in range(5)]
            axes.set_xticks(ticks, [f"{100 * x:g} %" for x in ticks])
        elif zero == "edge":
            axes.set_xlim(left=0)
        elif zero == "line":
            axes.axvline(0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(x, labelpad=3)

    return draw


def said(interval: Interval, write: Callable[[float], str]) -> str:
    """The mean, and in brackets the interval where there is one."""
    mean, low, high = write(interval.mean), write(interval.low), write(interval.high)
    return mean if low == high else f"{mean} [{low}, {high}]"
