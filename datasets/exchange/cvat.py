"""CVAT's "Segmentation mask 1.1": a zip of PNG files, read and written in CVAT by Datumaro's VOC reader.

    labelmap.txt                         name:r,g,b:: of every label, in the order of the indices
    ImageSets/Segmentation/default.txt   ids
    SegmentationClass/ID.png             the labels
    SegmentationObject/ID.png            the objects; 0 is no object. Without it CVAT makes an object of the background.

The PNG files are palette pictures: what reads them as indices and what reads them as colours sees the same labels.
"""

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.base import voc_palette
from datasets.exchange.labels import Item, Labels, hexadecimal
from tools.errors import UserError
from tools.files import atomic_write, mask_image, reading, save_json

CLASSES, OBJECTS, LABEL_MAP = "SegmentationClass/", "SegmentationObject/", "labelmap.txt"
LISTS = "ImageSets/Segmentation/"


def write(folder: Path, items: Sequence[Item], labels: Labels) -> list[Path]:
    """Write `masks.zip`, and `labels.json` for the constructor of the task's labels (Raw).

    Raises:
        UserError: a class name has a colon, which divides the fields of labelmap.txt.
    """
    joined = [name for name in labels.names if ":" in name]
    if joined:
        raise UserError(f"class '{joined[0]}': CVAT's label map cannot hold ':'. Rename the class.")
    lines = [f"{name}:{','.join(map(str, rgb))}::" for name, rgb in zip(labels.names, labels.colours, strict=True)]
    palette = np.array(labels.colours, dtype=np.uint8)
    with atomic_write(folder / "masks.zip") as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
        file.writestr(LABEL_MAP, "\n".join(["# label:color_rgb:parts:actions", *lines]) + "\n")
        file.writestr(f"{LISTS}default.txt", "".join(f"{item.image_id}\n" for item in items))
        for item in items:
            indices = labels.indices(item.mask)
            file.writestr(f"{CLASSES}{item.image_id}.png", _png(indices, palette))
            file.writestr(f"{OBJECTS}{item.image_id}.png", _png(indices, voc_palette()))
    constructor = [
        {"name": name, "color": hexadecimal(rgb), "type": "mask", "attributes": []}
        for name, rgb in zip(labels.names[1:], labels.colours[1:], strict=True)
    ]
    save_json(folder / "labels.json", constructor)
    return [folder / "masks.zip", folder / "labels.json"]


def _png(indices: np.ndarray, palette: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    mask_image(indices, palette).save(buffer, format="PNG")
    return buffer.getvalue()


def read(path: Path, labels: Labels) -> Iterator[tuple[str, np.ndarray | None]]:
    """(name, mask uint8 [H, W]) of each picture in a zip that CVAT, or `write`, made; None if nothing is drawn.

    CVAT lists a photograph without objects, and writes no picture of it.

    Raises:
        UserError: no such zip, without a label map, with a colour that is not in it, or there for two labels.
    """
    remedy = "Export the task again, as 'Segmentation mask 1.1'."
    with reading(path, "zip of masks", remedy), zipfile.ZipFile(path) as file:
        name_of = _read_label_map(path, file.read(LABEL_MAP).decode("utf-8-sig"))
        names = file.namelist()
        pictures = [name for name in names if name.startswith(CLASSES) and name.endswith(".png")]
        drawn = {name.removeprefix(CLASSES).removesuffix(".png"): name for name in pictures}
        lists = [name for name in names if name.startswith(LISTS) and name.endswith(".txt")]
        listed = {i.strip() for name in lists for i in file.read(name).decode("utf-8-sig").splitlines()} - {""}
        for image_id in sorted(listed | drawn.keys()):
            mask = None
            if name := drawn.get(image_id):
                with Image.open(io.BytesIO(file.read(name))) as picture:
                    mask = labels.values(_indices(path, name, picture, name_of, labels))
            yield image_id, mask


def _read_label_map(path: Path, text: str) -> dict[int, str]:
    """The name of the label of each colour, r * 65536 + g * 256 + b."""
    rows = [line.strip().split(":") for line in text.splitlines() if line.strip() and not line.startswith("#")]
    name_of: dict[int, str] = {}
    for row in rows:
        try:
            red, green, blue = map(int, row[1].split(","))
        except (IndexError, ValueError) as error:
            raise UserError(f"{path}: {LABEL_MAP} has a line without a colour: '{':'.join(row)}'.") from error
        first = name_of.setdefault(red << 16 | green << 8 | blue, row[0])
        if first != row[0]:
            raise UserError(
                f"{path}: {LABEL_MAP} gives '{first}' and '{row[0]}' the colour {row[1]}. "
                "Give one another colour in CVAT, and export the task again."
            )
    return name_of


def _indices(path: Path, name: str, picture: Image.Image, name_of: dict[int, str], labels: Labels) -> np.ndarray:
    pixels = np.asarray(picture.convert("RGB")).astype(np.int32)
    colours, which = np.unique(pixels @ [1 << 16, 1 << 8, 1], return_inverse=True)
    unknown = [colour for colour in colours.tolist() if colour not in name_of]
    if unknown:
        rgb = ",".join(map(str, unknown[0].to_bytes(3, "big")))
        raise UserError(f"{path}: {name} has the colour {rgb}, which is not in {LABEL_MAP}. Export the task again.")
    indices = [labels.index(name_of[colour], path) for colour in colours.tolist()]  # other labels are of no object
    return np.array(indices, np.uint8)[which].reshape(pixels.shape[:2])
