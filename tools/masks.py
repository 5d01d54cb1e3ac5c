"""Masks: PNG files of class indices, 0 background, 255 ignore."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from tools.errors import FileError
from tools.files import reading
from tools.pictures import open_picture, orientation, save_png, seek_picture


def load_mask(path: str | os.PathLike, palette: np.ndarray | None = None, num_classes: int = 256) -> np.ndarray:
    """Read a segmentation mask: a PNG of class indices, in grey (1, 8 or 16 bits) or with a palette.

    Args:
        palette: uint8 [256, 3], the colours of the classes. With it, masks are refused whose indices are wrong because
            an optimiser or editor has sorted their palette.

    Returns:
        uint8 HxW of class indices: 0 background, 255 ignore.

    Raises:
        UserError: the file is missing, unreadable, or not such a mask.
    """
    with reading(path, "mask"):
        data = Path(path).read_bytes()
        image = open_picture(io.BytesIO(data))
        if image.format != "PNG":
            lossy = "JPEG changes class indices: make the mask again, as PNG."
            remedy = lossy if image.format == "JPEG" else "Save masks as PNG."
            raise FileError(f"{path}: holds {image.format} data. {remedy}")
        seek_picture(path, image)
        open_picture(io.BytesIO(data)).verify()  # the check sums; decoding would not check those of the pixels
        depth, kind = data[24], data[25]  # from the header: bits per sample; 0 grey, 3 palette, others in colour
        colours, mask, turn = _palette_of(image), np.asarray(image), orientation(image)
    if turn != 1:
        raise FileError(f"{path}: carries the EXIF orientation {turn}. Turn it upright and save it without.")
    if kind not in (0, 3):
        raise FileError(f"{path}: holds {image.mode} colours, but masks hold class indices. {_save_indices(mask)}")
    if kind == 0 and depth in (2, 4) and mask.any():
        raise FileError(f"{path}: grey of {depth} bits, which programs read as different indices. Save it with 8.")
    if mask.max() > 255:
        raise FileError(f"{path}: 16 bits, and the value {mask.max()}. Class indices end at 255: save it with 8 bits.")
    if colours is not None and palette is not None:
        _check_palette(path, mask, colours, palette, num_classes)
    return mask.astype(np.uint8)


def mask_colours(path: str | os.PathLike) -> np.ndarray | None:
    """The palette of a mask: uint8 [256, 3], black where it has no entry; None for a grey mask.

    Raises:
        UserError: the file is missing or unreadable.
    """
    with reading(path, "mask"), open(path, "rb") as file:
        return _palette_of(open_picture(file))


def _palette_of(image: Image.Image) -> np.ndarray | None:
    """The palette of an open PNG, from its header only: `Image.getpalette` would decode the file."""
    if image.mode != "P":
        return None
    colours = np.frombuffer(image.palette.palette, np.uint8)
    return np.concatenate([colours, np.zeros(768 - len(colours), np.uint8)]).reshape(256, 3)


def count_values(mask: np.ndarray) -> np.ndarray:
    """How many pixels of a mask (uint8 HxW) have each value: int64 [256]. Faster than `np.bincount`."""
    return np.array(Image.fromarray(mask).histogram())


def _save_indices(pixels: np.ndarray) -> str:
    """What to do with a mask in colour, [H, W, 2 to 4]."""
    if pixels.shape[2] == 2 or (pixels[..., :1] == pixels[..., :3]).all():
        return "They are greys: save one channel, as a grey PNG of 8 bits."
    return "Replace each colour by the index of its class, and save a palette or grey PNG."


def _check_palette(
    path: str | os.PathLike, mask: np.ndarray, colours: np.ndarray, palette: np.ndarray, num_classes: int
) -> None:
    """Refuse a mask whose colours are all colours of classes, but some not of the class that the index means.

    Two colour maps are known: the dataset's; and grey i for class i. White on black may stand for any index, as masks
    of one class are often drawn so.
    """
    used = np.flatnonzero(count_values(mask)).tolist()
    shown = {index: tuple(colours[index].tolist()) for index in used}
    values = (*range(min(num_classes, 255)), 255)
    classes, greys = {tuple(palette[i].tolist()): i for i in values}, {(i, i, i): i for i in values}
    black, white = (0, 0, 0), (255, 255, 255)
    drawn = {i: c for i, c in shown.items() if c != white} if {black, white} >= {*shown.values()} else shown
    for colour_map, entries in ((classes, shown), (greys, drawn)):
        meant = {index: colour_map.get(colour) for index, colour in entries.items()}
        distinct = len(set(meant.values())) == len(meant)
        moved = [(index, other) for index, other in meant.items() if index != other]
        if not moved:
            return  # VOC's colour of class 7 is also the grey of class 128
        if distinct and None not in meant.values():
            index, other = moved[0]
            raise FileError(
                f"{path}: index {index} has the colour of class {other}. Its palette was sorted by an optimiser or "
                "editor: save the mask again from its colours, or without a palette if its indices are right."
            )


def save_mask(path: str | os.PathLike, mask: np.ndarray, palette: np.ndarray) -> None:
    """Write class indices (uint8 HxW) as a PNG with `palette` (uint8 256x3), so that any viewer shows the classes."""
    save_png(path, mask_image(mask, palette))


def mask_image(mask: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Class indices (uint8 HxW) as a picture with `palette` (uint8 256x3)."""
    image = Image.fromarray(mask.astype(np.uint8), mode="P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image
