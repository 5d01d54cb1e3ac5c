"""What `datasets.prepare.shapes` paints: six kinds of objects, their scenes, and things that stand in front.

    SCENES["sea"](brush, rng, w, h)            # fills the picture, returns the height of the horizon
    KINDS["boat"].draw(object_brush, rng)      # facing right, within about [-1, 1] in local coordinates
    occlude(brush, rng, "sea", x, y)

Every object has a discriminative part of fixed looks (the bird's head, the boat's sail, the car's wheels and windows,
the fish's fins and eye, the roof, the sheep's dark head and legs) and a plain part of varying colour. The numbers below
are a drawing: coordinates, colours (hue, saturation, value) and textures, tuned by eye.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from datasets.prepare.shapes_painting import (
    Brush,
    any_colour,
    bar,
    blotches,
    ellipse,
    hsv,
    noise,
    polygon,
    scales,
    smooth,
    stripes,
    tiles,
    vary,
)  # fmt: skip

WHITE, CREAM, BLACK, STEEL = (np.float32(c) for c in ((0.95, 0.96, 0.96), (0.95, 0.91, 0.82), (0.06,) * 3, (0.75,) * 3))
VERTICAL = math.pi / 2  # stripes that follow one another downwards


def _typical(rng: np.random.Generator, hue: float) -> np.ndarray:
    """The colour of a plain part: near its class's hue, or any colour."""
    if rng.random() < 0.15:
        return any_colour(rng)
    return vary(rng, hue, rng.uniform(0.45, 0.95), rng.uniform(0.6, 0.95), 0.035)


# fmt: off
# (outlines are read as rows of points)


def _bird(brush: Brush, rng: np.random.Generator) -> None:
    plumage = _typical(rng, 0.14)
    dark = plumage * 0.35
    lift = rng.uniform(-0.25, 0.35)  # wing beat
    wing = smooth((0.35, -0.02), (0.1, -0.45 - lift), (-0.3, -0.95 - lift * 0.3), (-0.62, -0.8), (-0.5, -0.3),
                  (-0.35, 0.05))
    tail = smooth((-0.5, -0.05), (-1.05, -0.2), (-1.1, 0.12), (-0.95, 0.24), (-0.5, 0.18))
    body = smooth((-0.75, 0.02), (-0.3, -0.2), (0.25, -0.28), (0.62, -0.12), (0.6, 0.15), (0.2, 0.38), (-0.35, 0.3))
    beak = smooth((0.85, -0.22), (1.22, -0.06), (0.82, 0.0), rounds=1)
    far_wing = wing * np.float32([0.8, 0.85]) + np.float32([0.22, -0.02])
    brush.fill(far_wing, dark, second=plumage, pattern=stripes(0.16, 0.5), grain=0.08)
    brush.fill(tail, dark, roundness=0.4)
    brush.fill(body, plumage, roundness=0.9, grain=0.07)
    brush.fill(wing, plumage * 0.8, second=WHITE, pattern=stripes(0.19, 0.45, -0.2), grain=0.08)
    brush.fill(beak, vary(rng, 0.09, 0.95, 0.95, 0.015))
    red = hsv(0.02, rng.uniform(0.7, 0.95), rng.uniform(0.65, 0.9))
    brush.fill(ellipse(0.66, -0.13, 0.26, 0.22), red, roundness=0.8)
    brush.fill(ellipse(0.74, -0.17, 0.055, 0.055), BLACK, grain=0)


