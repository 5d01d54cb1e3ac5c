"""Pictures: photographs of any kind as upright RGB, and PNG files.

Decoders accept files that are cut short, and fill what is missing with grey. Here these are refused: a network would
learn the grey.
"""

import contextlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from tools.errors import FileError
from tools.files import atomic_write, reading

warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata, which is not read here
Image.MAX_IMAGE_PIXELS = 2**28  # Pillow refuses twice as many; photographs of some phones have 200 million

EXIF_ORIENTATION = 0x0112

STRAY_BYTES = 16
"""A sound JPEG may have up to this many stray bytes before a marker; some cameras write them."""

_LOST = r"remature end|bad Huffman|bad arithmetic|instead of RST"
"""libjpeg's warnings that a part of the picture is lost; its other warnings are harmless."""

_NO_RANGE = "signed or 32-bit numbers have no known range of grey. Save it with 8 or 16 bits."
_UNKNOWN = {
    rb"\Z": "an empty file",
    b"....ftyp(hei|hev|mif1|msf1)": "HEIC: convert it to JPEG",
    b"II[*+]|MM.[*+]": "a TIFF of floating-point numbers or unusual channels: save RGB or grey of 8 bits",
    b"version https://git-lfs": "a pointer of Git LFS: run git lfs pull",
    rb"\s*<": "a web page: download it again",
}
"""How files begin that Pillow does not know (regular expressions), and what to tell the user."""


def load_image(path: str | os.PathLike) -> np.ndarray:
    """Read a photograph, upright: its EXIF orientation is applied, the rest of its EXIF block ignored.

    Returns:
        uint8 RGB, HxWx3, in [0, 255]. Grey images are repeated over the channels, 12 and 16 bits are scaled to 8,
        transparency and colour profiles are dropped.

    Raises:
        UserError: the file is missing, cannot be decoded to its end, holds several pictures, or holds numbers of an
            unknown range (signed, of 32 bits).
    """
    with reading(path, "image"):
        data = Path(path).read_bytes()
        image = open_picture(io.BytesIO(data))
        seek_picture(path, image)
        pixels = None
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            pixels = _decode_jpeg(data, "progressive" in image.info)
        if pixels is None:
            pixels = _decode(path, image)
        return _turn(pixels, orientation(image))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an open picture, 1 (upright) to 8; 1 if it has none, or none that can be read."""
    try:
        if image.format == "PNG":
            image.load()  # the blocks may follow the pixels
        _forget_xmp(image)
        value = image.getexif().get(EXIF_ORIENTATION, 1)
        return int(value) if value in range(1, 9) else 1
    except Exception:  # Pillow raises many kinds for malformed blocks
        return 1


def _forget_xmp(image: Image.Image) -> None:
    """Leave Pillow no orientation but that of EXIF.

    Without one, some of its versions take that of XMP. Browsers, in which masks are drawn, do not.
    """
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels [H, W, ...] upright, from their EXIF orientation (TIFF 6.0, tag 274)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def upright_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of a photograph as `load_image` returns it, from the file's header only (TIFF: by decoding it).

    Raises:
        UserError: the file is missing, is no image, or holds several pictures.
    """
    with reading(path, "image"), open(path, "rb") as file:
        image = open_picture(file)
        seek_picture(path, image)
        if image.format == "TIFF":  # before decoding, some versions of Pillow give the size of the unturned image
            image.load()
        width, height = image.size
        return (width, height) if orientation(image) >= 5 else (height, width)


def file_orientation(path: str | os.PathLike) -> int:
    """`orientation` of a photograph's file (UserError: see `upright_size`)."""
    with reading(path, "image"), open(path, "rb") as file:
        image = open_picture(file)
        seek_picture(path, image)
        return orientation(image)


