"""COCO's json of objects (`instances.json`): one object per class and image, its pixels as compressed RLE.

Read back are polygons and both kinds of RLE, several objects per class, smaller ones painted over larger ones.
`iscrowd` does not count: CVAT sets it for every brush stroke. Boxes are refused. Polygons of one or two points are
stray clicks, and paint nothing.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from datasets.exchange.labels import Item, Labels
from datasets.prepare.coco14 import check_references, outline, paint
from tools.errors import UserError
from tools.files import read_text, reading, save_json
from tools.rle import encode


def write(folder: Path, items: Sequence[Item], labels: Labels) -> list[Path]:
    """Write `instances.json`."""
    images, annotations = [], []
    for number, item in enumerate(items, start=1):
        height, width = item.mask.shape
        images.append({"id": number, "file_name": item.file, "height": height, "width": width})
        for code in _objects(labels.indices(item.mask)):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **code})
    categories = [{"id": index, "name": name} for index, name in enumerate(labels.names) if index]
    save_json(folder / "instances.json", {"images": images, "annotations": annotations, "categories": categories})
    return [folder / "instances.json"]


def _objects(indices: np.ndarray) -> Iterator[dict]:
    classes = np.unique(indices[indices > 0])
    for index, code in zip(classes.tolist(), encode(indices == classes[:, None, None]), strict=True):
        yield {
            "category_id": index,
            "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
            "area": int(coco_mask.area(code)),
            "bbox": coco_mask.toBbox(code).tolist(),
            "iscrowd": 0,
        }


def read(path: Path, labels: Labels) -> Iterator[tuple[str, np.ndarray]]:
    """(name, mask uint8 [H, W]) of each image of a COCO json.

    Raises:
        UserError: no such json, one with boxes, or one with an id that is there twice or not at all.
    """
    with reading(path, "COCO json of objects", "Export it again, by itself."):
        content = json.loads(read_text(path))
        check_references(content)
        name_of = {category["id"]: category["name"] for category in content["categories"]}  # some are of no object
        file_of = {image["id"]: image["file_name"] for image in content["images"]}
        objects: dict[int, list] = {image_id: [] for image_id in file_of}
        for one in content["annotations"]:
            if not _is_drawn(one.get("segmentation")):
                raise UserError(
                    f"{path}: an object of '{file_of[one['image_id']]}' has no outline. Draw polygons or brush "
                    "strokes, not boxes, and export again."
                )
            if (shape := outline(one["segmentation"])) is not None:
                index = labels.index(name_of[one["category_id"]], path)
                objects[one["image_id"]].append((index, False, shape))
        for image in content["images"]:
            indices = paint(objects[image["id"]], image["height"], image["width"])
            yield PureWindowsPath(image["file_name"]).with_suffix("").as_posix(), labels.values(indices)


def _is_drawn(shape: Any) -> bool:
    """Whether a `segmentation` holds run lengths, or polygons as COCO writes them: x, y, x, y, ..., not pairs."""
    if isinstance(shape, list):
        numbers = [number for polygon in shape for number in polygon]
        return bool(numbers) and not isinstance(numbers[0], list)
    return bool(shape and shape["counts"])