def _boat(brush: Brush, rng: np.random.Generator) -> None:
    mast, top = rng.uniform(-0.15, 0.15), rng.uniform(-1.15, -0.85)
    bow, keel = rng.uniform(0.95, 1.15), rng.uniform(0.62, 0.74)
    cloth = vary(rng, rng.choice([0.12, 0.03, 0.58]), rng.uniform(0.02, 0.2), 0.93)
    seams = {"second": hsv(rng.choice([0.0, 0.03, 0.6]), 0.8, 0.75), "pattern": stripes(0.34, VERTICAL, -0.62)}
    sail = polygon((mast - 0.06, top), (mast - 0.06, 0.05), (mast - 0.8, 0.05), (mast - 0.3, -0.4))
    jib = polygon((mast + 0.07, top + 0.15), (mast + 0.3, -0.3), (mast + 0.75, 0.06), (mast + 0.07, 0.06))
    hull = polygon((-0.98, 0.1), (-0.2, 0.18), (0.5, 0.14), (bow, 0.0), (0.86, 0.34), (0.62, keel),
                   (-0.72, keel), (-0.92, 0.4))
    brush.fill(bar((mast, 0.3), (mast, top - 0.08), 0.06), vary(rng, 0.08, 0.4, 0.35))
    brush.fill(sail, cloth, **seams)
    if rng.random() < 0.75:
        brush.fill(jib, cloth * 0.93, **seams)
    paint = _typical(rng, 0.06) * 0.8
    brush.fill(hull, paint, second=paint * 0.72, pattern=stripes(0.17, VERTICAL, -0.7), roundness=0.7)
    brush.fill(bar((-0.96, 0.17), (bow - 0.07, 0.1), 0.09), CREAM * rng.uniform(0.8, 1))


def _car(brush: Brush, rng: np.random.Generator) -> None:
    paint, glass = _typical(rng, 0.64), vary(rng, 0.57, 0.35, 0.3)
    roof, rear, front = rng.uniform(-0.62, -0.45), rng.uniform(-0.85, -0.45), rng.uniform(0.25, 0.5)
    middle, radius = (rear + front) / 2, rng.uniform(0.22, 0.28)
    cabin = smooth((rear - 0.1, 0.02), (rear + 0.12, roof), (front - 0.22, roof), (front + 0.22, 0.02), rounds=2)
    body = smooth((-1.02, 0.05), (-0.85, -0.12), (0.45, -0.12), (0.95, 0.0), (1.06, 0.2), (1.02, 0.42),
                  (-1.02, 0.42), rounds=2)
    brush.fill(cabin, paint, roundness=0.6, grain=0.03)
    brush.fill(body, paint, fade=paint * 0.7, roundness=0.6, grain=0.03)
    for left, right, lean in ((rear + 0.12, middle - 0.04, 0.02), (middle + 0.04, front, 0.17)):
        pane = polygon((left - 0.02, -0.08), (left + 0.07, roof + 0.1), (right - lean, roof + 0.1), (right, -0.08))
        brush.fill(pane, glass, fade=glass * 1.9, second=glass * 2.6, pattern=stripes(0.6, 0.6, -0.6))
    brush.fill(bar((middle, -0.08), (middle, 0.36), 0.025), paint * 0.5, grain=0)
    for x in (-0.6, 0.6):
        brush.fill(ellipse(x, 0.42, radius, radius), BLACK, roundness=0.3)
        brush.fill(ellipse(x, 0.42, radius * 0.58, radius * 0.58), STEEL, roundness=0.8)
    brush.fill(ellipse(0.98, 0.12, 0.07, 0.09), hsv(0.14, 0.3, 1), grain=0)
    brush.fill(ellipse(-0.99, 0.1, 0.05, 0.09), hsv(0, 0.9, 0.85), grain=0)


