"""Mask proposals that another program made: a folder of Segment Anything's `amg.py`, or RLE files in JSON.

    masks = MaskFiles("sam_masks")(["2007_000032"], [image])

Either of these is read for the image ID:

    ID/metadata.csv, ID/0.png, ID/1.png ...   as `amg.py` writes them: 0 outside, anything else inside
    ID.json                                   COCO RLE: `amg.py --convert-to-rle` (a list of {"segmentation": ...}), or
                                              SA-1B's layout ({"annotations": [{"segmentation": ...}]})
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_rle

from tools.errors import UserError
from tools.files import load_mask
from tools.runs import Runs


class MaskFiles:
    """Proposals read from files. Satisfies `tools.proposals.ProposalGenerator`."""

    images_per_call = 1

    def __init__(self, root: str | os.PathLike) -> None:
        """
        Args:
            root: the folder with an ID/ or an ID.json for every image.

        Raises:
            UserError: no such folder.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{root}: no such folder of masks. Pass the output folder of amg.py to --mask_files.")

    def __call__(self, image_ids: Sequence[str], images: Sequence[np.ndarray]) -> list[np.ndarray | list[dict]]:
        """The masks of each image, uint8 RGB HxWx3: bool [N, H, W] from pictures, COCO RLE from JSON.

        Raises:
            UserError: an image has no masks, a file is damaged, or is made for another size of image.
        """
        return [self._read(image_id, image.shape[:2]) for image_id, image in zip(image_ids, images, strict=True)]

    def _read(self, image_id: str, size: tuple[int, int]) -> np.ndarray | list[dict]:
        folder, file = self.root / image_id, self.root / f"{image_id}.json"
        if (folder / "metadata.csv").is_file():
            return _read_pictures(folder, size)
        if file.is_file():
            return _read_rle(file, size)
        raise UserError(f"{self.root}: no masks of {image_id}: neither {image_id}/metadata.csv nor {image_id}.json.")


def _read_pictures(folder: Path, size: tuple[int, int]) -> np.ndarray:
    """The masks that metadata.csv lists; `amg.py` writes it last, so they should all be there."""
    try:
        with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
            names = [row["id"] for row in csv.DictReader(file)]
    except (KeyError, ValueError, csv.Error) as error:
        raise UserError(f"{folder}/metadata.csv: not a list of masks (no column 'id'). Run amg.py again.") from error
    masks = np.zeros((len(names), *size), dtype=bool)
    for mask, name in zip(masks, names, strict=True):
        picture = load_mask(folder / f"{name}.png")
        if picture.shape != size:
            raise UserError(_other_size(folder / f"{name}.png", picture.shape, size))
        mask[:] = picture > 0
    return masks


def _read_rle(file: Path, size: tuple[int, int]) -> list[dict]:
    try:
        content = json.loads(file.read_bytes())
        records = content["annotations"] if isinstance(content, dict) else content
        masks = [_compressed(record["segmentation"]) for record in records]
        for mask in masks:
            if tuple(mask["size"]) != size:
                raise UserError(_other_size(file, mask["size"], size))
        Runs.from_rle(masks, size)  # finds damage
        return masks
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not masks as COCO RLE ({error}). Write them again.") from error


def _compressed(mask: dict) -> dict:
    """A mask's RLE with its counts as text; COCO also knows them as a list of numbers."""
    if isinstance(mask["counts"], list):
        mask = coco_rle.frPyObjects(mask, *mask["size"])
        mask["counts"] = mask["counts"].decode("ascii")
    return mask


def _other_size(path: Path, found: Sequence[int], expected: Sequence[int]) -> str:
    return (
        f"{path}: masks of {found[1]}x{found[0]} pixels, but the image has {expected[1]}x{expected[0]}. "
        "Make them from the same images."
    )
