"""Mask proposals that another program made: a folder of Segment Anything's `amg.py`, or RLE files in JSON.

    masks = read_masks(Path("sam_masks"), ["2007_000032"], [image])

Either of these is read for the image ID:

    ID/metadata.csv, ID/0.png, ID/1.png ...   as `amg.py` writes them: 0 outside, anything else inside
    ID.json                                   COCO RLE: `amg.py --convert-to-rle` (a list of {"segmentation": ...}), or
                                              SA-1B's layout ({"annotations": [{"segmentation": ...}]})
"""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tools.errors import FileError, UserError
from tools.files import check_size, file_of, load_mask, read_text, reading
from tools.identity import contents
from tools.proposals import load_proposals
from tools.rle import encode


def mask_file(root: Path, image_id: str) -> Path:
    """The file that lists an image's masks, or holds them."""
    pictures = file_of(root, image_id, "/metadata.csv")
    return pictures if pictures.is_file() else file_of(root, image_id, ".json")


def fingerprints(root: Path, image_ids: Sequence[str]) -> dict[str, str]:
    """What tells the masks of each image apart from others: the content of its list, and how large its pictures are."""
    files = {image_id: mask_file(root, image_id) for image_id in image_ids}
    sizes = {i: f" {sum(_sizes(file.parent))}" if file.suffix == ".csv" else "" for i, file in files.items()}
    return {image_id: content + sizes[image_id] for image_id, content in contents(files).items()}


def _sizes(folder: Path) -> Iterator[int]:
    return (entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".png"))


def read_masks(root: Path, image_ids: Sequence[str], images: Sequence[np.ndarray]) -> list[list[dict]]:
    """The masks of each image, uint8 RGB HxWx3, as COCO RLE.

    Args:
        root: the folder with an ID/ or an ID.json for every image.

    Raises:
        UserError: no such folder, an image has no masks, a file is damaged, or is made for another size of image.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of masks. Pass the output folder of amg.py to --mask_files.")
    return [_read(root, image_id, image.shape[:2]) for image_id, image in zip(image_ids, images, strict=True)]


def _read(root: Path, image_id: str, size: tuple[int, int]) -> list[dict]:
    file = mask_file(root, image_id)
    if file.suffix == ".csv":
        return _read_pictures(file.parent, size)
    if file.is_file():
        return load_proposals(file, size)
    raise FileError(f"{root}: no masks of {image_id}: neither {image_id}/metadata.csv nor {image_id}.json.")


def _read_pictures(folder: Path, size: tuple[int, int]) -> list[dict]:
    """The masks that metadata.csv lists; `amg.py` writes it last, so they should all be there."""
    path = folder / "metadata.csv"
    with reading(path, "list of masks", "Run amg.py again."):
        table = csv.DictReader(io.StringIO(read_text(path), newline=""))
        if "id" not in (table.fieldnames or ()):  # an empty file is not a list of no masks
            raise ValueError("no column id")
        names = [row["id"] for row in table]
    masks = []
    for name in names:
        picture = load_mask(folder / f"{name}.png")
        check_size(folder / f"{name}.png", picture.shape, size)
        masks += encode(picture[None] > 0)
    return masks
