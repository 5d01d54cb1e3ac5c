"""Reading and writing the files that stages exchange: photographs, masks, texts.

Every file is written by `atomic_write`. So a killed run leaves the old file, the new file or none, and a stage that is
started again can trust the files that it finds.
"""

import codecs
import contextlib
import fcntl
import io
import json
import os
import re
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from tools.errors import FileError, UserError

warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata, which is not read here
Image.MAX_IMAGE_PIXELS = 2**28  # Pillow refuses twice as many; photographs of some phones have 200 million

EXIF_ORIENTATION = 0x0112

DELIMITERS = ",;\t"
"""Of the fields of a table: Excel writes its lists with semicolons where the comma is the decimal sign."""

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


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, delete it if not.

    Args:
        durable: wait some milliseconds until the disk has the content and the new name, so that a power cut leaves the
            old file or the new one. Without it, a power cut may leave an empty file; empty files of single images are
            made again (`tools.identity.claim_folder`).

    Raises:
        UserError: the folder cannot be created or written to.
    """
    path = Path(path)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        start = path.stem[:40]  # not all of it: names end at 255 bytes
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{start}.", suffix=path.suffix)
        os.close(handle)
    temporary = Path(name)
    try:
        with writing(path):
            yield temporary
            with contextlib.suppress(PermissionError):  # file systems without such modes, as of Windows shares
                temporary.chmod(0o644)
            if durable:
                _sync(temporary)
            os.replace(temporary, path)
            if durable:
                _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors into a UserError that names the file or folder, and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = "Check free space and permissions, or choose another folder."
        raise UserError(f"{path}: could not be written ({error.strerror}). {remedy}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: str | os.PathLike) -> Path:
    """Create `folder` and prove that a file can be written in it, before hours of work (UserError: it cannot)."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder).close()
    return folder


def file_of(folder: Path, image_id: str, suffix: str) -> Path:
    """The file of an image in a folder that people may have copied, where a Mac writes é as two characters (NFD)."""
    path, copied = (folder / f"{name}{suffix}" for name in (image_id, unicodedata.normalize("NFD", image_id)))
    return copied if copied != path and copied.is_file() and not path.is_file() else path


def check_present(folder: Path, ids: Sequence[str], suffix: str, remedy: str, *, some: bool = False) -> None:
    """Raise UserError unless `folder` has a file of every id, or of at least one if `some` are enough."""
    missing = [image_id for image_id in ids if not file_of(folder, image_id, suffix).is_file()]
    if missing and (not some or len(missing) == len(ids)):
        raise UserError(f"{folder}: {missing[0]}{suffix} is missing ({len(missing)} of {len(ids)} are). {remedy}")


def check_size(
    path: Path, found: Sequence[int], expected: Sequence[int], remedy: str = "Make it again, from this photograph."
) -> None:
    """Raise FileError unless what a file holds has the (height, width) of its photograph."""
    if tuple(found) != tuple(expected):
        sizes = [f"{width}x{height} pixels" for height, width in (found, expected)]
        raise FileError(f"{path}: {sizes[0]}, but its image is {sizes[1]}. {remedy}")


@contextlib.contextmanager
def locked(folder: Path, seconds: float = 60) -> Iterator[bool]:
    """Lock an existing folder for this process. The operating system releases the lock when the process ends.

    Args:
        seconds: how long to wait for another process.

    Yields:
        Whether this process has the lock. Also true where the file system has no locks.
    """
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + seconds
    try:
        while not (mine := _lock(handle)) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield mine
    finally:
        with contextlib.suppress(OSError):
            if mine:
                fcntl.flock(handle, fcntl.LOCK_UN)  # helper processes have the handle too
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def read_text(path: str | os.PathLike) -> str:
    """A text file of a user: UTF-8, or UTF-16 with a byte order mark, as Windows writes it.

    Raises:
        UserError: the file is missing, unreadable or not such text.
    """
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
        if "\0" in text:
            raise UnicodeError  # UTF-16 without its mark
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check that it is a file you may read.") from error
    except UnicodeError as error:
        remedy = "Unpack a zip; save a spreadsheet as CSV." if data.startswith(b"PK") else "Save it as UTF-8."
        raise UserError(f"{path}: not UTF-8 text. {remedy}") from error
    return text