def _fish(brush: Brush, rng: np.random.Generator) -> None:
    skin, fin = _typical(rng, 0.8), vary(rng, 0.11, 0.9, 0.95, 0.02)
    belly = rng.uniform(0.36, 0.56)
    tail = smooth((-0.45, 0), (-1.05, -0.55), (-0.9, -0.02), (-1.05, 0.55), rounds=2)
    dorsal = smooth((0.3, -belly * 0.8), (0.0, -belly - 0.32), (-0.45, -belly - 0.15), (-0.5, -0.1), rounds=2)
    body = smooth((0.98, 0.04), (0.62, -belly * 0.85), (0.0, -belly * 1.1), (-0.75, -0.1), (-0.75, 0.1),
                  (0.0, belly * 1.1), (0.62, belly * 0.9))
    brush.fill(tail, fin, second=fin * 0.5, pattern=stripes(0.13, VERTICAL))
    brush.fill(dorsal, fin, second=fin * 0.5, pattern=stripes(0.13, 0.2))
    brush.fill(body, skin, fade=skin * 0.6 + 0.35, second=skin * 0.6, pattern=scales(0.17), roundness=0.8, grain=0.06)
    if rng.random() < 0.6:
        for x in (0.18, -0.28):
            band = smooth((x - 0.08, -belly * 0.82), (x + 0.1, -belly * 0.86), (x + 0.16, 0), (x + 0.1, belly * 0.86),
                          (x - 0.08, belly * 0.82), rounds=2)
            brush.fill(band, WHITE, roundness=0.4)
    brush.fill(smooth((0.2, 0.08), (-0.2, 0.02), (-0.26, 0.32), rounds=2), fin, roundness=0.5)
    brush.fill(ellipse(0.66, -0.1, 0.13, 0.13), WHITE, grain=0)
    brush.fill(ellipse(0.69, -0.1, 0.065, 0.065), BLACK, grain=0)


def _house(brush: Brush, rng: np.random.Generator) -> None:
    plaster, clay = _typical(rng, 0.95) * 0.75 + 0.2, vary(rng, 0.02, 0.7, 0.6, 0.015)
    eaves, ridge, inset = rng.uniform(-0.2, 0.0), rng.uniform(-0.9, -0.65), rng.uniform(0.05, 0.5)
    chimney = rng.uniform(-0.6, 0.6) * (1 - inset)
    wall = polygon((-0.92, eaves - 0.05), (0.92, eaves - 0.05), (0.92, 0.75), (-0.92, 0.75))
    roof = polygon((-1.08, eaves), (-1.02 + inset, ridge), (1.02 - inset, ridge), (1.08, eaves))
    brush.fill(bar((chimney, eaves), (chimney, ridge - 0.18), 0.17), clay * 0.7, second=clay * 1.2, pattern=tiles(0.1))
    brush.fill(wall, plaster, second=plaster * 0.75, pattern=stripes(0.14, VERTICAL), grain=0.09, fade=plaster * 0.8)
    brush.fill(roof, clay, second=clay * 0.5, pattern=tiles(0.16), grain=0.08)
    pane, door = vary(rng, rng.choice([0.13, 0.6]), 0.45, 0.5), rng.choice([-0.55, 0.0, 0.55])
    for x in (-0.55, 0.0, 0.55):
        if x == door:
            brush.fill(bar((x, 0.22), (x, 0.75), 0.27), any_colour(rng) * 0.6, roundness=0.3)
        else:
            brush.fill(bar((x, 0.1), (x, 0.47), 0.35), WHITE, grain=0.02)
            brush.fill(bar((x, 0.14), (x, 0.43), 0.27), pane, second=WHITE, pattern=stripes(0.27, 0, -0.9))


def _sheep(brush: Brush, rng: np.random.Generator) -> None:
    wool = hsv(rng.uniform(0.04, 0.14), rng.uniform(0.03, 0.4), rng.uniform(0.5, 0.98))
    skin = vary(rng, 0.06, 0.3, 0.17)
    x, y = rng.uniform(0.72, 0.86), rng.uniform(-0.42, 0.3)  # the head is up, or down in the grass
    fleece = ellipse(-0.08, 0.0, 0.82, rng.uniform(0.46, 0.56), int(rng.integers(11, 15)), 0.05, rng.uniform(0, 3))
    face = smooth((x - 0.24, y - 0.24), (x + 0.05, y - 0.24), (x + 0.3, y + 0.12), (x + 0.2, y + 0.27),
                  (x - 0.12, y + 0.17), rounds=2)
    for foot in (-0.5, -0.3, 0.3, 0.48):
        brush.fill(bar((foot, 0.2), (foot + rng.uniform(-0.1, 0.1), 0.85), 0.15, 0.11), skin * rng.uniform(0.7, 1.2))
    brush.fill(fleece, wool, second=wool * 0.78, pattern=blotches(0.14, 0.1, 1.0), roundness=0.9)
    for side in (-1, 1):
        brush.fill(ellipse(x - 0.12 + 0.02 * side, y - 0.08 + 0.13 * side, 0.17, 0.065), skin * 1.3)
    brush.fill(face, skin, roundness=0.7)
    brush.fill(ellipse(x + 0.02, y - 0.07, 0.045, 0.045), CREAM, grain=0)


