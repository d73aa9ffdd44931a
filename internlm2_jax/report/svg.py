"""Figures as inline SVG that follow the page: its fonts, its light or dark colours, its width.

Matplotlib draws with stand-in colours that are then replaced by the page's CSS variables, and text
stays text. The same data give the same bytes: ids come from a fixed salt and no date is written.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from internlm2_jax.report.blocks import Picture, num

INK, MUTED, RULE, BAND = "#1b1e23", "#565d66", "#d5d9de", "#eef1f4"
# Told apart with any colour vision, and at least 4.5:1 against the page (checked in the tests).
COLOURS = ("#0067a8", "#b84a00", "#00734f", "#9c3580", "#5d6200", "#4f57c9")
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", BAND: "band"} | {
    colour: f"c{i}" for i, colour in enumerate(COLOURS)
}

WIDE, NARROW = 900, 380  # CSS pixels; one point of matplotlib is one pixel here
TEXT = 12.0
_PIXELS_PER_LETTER = 6.4
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "internlm2-jax",
    "font.size": TEXT,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "path.simplify": True,
    "path.simplify_threshold": 0.5,
}

# Draws into a figure of a width and height in pixels.
Draw = Callable[[Figure, float, float], None]


def picture(
    title: str,
    alt: str,
    source: str,
    draw: Draw,
    *,
    height: int = 230,
    wide: int = 0,
    note: str = "",
) -> Picture:
    """Draws for phones (380 px) and, with a height `wide` > 0, once more for wide screens."""
    return Picture(
        title=title, alt=alt, source=source, note=note,
        narrow=_svg(draw, NARROW, height, alt),
        wide=_svg(draw, WIDE, wide, alt) if wide else "",
    )  # fmt: skip


def _svg(draw: Draw, width: float, height: float, alt: str) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        draw(figure, width, height)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    body = buffer.getvalue()
    body = body[body.index(">", body.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'font: (bold )?([\d.]+)px[^;"]*', r"font: \1\2px var(--sans)", body)
    body = re.sub(r' font-family: [^;"]*;', "", body)
    body = body.replace("xlink:href=", "href=")
    for colour, name in _VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    # Ids are shared by the whole page: number the plots by what they show.
    salt = f"{_hash(body):08x}"
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{salt}-", body)
    body = re.sub(r"\n\s*", "\n", body)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(alt)}" '
        f'style="max-width: {width * 1.15:g}px">{body}'
    )


def _hash(text: str) -> int:
    """A small hash that is the same in every process, unlike `hash`."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value


def axes_inside(figure: Figure, width: float, height: float, **margin: float) -> Axes:
    """Axes inside margins in pixels: left, right, top, bottom."""
    left, right = margin.get("left", 46), margin.get("right", 12)
    top, bottom = margin.get("top", 26), margin.get("bottom", 40)
    box = (left / width, bottom / height, (width - left - right) / width,
           (height - top - bottom) / height)  # fmt: skip
    return figure.add_axes(box)


def letters(text: str) -> float:
    """Rough width of a text in pixels."""
    return _PIXELS_PER_LETTER * len(text)


def tick(value: float) -> str:
    """A number for an axis: no more digits than it needs."""
    if value == 0 or abs(value) >= 1000 or abs(value) < 1e-3:
        return num(value, 2)
    return f"{value:.4g}".replace("-", "−")


TICKS = FuncFormatter(lambda value, _: tick(value))


def name_axes(axes: Axes, x: str, y: str, *, left: float, above: float = 0) -> None:
    """x label below; y label over the axis, `above` pixels higher, reading as a line of text."""
    axes.set_xlabel(x, labelpad=3)
    axes.annotate(
        y, (0, 1), (2 - left, 6 + above), xycoords="axes fraction", textcoords="offset points",
        color=MUTED, va="bottom", annotation_clip=False,
    )  # fmt: skip
    axes.xaxis.set_major_formatter(TICKS)
    axes.yaxis.set_major_formatter(TICKS)