def read_lines(path: str | os.PathLike) -> list[str]:
    """The non-empty lines of a text file, stripped (UserError: see `read_text`)."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_json(path: str | os.PathLike, remedy: str) -> Any:
    """The content of a JSON file (UserError, with the remedy: it cannot be read as such)."""
    with reading(path, "JSON file", remedy):
        return json.loads(Path(path).read_text(encoding="utf-8"))


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
        image = _open(io.BytesIO(data))
        _seek_picture(path, image)
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
        image = _open(file)
        _seek_picture(path, image)
        if image.format == "TIFF":  # before decoding, some versions of Pillow give the size of the unturned image
            image.load()
        width, height = image.size
        return (width, height) if orientation(image) >= 5 else (height, width)


def file_orientation(path: str | os.PathLike) -> int:
    """`orientation` of a photograph's file (UserError: see `upright_size`)."""
    with reading(path, "image"), open(path, "rb") as file:
        image = _open(file)
        _seek_picture(path, image)
        return orientation(image)


def _open(file: BinaryIO) -> Image.Image:
    """Open a picture. If Pillow does not know a JPEG, for a malformed resolution in its EXIF block: without the block.

    Raises:
        UnidentifiedImageError: it is of no known format.
    """
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        data = file.read()
        block = data.find(b"\xff\xe1")
        if not data.startswith(b"\xff\xd8") or data[block + 4 : block + 10] != b"Exif\0\0":
            raise
        end = block + 2 + int.from_bytes(data[block + 2 : block + 4], "big")
        exif = Image.Exif()
        exif.load(data[block + 4 : end])
        image = Image.open(io.BytesIO(data[:block] + data[end:]))
        image.getexif()[EXIF_ORIENTATION] = exif.get(EXIF_ORIENTATION, 1)
        return image


@contextlib.contextmanager
def reading(path: str | os.PathLike, what: str, remedy: str = "") -> Iterator[None]:
    """Turn any error of a decoder into a FileError that names the file, `what` it should be, and the remedy."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such {what}. {remedy}".rstrip()) from error
    except Exception as error:  # for damaged files, decoders raise many kinds: struct.error, KeyError, zlib.error
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            with open(path, "rb") as file:
                start = file.read(64)
            known = (text for form, text in _UNKNOWN.items() if re.match(form, start, re.DOTALL))
            reason = next(known, "of no known format")
        raise FileError(f"{path}: not a readable {what} ({reason}). {remedy or 'Replace or remove it.'}") from error


def _seek_picture(path: str | os.PathLike, image: Image.Image) -> None:
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
        image = _open(io.BytesIO(data))
        if image.format != "PNG":
            lossy = "JPEG changes class indices: make the mask again, as PNG."
            remedy = lossy if image.format == "JPEG" else "Save masks as PNG."
            raise FileError(f"{path}: holds {image.format} data. {remedy}")
        _seek_picture(path, image)
        _open(io.BytesIO(data)).verify()  # the check sums; decoding would not check those of the pixels
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
    with reading(path, "mask"), Image.open(path) as image:
        return _palette_of(image)


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


def save_png(path: str | os.PathLike, image: Image.Image) -> None:
    """Write a picture as a PNG."""
    with atomic_write(path, durable=False) as temporary:
        image.save(temporary, format="PNG", optimize=False)


def save_text(path: str | os.PathLike, text: str) -> None:
    """Write a text in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path: str | os.PathLike, content: object) -> None:
    """Write `content` as indented JSON."""
    save_text(path, json.dumps(content, indent=2) + "\n")
