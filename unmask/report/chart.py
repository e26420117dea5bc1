"""Line charts as SVG text: no library, no script, a few kilobytes each.

Lines differ in dash and marker as well as colour and carry their names at their ends, so that a chart reads without
colour and without a legend. Colours are the page's (classes `s0` to `s5`), which has a light and a dark set.

Units: x and y are data; u and v are pixels of the picture's own coordinates, v downwards.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 270
_LEFT, _TOP, _BOTTOM = 58, 14, 34
_LABEL = 13.0  # pixels from one name to the next
_CHARACTER = 7.6  # width of one in a name, the wide ones allowed for
_MOST_POINTS = 400

STYLES = 6


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
    show = show or _short
    x_range = _padded(*(steps or (min(line.xs[0] for line in lines), max(line.xs[-1] for line in lines))), 0.0)
    plain = bounds or _y_range(lines)
    curved = log and plain[0] > 0 and plain[1] > 8 * plain[0]
    bend = math.log if curved else _as_it_is
    y_range = _padded(bend(plain[0]), bend(plain[1]), 0.0 if bounds and not curved else 0.04)
    unit = f"{unit}, logarithmic" if curved else unit
    names = max((len(_cut(line.name)) for line in lines if not line.faint), default=0)
    right = WIDTH - 14 - names * _CHARACTER
    u_of = _scale(x_range, (_LEFT, right))
    straight = _scale(y_range, (HEIGHT - _BOTTOM, _TOP))

    def v_of(value: float) -> float:
        return straight(bend(value) if not curved or value > 0 else y_range[0] - 1)

    marks = log_ticks(*plain) if curved else ticks(*y_range)
    parts = _axes(x_range, marks, u_of, v_of, right, show)
    clip = f"c{zlib.crc32(f'{title} {unit} {lines}'.encode()):x}"
    parts.append(
        f'<clipPath id="{clip}"><rect x="{_LEFT - 6}" y="{_TOP - 6}" width="{right - _LEFT + 12:.0f}" '
        f'height="{HEIGHT - _TOP - _BOTTOM + 12}"/></clipPath><g clip-path="url(#{clip})">'
    )
    parts += [_drawn(line, u_of, v_of, show) for line in sorted(lines, key=lambda line: not line.faint)]
    parts.append("</g>")
    parts += _names([line for line in lines if line.name and not line.faint], u_of, v_of)
    about = escape(f"{title}{', ' + unit if unit else ''}")
    beside = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return (
        f'<figure><figcaption>{escape(title)}{beside}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{about}">{"".join(parts)}</svg></figure>'
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most `most` + 1 round numbers from `low` to `high`, apart by 1, 2 or 5 times a power of ten."""
    span = high - low
    size = 10.0 ** math.floor(math.log10(span / most))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if span / (size * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2 and 5 times a power of ten from `low` to `high`; over three decades, the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in found if low * 0.96 <= value <= high * 1.04]


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
    return Line(line.name, xs, ys, line.style % STYLES, line.faint, line.markers)


def _as_it_is(value: float) -> float:
    return value


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


def _scale(domain: tuple[float, float], pixels: tuple[float, float]) -> Callable[[float], float]:
    (low, high), (start, end) = domain, pixels
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(
    x_range: tuple[float, float], marks: Sequence[float], u_of: Callable[[float], float],
    v_of: Callable[[float], float], right: float, show: Callable[[float], str],
) -> list[str]:  # fmt: skip
    parts = []
    for value in marks:
        v = v_of(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {v:.1f}H{right:.0f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{v + 4:.1f}" text-anchor="end">{escape(show(value))}</text>'
        )
    bottom = HEIGHT - _BOTTOM
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right:.0f}"/>')
    for value in ticks(*x_range, most=6):
        u = u_of(value)
        parts.append(f'<path class="axis" d="M{u:.1f} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{u:.1f}" y="{bottom + 17}" text-anchor="middle">{_short(value)}</text>')
    parts.append(f'<text class="tick" x="{right:.0f}" y="{HEIGHT - 3}" text-anchor="end">optimizer step</text>')
    return parts


def _drawn(line: Line, u_of: Callable[[float], float], v_of: Callable[[float], float], show: Callable) -> str:
    points = [(u_of(x), v_of(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    path = "M" + "L".join(f"{u:.1f} {v:.1f}" for u, v in points)
    drawn = f'<path class="line s{line.style}{" faint" if line.faint else ""}" d="{path}"/>'
    if not line.markers and len(points) > 1:
        return drawn
    for (u, v), x, y in zip(points, line.xs, line.ys, strict=True):
        told = escape(f"{line.name or 'value'}, step {x:g}: {show(y)}")
        drawn += f'<path class="mark s{line.style}" d="{_marker(line.style, u, v)}"><title>{told}</title></path>'
    return drawn


def _marker(style: int, u: float, v: float) -> str:
    shapes = (
        f"M{u - 3.5:.1f} {v:.1f}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0",
        f"M{u - 3:.1f} {v - 3:.1f}h6v6h-6z",
        f"M{u:.1f} {v - 4:.1f}l4 7h-8z",
        f"M{u:.1f} {v - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z",
        f"M{u:.1f} {v + 4:.1f}l4 -7h-8z",
        f"M{u - 3.5:.1f} {v - 3.5:.1f}l7 7m0 -7l-7 7",
    )
    return shapes[style]


def _names(lines: Sequence[Line], u_of: Callable[[float], float], v_of: Callable[[float], float]) -> list[str]:
    """Write each line's name beside its end, moved apart where ends lie close together."""
    ends = sorted(((v_of(line.ys[-1]), u_of(line.xs[-1]), line) for line in lines), key=lambda end: end[0])
    column = max((u for _, u, _ in ends), default=0.0) + 8
    heights = spread([v for v, _, _ in ends], _LABEL, _TOP - 4.0, HEIGHT - _BOTTOM + 2.0)
    parts = []
    for (v, u, line), placed in zip(ends, heights, strict=True):
        if abs(placed - v) > 3 or column - u > 12:
            parts.append(f'<path class="lead" d="M{u + 3:.1f} {v:.1f}L{column - 2:.1f} {placed:.1f}"/>')
        parts.append(
            f'<text class="name s{line.style}" x="{column:.1f}" y="{placed + 4:.1f}">{escape(_cut(line.name))}'
            f"<title>{escape(line.name)}</title></text>"
        )
    return parts


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
