"""Line charts for the report, drawn by matplotlib as SVG that takes its colours from the page, light or dark.

Lines differ in dash and marker as well as colour and carry their names at their ends, so that a chart reads without
colour and without a legend.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

WIDTH, HEIGHT = 461, 194  # points
_LABEL = 9.5  # points from one name to the next
_MOST_POINTS = 400
_DASHES = ("-", (0, (7, 4)), (0, (2, 3)), (0, (9, 3, 2, 3)), (0, (14, 4)), (0, (9, 3, 2, 3, 2, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "x")
STYLES = len(_DASHES)
# What matplotlib writes → what the page's style sheet calls it.
_COLOURS = {f"#00000{style + 1}": f"var(--s{style})" for style in range(STYLES)}
_SERIES, _SOFT, _GRID = tuple(_COLOURS), "#000008", "#000009"
_COLOURS |= {_SOFT: "var(--soft)", _GRID: "var(--grid)"}
_SETTINGS: Any = {"svg.fonttype": "none", "font.size": 8.5, "text.color": _SOFT, "axes.labelcolor": _SOFT,
             "axes.edgecolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        name: written at its end; "" for none.
        xs, ys: its points, x rising.
        style: which dash, marker and colour, 0..5; larger numbers start over.
        faint: thin and pale, behind the others; without markers. It does not stretch the axis by its outliers.
        markers: draw each point.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int = 0
    faint: bool = False
    markers: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    unit: str = "",
    show: Callable[[float], str] | None = None,
    bounds: tuple[float, float] | None = None,
    log: bool = False,
    steps: tuple[float, float] | None = None,
) -> str:
    """Return a chart as a `<figure>`; "" when there is nothing to draw.

    Args:
        title: its caption.
        lines: what to draw; points that are not finite are left out.
        unit: what the y axis counts, written beside the title.
        show: how a value of the y axis is written; None = a short decimal number.
        bounds: limits of the y axis; None = what the lines need.
        log: a logarithmic y axis where the values span more than a factor of eight, all above 0; it is said beside the
            unit.
        steps: limits of the x axis; None = what the lines need.
    """
    lines = [line for line in map(_finite, lines) if line.xs]
    if not lines:
        return ""
    low, high = bounds or _y_range(lines)
    curved = log and low > 0 and high > 8 * low
    unit = f"{unit}, logarithmic" if curved else unit
    about = f"{title}{', ' + unit if unit else ''}"
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": f"{about} {lines}"}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axis = figure.add_subplot()
        for line in lines:
            _draw(axis, line)
        axis.set_xlim(*_padded(*(steps or (min(x.xs[0] for x in lines), max(x.xs[-1] for x in lines))), 0.01))
        if curved:
            axis.set_yscale("log")
            axis.set_ylim(low / 1.1, high * 1.1)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            axis.set_ylim(*_padded(low, high, 0.04))
            axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: (show or _short)(value)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axis.set_xlabel("optimizer step", loc="right")
        axis.grid(axis="y", color=_GRID)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        _name_ends(figure, axis, [line for line in lines if line.name and not line.faint])
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    beside = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return f"<figure><figcaption>{escape(title)}{beside}</figcaption>{_inline(drawn.getvalue(), about)}</figure>"


def _draw(axis: Any, line: Line) -> None:
    marked = line.markers or len(line.xs) == 1
    axis.plot(
        line.xs,
        line.ys,
        color=_SERIES[line.style],
        linestyle="-" if line.faint else _DASHES[line.style],
        linewidth=0.6 if line.faint else 1.4,
        alpha=0.35 if line.faint else None,
        marker=_MARKERS[line.style] if marked else None,
        markersize=4,
        markerfacecolor="none",
        zorder=2 if line.faint else 3,
    )


def _name_ends(figure: Figure, axis: Any, lines: Sequence[Line]) -> None:
    """Write each line's name beside its end, moved apart where ends lie close together."""
    names = [
        axis.annotate(_cut(line.name), (1.0, line.ys[-1]), (6, 0), axis.get_yaxis_transform(), "offset points",
                      color=_SERIES[line.style], weight="bold", va="center", annotation_clip=False)
        for line in sorted(lines, key=lambda line: line.ys[-1])
    ]  # fmt: skip
    figure.draw_without_rendering()  # lays the figure out, with room for the names
    scale = 72 / figure.dpi
    heights = [axis.transData.transform((0, name.xy[1]))[1] * scale for name in names]
    bottom, top = (edge * scale for edge in (axis.bbox.y0, axis.bbox.y1))
    for name, height, placed in zip(names, heights, spread(heights, _LABEL, bottom, top), strict=True):
        name.set_position((6, placed - height))
    figure.set_layout_engine("none")


def _inline(svg: str, about: str) -> str:
    """Return matplotlib's file as an element of the page: colours, font and size are the page's, and it is short."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r' id="\w+_\d+"|font-family: [^;"]*;? ?| transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", svg)
    for written, called in _COLOURS.items():
        svg = svg.replace(written, called)
    return svg.strip()


def thinned(xs: Sequence[float], ys: Sequence[float], most: int = _MOST_POINTS) -> tuple[list[float], list[float]]:
    """Return at most about `most` points that keep the lowest and highest of each stretch, so that no spike is lost."""
    if len(xs) <= most:
        return list(xs), list(ys)
    kept: list[int] = []
    size = len(xs) / (most // 2)
    for number in range(most // 2):
        part = range(int(number * size), min(len(xs), int((number + 1) * size)))
        kept += sorted({min(part, key=ys.__getitem__), max(part, key=ys.__getitem__)})
    kept = sorted({0, *kept, len(xs) - 1})
    return [xs[place] for place in kept], [ys[place] for place in kept]


def _finite(line: Line) -> Line:
    pairs = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    xs, ys = thinned([x for x, _ in pairs], [y for _, y in pairs])
    return replace(line, xs=xs, ys=ys, style=line.style % STYLES)


def _y_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Return limits that hold every line, of faint ones all but the outermost fiftieth."""
    low, high = math.inf, -math.inf
    for line in lines:
        ys = sorted(line.ys)
        cut = len(ys) // 50 if line.faint else 0
        low, high = min(low, ys[cut]), max(high, ys[len(ys) - 1 - cut])
    return _padded(low, high, 0.0)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low - share * (high - low), high + share * (high - low)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return rising places near the wanted (rising) ones, at least `gap` apart and within bounds where they fit."""
    placed: list[float] = []
    for place in wanted:
        placed.append(max(place, placed[-1] + gap if placed else low))
    limit = high
    for number in range(len(placed) - 1, -1, -1):
        placed[number] = min(placed[number], limit)
        limit = placed[number] - gap
    return placed


def _cut(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _short(value: float) -> str:
    """Return a number in at most about six characters; a power of ten below a thousandth and above a million."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
