"""A small painter of textured, shaded, anti-aliased parts, for `datasets.prepare.shapes`.

    canvas = Canvas(np.zeros((240, 256, 3), np.float32), np.random.default_rng(0))
    brush = Brush(canvas, np.float32([[100, 0, 128], [0, 100, 120]]))  # 100 pixels per unit, origin in the middle
    brush.fill(ellipse(0, 0, 1, 0.5), hsv(0.1, 0.8, 0.9), second=hsv(0.6, 0.8, 0.9), pattern=stripes(0.2))

Everything random comes from generators that are passed in, so the same seed paints the same picture.
"""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

Pattern = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
"""Local coordinates u, v (f32 HxW) and a generator -> weight of a part's second colour, f32 HxW in [0, 1]."""


# --------------------------------------------------------------------------------------- noise, colours, patterns


def noise(height: int, width: int, cell: float, rng: np.random.Generator, stretch: float = 1.0) -> np.ndarray:
    """Fractal noise of three octaves.

    Args:
        height, width: its shape.
        cell: period of the coarsest octave in pixels; each further one has half the period.
        stretch: periods along x are longer by this factor.

    Returns:
        f32 HxW, mean 0, standard deviation about 1.
    """
    total, power = np.zeros((height, width), np.float32), 0.0
    for octave in range(3):
        size = max(cell * 0.5**octave, 1.0)
        rows, columns = int(height / size) + 3, int(width / (size * stretch)) + 3
        grid = rng.standard_normal((rows, columns), dtype=np.float32)
        total += 0.6**octave * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        power += 0.36**octave
    return total / np.float32(0.87 * power**0.5)  # cubic interpolation keeps three quarters of the variance


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """f32 RGB in [0, 1]; the hue wraps around, the rest is clipped."""
    return np.float32(colorsys.hsv_to_rgb(hue % 1.0, np.clip(saturation, 0, 1), np.clip(value, 0, 1)))


def vary(rng: np.random.Generator, hue: float, saturation: float, value: float, spread: float = 0.03) -> np.ndarray:
    """A colour near the given one; `spread` is the deviation of the hue."""
    return hsv(hue + rng.normal(0, spread), saturation + rng.normal(0, 0.07), value + rng.normal(0, 0.07))


def any_colour(rng: np.random.Generator) -> np.ndarray:
    """The colour of a part that must not give the class away."""
    return hsv(rng.random(), rng.uniform(0.25, 0.9), rng.uniform(0.35, 0.95))


def _ramp(start: float, end: float, rows: int) -> np.ndarray:
    """Linear from the top row to the bottom row: f32 [rows, 1]."""
    return np.linspace(start, end, rows, dtype=np.float32)[:, None]


def _step(values: np.ndarray, sharpness: float) -> np.ndarray:
    """0 below zero, 1 above, linear within 0.5 / sharpness of it."""
    return np.clip(0.5 + sharpness * values, 0, 1)


