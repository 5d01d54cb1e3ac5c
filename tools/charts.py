"""Line charts as SVG, to be put into a page whose style sheet gives the colours (classes `c0` to `c7`).

svg = line_chart({"CAM prior": [(0.05, 31.2), (0.10, 40.8)]}, x="background threshold", y="mIoU, %")

They have no colours of their own, so they follow the page into dark mode, and no text below 11 pixels.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.ticker import MaxNLocator

COLOURS = 8
WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 40  # margins, for the labels of the axes

Points = Sequence[tuple[float, float]]


def line_chart(curves: Mapping[str, Points], *, x: str, y: str, peak: bool = False) -> str:
    """Curves over common axes. Of each one point is marked and given in the key: the last.

    Args:
        curves: name -> (x, y) points, x ascending. Points that are not finite are left out.
        x, y: what the axes show.
        peak: mark the highest point (the first of equals), and say where it is.

    Returns:
        A `<figure>` element; an empty text if there is nothing to draw.
    """
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    xs, ys = zip(*(point for points in finite.values() for point in points), strict=True)
    across, up = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    marked = {name: max(points, key=lambda p: p[1]) if peak else points[-1] for name, points in finite.items()}
    texts = [f"{name} {v:.4g}" + (f" at {u:.4g}" if peak else "") for name, (u, v) in marked.items()]
    lines = [_curve(points, marked[name], across, up, n) for n, (name, points) in enumerate(finite.items())]
    said = escape(f"{y} over {x}; {'highest' if peak else 'last'}: {', '.join(texts)}")
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
        f"{_axes(across, up, x, y)}{''.join(lines)}</svg>"
    )
    key = "".join(f'<li class="c{n % COLOURS}">{escape(text)}</li>' for n, text in enumerate(texts))
    return f'<figure class="chart">{svg}<ul class="key">{key}</ul></figure>'


class _Axis:
    """Maps values to pixels, and knows round values to label."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if low == high:
            margin = max(0.5, abs(low) / 1000)
            low, high = low - margin, high + margin
        slack, ticks = 1e-9 * (high - low), MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high).tolist()
        self.ticks = [tick for tick in ticks if low - slack <= tick <= high + slack]
        self.low, self.scale, self.start = low, (end - start) / (high - low), start

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) * self.scale, 1)


def _curve(points: Points, marked: tuple[float, float], across: _Axis, up: _Axis, number: int) -> str:
    places = " ".join(f"{across(x)},{up(y)}" for x, y in points)
    colour = f'class="c{number % COLOURS}"'
    dot = f'<circle {colour} cx="{across(marked[0])}" cy="{up(marked[1])}" r="3"/>'
    return f'<polyline {colour} points="{places}"/>{dot}'


def _axes(across: _Axis, up: _Axis, x: str, y: str) -> str:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    rules = "".join(f'<line x1="{LEFT}" x2="{right}" y1="{up(v)}" y2="{up(v)}"/>' for v in up.ticks)
    numbers = "".join(f'<text x="{LEFT - 6}" y="{up(v) + 4}" text-anchor="end">{v:.4g}</text>' for v in up.ticks)
    numbers += "".join(
        f'<text x="{across(v)}" y="{floor + 16}" text-anchor="middle">{v:.4g}</text>' for v in across.ticks
    )
    names = f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
    middle = (TOP + floor) / 2
    names += f'<text transform="rotate(-90 11 {middle})" x="11" y="{middle}" text-anchor="middle">{escape(y)}</text>'
    return f'<g class="axes">{rules}{numbers}{names}</g>'
