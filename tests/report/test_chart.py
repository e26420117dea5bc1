"""Charts are plain SVG: every point is in the picture, names do not lie on each other, and grey paper loses nothing."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.report.chart import HEIGHT, WIDTH, Line, line_chart, spread, thinned

numbers = st.floats(-1e6, 1e6, allow_nan=False)


def parse(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure.replace("xlink:href", "href"))


@settings(max_examples=25)
@given(st.lists(numbers, min_size=1, max_size=60), st.booleans())
def test_any_numbers_make_a_picture_whose_points_lie_inside(values: list[float], log: bool) -> None:
    figure = parse(line_chart("Loss", [Line("a <run>", list(range(len(values))), values)], "nats", log=log))
    paths = [p.get("d", "") for p in figure.iter("path") if "stroke: var(--s0)" in p.get("style", "")]
    points = [(float(u), float(v)) for path in paths for u, v in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)]
    assert len(points) >= 1
    assert all(-1 <= u <= WIDTH + 1 and -1 <= v <= HEIGHT + 1 for u, v in points)
    assert [text.text for text in figure.iter("text") if "font-weight: 700" in text.get("style", "")] == ["a <run>"]


def test_what_is_not_finite_is_left_out_and_nothing_is_no_picture() -> None:
    figure = line_chart("Loss", [Line("a", [1, 2, 3], [1.0, math.nan, 2.0], markers=True)])
    assert len(re.findall(r"<use [^>]*stroke: var\(--s0\)", figure)) == 2 and "nan" not in figure
    assert line_chart("Loss", [Line("a", [1], [math.inf])]) == "" == line_chart("Loss", [])


def test_lines_differ_without_colour() -> None:
    lines = [Line(f"run {n}", [0, 1], [n, n + 1.0], n, markers=True) for n in range(6)]
    figure = parse(line_chart("Loss", lines))
    drawn = [path for path in figure.iter("path") if re.search(r"stroke: var\(--s\d\)", path.get("style", ""))]
    shapes = {path.get("d") for path in drawn if path.get("id")}
    assert len(shapes) == 6  # circle, square, triangles, diamond, cross
    dashes = {re.search(r"stroke-dasharray: ([^;]+)|$", p.get("style", ""))[1] for p in drawn if not p.get("id")}
    assert len(dashes) == 6 and None in dashes  # the first is solid
    heights = sorted(float(t.get("y", "")) for t in figure.iter("text") if "font-weight: 700" in t.get("style", ""))
    assert all(low + 9.3 <= high for low, high in zip(heights, heights[1:], strict=False))


def test_a_picture_is_the_same_every_time() -> None:
    assert line_chart("Loss", [Line("a", [1, 2], [3, 4])]) == line_chart("Loss", [Line("a", [1, 2], [3, 4])])


@given(st.lists(numbers, min_size=1, max_size=3000), st.integers(10, 400))
def test_thinning_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    xs, ys = thinned(range(len(values)), values, most)
    assert len(xs) <= most + 2 and xs == sorted(xs)
    assert (xs[0], xs[-1]) == (0, len(values) - 1)
    assert min(ys) == min(values) and max(ys) == max(values)
    assert all(values[int(x)] == y for x, y in zip(xs, ys, strict=True))


@given(st.lists(st.floats(0, 200), min_size=1, max_size=8))
def test_names_are_moved_apart(wanted: list[float]) -> None:
    placed = spread(sorted(wanted), 13.0, 0.0, 220.0)
    assert all(high - low >= 12.99 for low, high in zip(placed, placed[1:], strict=False))
    assert placed[-1] <= 220.0