def stripes(period: float, angle: float = 0.0, width: float = 0.0, wobble: float = 0.0) -> Pattern:
    """Bands that follow one another in direction `angle` (radians).

    Args:
        width: in (-1, 1); narrows or widens the bands of the second colour.
        wobble: how far, in local units, the bands bend.
    """

    def pattern(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        across = u * math.cos(angle) + v * math.sin(angle) + wobble * np.sin(4 * v + rng.uniform(0, 6))
        return _step(np.sin(across * (2 * math.pi / period)) + width, 3.0)

    return pattern


def tiles(period: float) -> Pattern:
    """Joints between staggered tiles: bricks, roof tiles, paving."""

    def pattern(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        row = np.floor(v / period)
        joint = np.maximum(np.cos((u / period + row) * math.pi), np.cos(v * (2 * math.pi / period)))
        return _step(joint - 0.75, 3.0)

    return pattern


def scales(period: float) -> Pattern:
    """Rows of overlapping round scales: dark along their rims."""

    def pattern(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        column = u / period
        row = v / period - 0.5 * np.mod(np.floor(column), 2)
        across, along = np.mod(row, 1) - 0.5, np.mod(column, 1)
        return _step(along**2 + 4 * across**2 * (1 - along) - 0.6, 2.0)

    return pattern


def blotches(cell: float, threshold: float = 0.6, sharpness: float = 2.0, stretch: float = 1.0) -> Pattern:
    """Irregular spots.

    Args:
        cell: their size in local units; along x `stretch` times that.
        threshold: in standard deviations; the higher, the fewer.
    """

    def pattern(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        unit = u.shape[0] / max(abs(v[-1, 0] - v[0, 0]) + abs(u[-1, 0] - u[0, 0]), 1e-6)  # pixels
        return _step(noise(*u.shape, max(cell * unit, 2.0), rng, stretch) - threshold, sharpness)

    return pattern


# -------------------------------------------------------------------------------------------- outlines, f32 [N, 2]


def polygon(*points: tuple[float, float]) -> np.ndarray:
    """Straight edges between the points."""
    return np.float32(points)


def smooth(*points: tuple[float, float], rounds: int = 3) -> np.ndarray:
    """A closed curve that rounds the points off (corner cutting, Chaikin 1974)."""
    outline = np.float32(points)
    for _ in range(rounds):
        following = np.roll(outline, -1, axis=0)
        outline = np.stack([0.75 * outline + 0.25 * following, 0.25 * outline + 0.75 * following], 1).reshape(-1, 2)
    return outline


def ellipse(
    x: float, y: float, a: float, b: float, bumps: int = 0, height: float = 0.0, phase: float = 0.0
) -> np.ndarray:
    """An ellipse with half axes a, b; its radius has `bumps` scallops of relative `height` (fleece, leaves)."""
    t = np.linspace(0, 2 * math.pi, 24 + 8 * bumps, endpoint=False, dtype=np.float32)
    radius = 1 - height + 2 * height * np.abs(np.sin(bumps * t / 2 + phase))
    return np.stack([x + a * radius * np.cos(t), y + b * radius * np.sin(t)], 1)


def bar(
    start: tuple[float, float], end: tuple[float, float], width: float, end_width: float | None = None
) -> np.ndarray:
    """A straight limb, pole or stroke that may taper."""
    a, b = np.float32(start), np.float32(end)
    along = (b - a) / max(float(np.hypot(*(b - a))), 1e-6)
    side = np.float32([-along[1], along[0]]) / 2
    tip = width if end_width is None else end_width
    return np.stack([a + side * width, b + side * tip, b - side * tip, a - side * width])


# -------------------------------------------------------------------------------------------------------- painting


@dataclass
class Canvas:
    """A picture under way."""

    picture: np.ndarray  # f32 RGB HxWx3, about [0, 1]
    rng: np.random.Generator  # source of textures
    # f32 HxW per object, in [0, 1]: how much of each pixel shows it
    visible: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Brush:
    """Paints outlines given in local coordinates (x right, y down)."""

    canvas: Canvas  # what it paints on
    matrix: np.ndarray  # f32 2x3, local coordinates -> pixels
    owner: int | None = None  # index of the object that shows where it painted; None: the background

    def fill(
        self,
        outline: np.ndarray,
        colour: np.ndarray,
        *,
        fade: np.ndarray | None = None,
        second: np.ndarray | None = None,
        pattern: Pattern | None = None,
        grain: float = 0.05,
        stretch: float = 1.0,
        roundness: float = 0.0,
        opacity: float = 1.0,
    ) -> None:
        """Paint one part.

        Args:
            outline: f32 [N, 2], local coordinates.
            colour: f32 RGB.
            fade: the colour it turns into towards its lower end.
            second, pattern: another colour and where it replaces the first.
            grain, stretch: deviation of the surface's fine noise, and how much longer than high its grains are.
            roundness: darkening towards the outline and below; 0 (flat) to 1.
            opacity: 0 to 1.
        """
        pixels = outline @ self.matrix[:, :2].T + self.matrix[:, 2]
        window = _window(pixels, self.canvas.picture.shape[:2])
        if window is None:
            return
        mask = _rasterise(pixels, window)
        light = 1 + grain * noise(*mask.shape, 10.0, self.canvas.rng, stretch)
        if roundness:
            light *= _round_light(mask, roundness)
        paint = self._surface(window, np.float32(colour), fade, second, pattern) * light[..., None]
        alpha = mask * np.float32(opacity / 255)
        patch = self.canvas.picture[window]
        patch[:] = cv2.blendLinear(paint, patch, alpha, 1 - alpha)
        for index, visible in enumerate(self.canvas.visible):
            visible[window] += (float(index == self.owner) - visible[window]) * alpha

    def _surface(self, window, colour, fade, second, pattern) -> np.ndarray:
        """The unlit colours of a part: f32 RGB, broadcastable to the window."""
        rows, columns = window
        paint = colour[None, None]
        if fade is not None:
            paint = paint + np.float32(fade - colour) * _ramp(0, 1, rows.stop - rows.start)[..., None]
        if pattern is not None:
            weight = pattern(*self._local_grid(rows, columns), self.canvas.rng)
            paint = paint + (np.float32(second) - paint) * weight[..., None]
        return paint

    def _local_grid(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Local coordinates of the window's pixels, f32 HxW each."""
        inverse = cv2.invertAffineTransform(self.matrix)
        x = np.arange(columns.start, columns.stop, dtype=np.float32)
        y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
        u, v = (inverse[i, 0] * x + (inverse[i, 1] * y + inverse[i, 2]) for i in range(2))
        return u, v


def _window(pixels: np.ndarray, shape: tuple[int, int]) -> tuple[slice, slice] | None:
    """Rows and columns of the picture that an outline touches, None if it lies outside."""
    (left, top), (right, bottom) = np.floor(pixels.min(0)).astype(int) - 1, np.ceil(pixels.max(0)).astype(int) + 2
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, shape[1]), min(bottom, shape[0])
    return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


def _rasterise(pixels: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """Anti-aliased coverage, uint8, of the window's shape."""
    rows, columns = window
    mask = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
    fixed_point = np.round((pixels - np.float32([columns.start, rows.start])) * 16).astype(np.int32)
    return cv2.fillPoly(mask, [fixed_point], 255, cv2.LINE_AA, shift=4)


def _round_light(mask: np.ndarray, strength: float) -> np.ndarray:
    """Brightness of a bulging surface lit from above, f32 HxW around 1."""
    depth = cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 3)
    bulge = np.sqrt(np.minimum(depth / (0.6 * max(float(depth.max()), 1.0)), 1))
    return 1 + np.float32(strength) * (0.45 * (bulge - 0.75) + 0.5 * _ramp(0.5, -0.5, mask.shape[0]))
