"""Pictures of masks: classes painted over a photograph, a legend of their colours.

save_overlay("overlays/ID.jpg", image, mask, source.info)
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.files import atomic_write
from tools.options import IGNORE_INDEX

OVERLAY_SIDE = 1280
STRIP = 256  # rows painted at a time: colours as floats take ten times the memory of the photograph
GAP, MARGIN, LINE = 6, 18, 26
PAPER, INK, FAINT = (255, 255, 255), (28, 28, 30), (120, 120, 126)


def overlay(image: np.ndarray, mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Paint classes over a pale grey copy of the photograph: background stays grey, ignored pixels become white.

    Photograph and result are uint8 RGB [H, W, 3], the mask is uint8 [H, W], the palette uint8 [256, 3].
    """
    strips = [slice(start, start + STRIP) for start in range(0, len(image), STRIP)]
    return np.concatenate([_painted(image[rows], mask[rows], palette) for rows in strips])


def _painted(image: np.ndarray, mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    paper = np.repeat((0.55 * grey + 70)[..., None], 3, axis=2)
    colours = palette.astype(np.float32).copy()
    colours[IGNORE_INDEX] = 255
    opacity = np.where(mask == 0, 0.0, 0.72)[..., None]
    return (opacity * colours[mask] + (1 - opacity) * paper).clip(0, 255).astype(np.uint8)


def save_overlay(path: Path, image: np.ndarray, mask: np.ndarray, info: Any) -> None:
    """Write `overlay`, at most `OVERLAY_SIDE` pixels long, with the legend of its classes below, as a JPEG."""
    painted = Image.fromarray(overlay(image, mask, info.palette))
    painted.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
    buffer = io.BytesIO()  # Pillow itself does not notice a disk that gets full in the last block of a JPEG
    with_legend(painted, info, np.unique(mask).tolist()).save(buffer, format="JPEG", quality=92)
    with atomic_write(path, durable=False) as temporary:
        temporary.write_bytes(buffer.getvalue())


def with_legend(picture: Image.Image, info: Any, indices: Sequence[int]) -> Image.Image:
    """The picture, and below it the `legend`. White is added on the right if the legend is wider."""
    below = legend(info, indices, picture.width)
    sheet = Image.new("RGB", (below.width, picture.height + below.height), PAPER)
    sheet.paste(picture)
    sheet.paste(below, (0, picture.height))
    return sheet


def legend(info: Any, indices: Sequence[int], width: int) -> Image.Image:
    """Colour swatches with class names, wrapped to `width`, or to the longest name if that needs more.

    Background is left out: it is the unpainted photograph.
    """
    entries = [("ignored" if i == IGNORE_INDEX else info.classes[i], i) for i in indices if i != 0]
    face, swatch, places = ImageFont.load_default(size=15), 16, []
    x, y = MARGIN, GAP
    for text, index in entries:
        needed = swatch + 8 + math.ceil(face.getlength(text))
        step, width = needed + 22, max(width, MARGIN + needed + GAP)
        if x + step > width - MARGIN and x > MARGIN:
            x, y = MARGIN, y + LINE
        places.append((x, y, text, index))
        x += step
    picture = Image.new("RGB", (width, y + LINE), PAPER)
    draw = ImageDraw.Draw(picture)
    for x, y, text, index in places:
        colour = PAPER if index == IGNORE_INDEX else tuple(int(v) for v in info.palette[index])
        draw.rectangle((x, y, x + swatch, y + swatch), fill=colour, outline=FAINT)
        draw.text((x + swatch + 8, y + swatch // 2), text, fill=INK, font=face, anchor="lm")
    return picture