# ---------------------------------------------------------------------------------------------------------- scenes
# Lengths are fractions of the image's longer side; w and h are where its right and lower edges lie.


def _everything(w: float, h: float) -> np.ndarray:
    return polygon((-0.05, -0.05), (w + 0.05, -0.05), (w + 0.05, h + 0.05), (-0.05, h + 0.05))


def _ridge(w: float, h: float, y: float, roughness: float, rng: np.random.Generator) -> np.ndarray:
    """Everything below a rolling line at height y."""
    x = np.linspace(-0.05, w + 0.05, 24, dtype=np.float32)
    line = y + roughness * noise(1, 24, 8.0, rng)[0]
    return np.concatenate([np.stack([x, line], 1), polygon((w + 0.05, h + 0.05), (-0.05, h + 0.05))])


def _heaven(brush: Brush, rng: np.random.Generator, w: float, h: float, cloudiness: float) -> None:
    zenith = vary(rng, 0.59, rng.uniform(0.15, 0.6), rng.uniform(0.65, 0.9), 0.02)
    haze = zenith * 0.4 + np.float32([0.58, 0.57, 0.55])
    clouds = blotches(0.35, 1 - cloudiness, 0.6, stretch=1.8)
    brush.fill(_everything(w, h), zenith, fade=haze, second=WHITE * rng.uniform(0.82, 1), pattern=clouds, grain=0.015)


def _bush(brush: Brush, rng: np.random.Generator, x: float, y: float, radius: float, hue: float = 0.28) -> None:
    leaf = vary(rng, hue, 0.5, 0.38)
    outline = ellipse(x, y, radius, radius * rng.uniform(0.7, 1.1), int(rng.integers(6, 10)), 0.08, rng.uniform(0, 3))
    brush.fill(outline, leaf, second=leaf * 1.5, pattern=blotches(0.03, 0.3, 1.5), roundness=0.8, grain=0.12)


def _stones(brush: Brush, rng: np.random.Generator, w: float, top: float, bottom: float, count: int) -> None:
    for _ in range(count):
        x, y, a = rng.uniform(0, w), rng.uniform(top, bottom), rng.uniform(0.01, 0.045)
        grey = hsv(rng.uniform(0.05, 0.15), rng.uniform(0, 0.2), rng.uniform(0.35, 0.7))
        outline = ellipse(x, y, a, a * rng.uniform(0.5, 0.9), 3, 0.08, rng.uniform(0, 3))
        brush.fill(outline, grey, roundness=0.9, grain=0.1)


