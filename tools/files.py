"""Reading and writing the files the stages hand to each other.

Every writer goes through `atomic_write`, so a killed run leaves either the old file, the new file or nothing:
that is what lets each stage trust whatever it finds and continue where it stopped.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tools.errors import UserError

_DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files it cannot decode; SyntaxError is its word for a broken PNG."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, delete it if not.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write there ({error.strerror}). Choose a writable folder.") from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error.strerror}). Check free space and permissions."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike) -> Path:
    """Create `folder` and prove that a file can be written in it, before hours of work depend on that.

    Raises:
        UserError: it cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}). Choose a writable folder.") from error
    return folder


def read_text(path: str | os.PathLike) -> str:
    """A text file of somebody's making: UTF-8, or UTF-16 that says so at its start, as Windows writes it.

    Raises:
        UserError: the file is missing, unreadable or not such text.
    """
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
        if "\0" in text:
            raise UnicodeError  # no text has it; UTF-16 without its mark does
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check what it is and its permissions.") from error
    except UnicodeError as error:
        raise UserError(f"{path}: not UTF-8 text. Save it as UTF-8.") from error
    return text


def read_lines(path: str | os.PathLike) -> list[str]:
    """The non-empty lines of a text file, stripped.

    Raises:
        UserError: see `read_text`.
    """
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def load_image(path: str | os.PathLike) -> np.ndarray:
    """Read a photograph, upright (EXIF orientation applied).

    Returns:
        uint8 RGB, HxWx3, in [0, 255]. Grey images are repeated over the channels, 16 bits are scaled to 8, transparency
        is dropped.

    Raises:
        UserError: the file is missing, is not an image that can be decoded to its end, or holds 32-bit numbers.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):
                upright = _eight_bits(upright)
            if upright.mode in ("I", "F"):
                raise UserError(f"{path}: 32-bit numbers have no known range of grey. Save it with 8 or 16 bits.")
            return np.asarray(upright.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such image.") from error
    except _DAMAGED as error:
        raise UserError(f"{path}: not a readable image ({error}). Replace or remove it.") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, white staying white. (Pillow's own conversion would cut all values at 255.)"""
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))


def load_mask(path: str | os.PathLike) -> np.ndarray:
    """Read a segmentation mask stored as a palette or grey PNG.

    Returns:
        uint8 HxW of class indices: 0 background, 255 ignore.

    Raises:
        UserError: the file is missing, unreadable, or holds colours instead of indices.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise UserError(f"{path}: a {image.mode} picture, but masks hold class indices (palette or grey PNG).")
            return np.asarray(image, dtype=np.uint8)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such mask.") from error
    except _DAMAGED as error:
        raise UserError(f"{path}: not a readable mask ({error}). Replace or remove it.") from error


def save_mask(path: str | os.PathLike, mask: np.ndarray, palette: np.ndarray) -> None:
    """Write class indices (uint8 HxW) as a PNG with `palette` (uint8 256x3), so that any viewer shows the classes."""
    image = Image.fromarray(mask.astype(np.uint8), mode="P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", optimize=False)


def save_json(path: str | os.PathLike, content: object) -> None:
    """Write `content` as indented JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def claim_folder(folder: str | os.PathLike, settings: dict[str, object]) -> Path:
    """Create `folder`, or make sure that what is in it was made with the same settings (JSON-able values).

    Without this, a stage started again with other settings would take the old files for its own.

    Raises:
        UserError: it was made with others, or cannot be written to.
    """
    folder = check_writable(folder)
    record = folder / "settings.json"
    if not record.exists():
        save_json(record, settings)
    elif json.loads(record.read_text(encoding="utf-8")) != settings:
        raise UserError(
            f"{folder}: made with other settings (see {record.name}). Delete the folder or choose another --tag."
        )
    return folder