def open_picture(file: BinaryIO) -> Image.Image:
    """Open a picture. If Pillow does not know a JPEG, for a malformed resolution in its EXIF block: without the block.

    Raises:
        ValueError: it is of no known format. The text says what the file may be instead.
    """
    with contextlib.suppress(UnidentifiedImageError):
        return Image.open(file)
    file.seek(0)
    data = file.read()
    block = data.find(b"\xff\xe1")
    if data.startswith(b"\xff\xd8") and data[block + 4 : block + 10] == b"Exif\0\0":
        end = block + 2 + int.from_bytes(data[block + 2 : block + 4], "big")
        exif = Image.Exif()
        exif.load(data[block + 4 : end])
        with contextlib.suppress(UnidentifiedImageError):
            image = Image.open(io.BytesIO(data[:block] + data[end:]))
            image.getexif()[EXIF_ORIENTATION] = exif.get(EXIF_ORIENTATION, 1)
            return image
    known = (text for start, text in _UNKNOWN.items() if re.match(start, data, re.DOTALL))
    raise ValueError(next(known, "of no known format"))


def seek_picture(path: str | os.PathLike, image: Image.Image) -> None:
    """Go to the picture of a file that is meant.

    In MPO it is the first (others are depth, gain or another eye), in TIFF the one not marked as a preview (tag 254).

    Raises:
        FileError: an animation or a stack, as nobody says which of its pictures to read; or several previews only.
    """
    count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if image.format == "TIFF" and count > 1:
        pages = []
        for page in range(count):
            image.seek(page)
            pages += [page] * (not image.tag_v2.get(254, 0) & 1)
        if not pages:
            raise FileError(f"{path}: holds {count} previews and no photograph. Replace it by the photograph.")
        image.seek(pages[0])
        count = len(pages)
    _forget_xmp(image)  # Pillow turns TIFF itself, when it decodes
    if count > 1:
        raise FileError(f"{path}: holds {count} pictures. Save the one that is meant as a file of its own.")


def _decode_jpeg(data: bytes, progressive: bool) -> np.ndarray | None:
    """Decode a JPEG to RGB as Pillow does, but refuse one of which libjpeg warns that data are lost.

    Returns:
        uint8 [H, W, 3]; None if it is of a kind that only Pillow decodes.

    Raises:
        ValueError: data are lost, so a part of the picture is grey or noise.
    """
    pixels, fault = _libjpeg(data)
    # Try with an end marker: perhaps only that is missing. (Zeros, or a progressive file: more may be missing.)
    if fault.startswith("Premature end") and not (progressive or data.endswith(bytes(8))):
        pixels, fault = _libjpeg(data + b"\xff\xd9")
    stray = re.search(r"(\d+) extraneous bytes", fault)
    if re.search(_LOST, fault) or (stray and int(stray[1]) > STRAY_BYTES):
        raise ValueError(f"a part of the picture is lost: {fault}")
    return pixels


def _libjpeg(data: bytes) -> tuple[np.ndarray | None, str]:
    """The picture, as far as it can be decoded, and libjpeg's first warning about the file."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB"), ""
    except ValueError as error:
        fault = str(error)
    with contextlib.suppress(ValueError):
        return simplejpeg.decode_jpeg(data, "RGB", strict=False), fault
    return None, fault


def _decode(path: str | os.PathLike, image: Image.Image) -> np.ndarray:
    """Decode a picture of any other kind to RGB."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    depth = tags.get(258, (16,))[0]
    planes, white_is_zero = tags.get(284, 1), tags.get(262, 1) == 0
    if any(sample not in (1, 4) for sample in tags.get(339, ())):
        raise FileError(f"{path}: {_NO_RANGE}")
    if planes == 2 and depth > 8:
        raise FileError(f"{path}: a TIFF of {depth} bits in separate planes. Save it interleaved, or with 8 bits.")
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        white = 2**depth - 1  # Pillow's own conversion to 8 bits would cut all values at 255
        grey = ((np.asarray(image).astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
        return np.repeat((255 - grey if white_is_zero else grey)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise FileError(f"{path}: {_NO_RANGE}")
    return np.asarray(image.convert("RGB"))


def save_png(path: str | os.PathLike, image: Image.Image) -> None:
    """Write a picture as a PNG."""
    with atomic_write(path, durable=False) as temporary:
        image.save(temporary, format="PNG", optimize=False)