def _sea(brush: Brush, rng: np.random.Generator, w: float, h: float) -> float:
    _heaven(brush, rng, w, h, rng.uniform(0, 0.7))
    horizon = h * rng.uniform(0.22, 0.42)
    if rng.random() < 0.6:
        land, coast = vary(rng, rng.choice([0.3, 0.6, 0.1]), 0.3, 0.45), _ridge(w, h, horizon - 0.05, 0.025, rng)
        brush.fill(coast, land, second=land * 1.3, pattern=blotches(0.05), grain=0.1)
    water = vary(rng, rng.uniform(0.48, 0.6), rng.uniform(0.3, 0.65), rng.uniform(0.4, 0.65))
    brush.fill(_ridge(w, h, horizon, 0, rng), water * 1.15, fade=water * 0.75, second=water * 0.6 + 0.35,
               pattern=blotches(0.07, 0.5, 0.7, stretch=4), grain=0.1, stretch=4)
    for _ in range(int(rng.integers(2, 8))):  # foam
        x, y, a = rng.uniform(0, w), rng.uniform(horizon + 0.05, h), rng.uniform(0.03, 0.12)
        brush.fill(ellipse(x, y, a, a * 0.1), WHITE, opacity=rng.uniform(0.4, 0.9))
    if rng.random() < 0.35:  # a buoy
        x, y = rng.uniform(0.05, w), rng.uniform(horizon + 0.1, h)
        brush.fill(ellipse(x, y, 0.022, 0.028), hsv(rng.choice([0.0, 0.13]), 0.85, 0.85), roundness=0.8)
    return horizon


def _sky(brush: Brush, rng: np.random.Generator, w: float, h: float) -> float:
    _heaven(brush, rng, w, h, rng.uniform(0.1, 1.0))
    if rng.random() < 0.45:  # tree tops
        for x in np.arange(0, w + 0.1, 0.11):
            _bush(brush, rng, x + rng.normal(0, 0.03), h + 0.03 + rng.normal(0, 0.03), rng.uniform(0.07, 0.14))
    elif rng.random() < 0.5:
        hill = vary(rng, 0.6, 0.2, 0.5)
        brush.fill(_ridge(w, h, h * 0.86, 0.05, rng), hill, fade=hill * 1.2, grain=0.08)
    return h * 0.15


def _pasture(brush: Brush, rng: np.random.Generator, w: float, h: float) -> float:
    _heaven(brush, rng, w, h, rng.uniform(0, 0.8))
    horizon = h * rng.uniform(0.12, 0.36)
    brush.fill(_ridge(w, h, horizon - 0.05, 0.03, rng), vary(rng, 0.33, 0.35, 0.5), grain=0.1)
    for _ in range(int(rng.integers(0, 4))):
        _bush(brush, rng, rng.uniform(0, w), horizon - 0.02, rng.uniform(0.03, 0.08))
    grass = vary(rng, 0.26, rng.uniform(0.45, 0.7), rng.uniform(0.42, 0.62))
    brush.fill(_ridge(w, h, horizon, 0.01, rng), grass * 1.15, fade=grass * 0.85, second=grass * 0.65,
               pattern=blotches(0.05, 0.2, 1.0, stretch=0.45), grain=0.16, stretch=0.4)
    petals = hsv(rng.choice([0.14, 0.0, 0.8]), rng.choice([0.05, 0.7]), 0.97)
    for _ in range(int(rng.integers(0, 14))):
        brush.fill(ellipse(rng.uniform(0, w), rng.uniform(horizon + 0.05, h), 0.009, 0.009), petals, grain=0)
    _stones(brush, rng, w, horizon + 0.05, h, int(rng.integers(0, 4)))
    return horizon


def _street(brush: Brush, rng: np.random.Generator, w: float, h: float) -> float:
    _heaven(brush, rng, w, h, rng.uniform(0, 0.8))
    kerb = h * rng.uniform(0.3, 0.42)
    road = kerb + rng.uniform(0.05, 0.12)
    _buildings(brush, rng, w, kerb)
    paving = CREAM * rng.uniform(0.58, 0.75)
    brush.fill(_ridge(w, h, kerb, 0, rng), paving, second=paving * 0.8, pattern=tiles(0.07), grain=0.08)
    asphalt = hsv(rng.uniform(0.55, 0.7), rng.uniform(0.02, 0.12), rng.uniform(0.28, 0.48))
    brush.fill(_ridge(w, h, road, 0, rng), asphalt * 1.15, fade=asphalt * 0.85, second=asphalt * 0.75,
               pattern=blotches(0.2), grain=0.11)
    line, dash = rng.uniform(road + 0.1, h), rng.uniform(0.12, 0.25)
    for x in np.arange(rng.uniform(-0.2, 0), w, dash * 1.8):
        brush.fill(bar((x, line), (x + dash, line), 0.028), CREAM * rng.uniform(0.85, 1), grain=0.1)
    return road


def _buildings(brush: Brush, rng: np.random.Generator, w: float, foot: float) -> None:
    x = -0.05
    while x < w:
        width, top = rng.uniform(0.12, 0.3), foot - rng.uniform(0.1, 0.32)
        front = hsv(rng.uniform(0.02, 0.14), rng.uniform(0.05, 0.3), rng.uniform(0.4, 0.75))
        block = polygon((x, top), (x + width, top), (x + width, foot + 0.02), (x, foot + 0.02))
        storeys = stripes(0.055, rng.choice([0.0, VERTICAL]), -0.3)
        brush.fill(block, front, second=front * 0.55, pattern=storeys, grain=0.06)
        x += width + rng.choice([0.0, 0.03])


def _reef(brush: Brush, rng: np.random.Generator, w: float, h: float) -> float:
    water = vary(rng, rng.uniform(0.46, 0.57), rng.uniform(0.55, 0.85), rng.uniform(0.5, 0.75))
    rays = stripes(rng.uniform(0.2, 0.4), rng.uniform(-0.4, 0.4), -0.3, 0.05)
    brush.fill(_everything(w, h), water * 1.25, fade=water * 0.5, second=water, pattern=rays, grain=0.06)
    floor = h * rng.uniform(0.78, 0.92)
    sand = vary(rng, 0.12, 0.35, 0.65) * 0.6 + water * 0.35
    ripples = blotches(0.05, 0.3, 1.0, stretch=3)
    brush.fill(_ridge(w, h, floor, 0.02, rng), sand, second=sand * 0.8, pattern=ripples, grain=0.1)
    _stones(brush, rng, w, floor, h, int(rng.integers(1, 6)))
    for hue in rng.choice([0.95, 0.75, 0.05], int(rng.integers(0, 4))):  # corals
        _bush(brush, rng, rng.uniform(0, w), h * rng.uniform(0.93, 1.0), rng.uniform(0.04, 0.1), hue)
    for radius in rng.uniform(0.006, 0.02, int(rng.integers(0, 9))):
        bubble = ellipse(rng.uniform(0, w), rng.uniform(0, floor), radius, radius)
        brush.fill(bubble, water + 0.35, roundness=0.9, opacity=0.6)
    return h * 0.15


def _winter(brush: Brush, rng: np.random.Generator, w: float, h: float) -> float:
    _heaven(brush, rng, w, h, rng.uniform(0.3, 1.0))
    horizon = h * rng.uniform(0.25, 0.42)
    peaks = _ridge(w, h, horizon - 0.14, 0.07, rng)
    brush.fill(peaks, vary(rng, 0.6, 0.15, 0.55), second=WHITE, pattern=blotches(0.08), grain=0.08)
    for x in np.arange(rng.uniform(0, 0.1), w, rng.uniform(0.08, 0.2)):
        fir = polygon((x - 0.05, horizon + 0.02), (x, horizon - rng.uniform(0.1, 0.25)), (x + 0.05, horizon + 0.02))
        brush.fill(fir, vary(rng, 0.4, 0.35, 0.28), grain=0.2)
    snow = vary(rng, 0.6, 0.06, 0.88, 0.02)
    drifts = blotches(0.12, 0.2, 0.6, stretch=3)
    brush.fill(_ridge(w, h, horizon, 0.012, rng), snow, fade=snow * 0.9, second=snow * 0.85, pattern=drifts, grain=0.04)
    _stones(brush, rng, w, horizon + 0.08, h, int(rng.integers(0, 6)))
    return horizon


# ------------------------------------------------------------------------------------------------- things in front


def _tuft(brush: Brush, rng: np.random.Generator, x: float, y: float, hue: float, height: float) -> None:
    """Blades of grass, reed or seaweed growing from (x, y)."""
    for _ in range(int(rng.integers(9, 16))):
        foot, lean, tip = x + rng.normal(0, 0.045), rng.normal(0, 0.06), height * rng.uniform(0.5, 1.1)
        brush.fill(bar((foot, y), (foot + lean, y - tip), 0.022, 0.004), vary(rng, hue, 0.6, 0.45), grain=0.1)


def _pole(brush: Brush, rng: np.random.Generator, x: float, y: float) -> None:
    metal = hsv(rng.uniform(0, 1), rng.uniform(0, 0.4), rng.uniform(0.3, 0.8))
    brush.fill(bar((x, y), (x, y - rng.uniform(0.35, 0.9)), rng.uniform(0.025, 0.045)), metal, roundness=0.6)


def _branch(brush: Brush, rng: np.random.Generator, x: float, y: float) -> None:
    tilt = rng.uniform(-0.25, 0.25)
    brush.fill(bar((x - 0.45, y + tilt), (x + 0.45, y - tilt), 0.035, 0.015), vary(rng, 0.07, 0.4, 0.3), grain=0.2)
    for t in rng.uniform(-0.45, 0.45, int(rng.integers(4, 9))):
        _bush(brush, rng, x + t, y - tilt * t / 0.45, rng.uniform(0.02, 0.045))


# fmt: on


def occlude(brush: Brush, rng: np.random.Generator, scene: str, x: float, y: float) -> None:
    """Put something of the scene in front of the object whose lower end is at (x, y)."""
    if scene == "sky":
        _branch(brush, rng, x, y - rng.uniform(0.05, 0.3))
    elif scene == "street":
        _pole(brush, rng, x, y + 0.08)
    elif scene == "reef":
        _tuft(brush, rng, x, y + 0.12, rng.choice([0.25, 0.35, 0.9]), rng.uniform(0.25, 0.45))
    elif scene == "sea":
        _tuft(brush, rng, x, y + 0.08, 0.16, rng.uniform(0.2, 0.4))
    elif rng.random() < 0.5:
        _bush(brush, rng, x, y, rng.uniform(0.07, 0.13))
    else:
        _tuft(brush, rng, x, y + 0.05, 0.24, rng.uniform(0.15, 0.3))


@dataclass(frozen=True)
class Kind:
    """A class: how it is drawn, where it lives, whom it meets, and how it stands."""

    draw: Callable[[Brush, np.random.Generator], None]  # paints it, facing right
    # scenes, the most usual first; they are shared, so that a scene alone does not tell the class
    homes: tuple[str, ...]
    companions: tuple[str, ...]  # classes that may stand beside it
    tilt: float  # standard deviation of its rotation, radians
    lower_end: float  # local y of its lowest point
    floats: bool = False  # flies or swims, so it needs no ground and casts no shadow


SCENES = {"reef": _reef, "sea": _sea, "sky": _sky, "street": _street, "pasture": _pasture, "winter": _winter}
KINDS = {
    "bird": Kind(_bird, ("sky", "sea", "pasture"), ("boat", "house", "sheep"), 0.3, 0.4, floats=True),
    "boat": Kind(_boat, ("sea", "reef"), ("bird", "fish", "house"), 0.07, 0.7),
    "car": Kind(_car, ("street", "winter", "pasture"), ("house", "bird", "sheep"), 0.05, 0.68),
    "fish": Kind(_fish, ("reef", "sea"), ("boat", "bird"), 0.2, 0.5, floats=True),
    "house": Kind(_house, ("winter", "pasture", "street"), ("car", "sheep", "bird"), 0.02, 0.75),
    "sheep": Kind(_sheep, ("pasture", "winter"), ("house", "car", "bird"), 0.06, 0.85),
}
