"""COCO 2014: the official `instances_*.json` turned into class masks, image labels and lists of ids.

    convert(Path("data/coco14"), workers=8)

    ROOT/train2014/COCO_train2014_000000000009.jpg  ROOT/val2014/...         photographs, as COCO ships them
    ROOT/annotations/instances_train2014.json  .../instances_val2014.json    read
    ROOT/classes.txt  labels.csv  masks/ID.png  splits/train2014.txt  splits/val2014.txt    written

Classes are the categories by ascending id (ids have gaps), so category 1 is class 1 and category 90 is class 80. Image
labels are the classes of all annotations, crowds included; also of an object that the mask hides entirely, or that has
no outline. A json is held in memory as pycocotools reads it: about six times its size.
"""

import contextlib
import functools
import io
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets.base import voc_palette
from datasets.class_names import BACKGROUND, check_classes
from datasets.folder import COCO14_PARTS, write_lists
from datasets.listing import clean_id
from tools.errors import UserError
from tools.files import check_writable, reading, save_mask
from tools.parallel import run_jobs
from tools.rle import check_counts

FIELDS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "iscrowd", "segmentation"),
}
"""The lists of a json, and what each of their elements must have."""

FAR = 1e6  # pixels; pycocotools crashes at a coordinate that is no number, and walks along every outline


def convert(root: Path, workers: int) -> None:
    """Write everything the reader needs besides the photographs. Masks that are there already are kept.

    Raises:
        UserError: an annotation file is missing, damaged or contradicts itself or the other; a full disk.
    """
    check_writable(root / "masks")
    classes: tuple[str, ...] = ()
    labels: dict[str, list[str]] = {}
    lists: dict[str, list[str]] = {part: [] for part in COCO14_PARTS}
    for part in COCO14_PARTS:
        path = root / "annotations" / f"instances_{part}.json"
        coco = read_annotations(path)
        keys = sorted(coco.cats)
        names = check_classes(path, [BACKGROUND, *(coco.cats[key]["name"] for key in keys)])
        if classes and names != classes:
            raise UserError(
                f"{path}: other categories than in instances_{COCO14_PARTS[0]}.json. Use files of one release."
            )
        classes = names
        jobs = [(coco.imgs[key], coco.imgToAnns[key]) for key in sorted(coco.imgs)]
        work = functools.partial(_convert_image, root / "masks", {key: index for index, key in enumerate(keys, 1)})
        for image, indices in run_jobs(work, jobs, workers, f"masks of {part}", "image"):
            if image in labels:
                raise UserError(f"{path}: file '{image}' occurs twice, in whatever folders. Rename one.")
            labels[image] = [classes[index] for index in indices]
            lists[part].append(image)
    write_lists(root, classes, labels, lists)


def read_annotations(path: Path) -> COCO:
    """Read an `instances_*.json`, check it, and print how many annotations have no outline.

    Raises:
        UserError: missing or damaged; an element lacks a field, is there twice, or refers to one that is not there.
    """
    print(f"{path}: reading")
    remedy = "Unpack COCO's annotations_trainval2014.zip there."
    # pycocotools prints what it does
    with reading(path, "json of COCO's objects", remedy), contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(path)
        for key, fields in FIELDS.items():
            if not coco.dataset.get(key):
                raise ValueError(f"no '{key}' in it")
            for field in fields:
                if not all(field in element for element in coco.dataset[key]):
                    raise ValueError(f"an element of '{key}' lacks '{field}'")
        check_references(coco.dataset)
    empty = sum(outline(item["segmentation"]) is None for item in coco.dataset["annotations"])
    if empty:
        print(f"{path}: {empty} annotations have an empty segmentation: they count for the label, and paint nothing")
    return coco


def check_references(content: dict[str, list[dict]]) -> None:
    """Raise ValueError if two images or categories have one id, or an annotation is of an id that is not there."""
    known = {key: {element["id"] for element in content[key]} for key in ("images", "categories")}
    for key, ids in known.items():
        if len(ids) < len(content[key]):
            raise ValueError(f"an id occurs twice in '{key}'")
    for item in content["annotations"]:
        for key, field in (("images", "image_id"), ("categories", "category_id")):
            if item[field] not in known[key]:
                raise ValueError(f"an annotation of {field} {item[field]}, which is not in '{key}'")


def outline(shape: Any) -> Any:
    """A `segmentation` without its empty parts; None if nothing is left, as of boxes from Label Studio or CVAT.

    A part of one or two points is empty, too. To pycocotools, two would be a box.
    """
    if isinstance(shape, list):
        return [part for part in shape if not isinstance(part, list) or len(part) >= 6] or None
    return None if not shape or (isinstance(shape, dict) and not shape.get("counts")) else shape


def paint(objects: Sequence[tuple[int, bool, Any]], height: int, width: int) -> np.ndarray:
    """The class mask of one image: uint8 [height, width], 0 where there is no object.

    The smaller object is on top; of equals, the later one. Crowds ("a group of people") lie below all single objects.

    Args:
        objects: class index, whether it is a crowd, and COCO's `segmentation` (polygons or RLE, not empty) of each.
        height, width: of the image, pixels.

    Raises:
        ValueError: a segmentation that is damaged or of another size.
        Exception: one that pycocotools does not take.
    """
    codes = [_run_lengths(shape, height, width) for _, _, shape in objects]
    areas = coco_mask.area(codes) if codes else []
    order = sorted(range(len(objects)), key=lambda i: (not objects[i][1], -int(areas[i])))
    mask = np.zeros((height, width), np.uint8, order="F")  # as pycocotools lays out what it decodes
    for i in order:
        np.copyto(mask, objects[i][0], where=coco_mask.decode(codes[i]).view(bool))
    return np.ascontiguousarray(mask)


def _run_lengths(shape: Any, height: int, width: int) -> dict[str, Any]:
    """A COCO `segmentation` as compressed RLE, by pycocotools' own rules."""
    if isinstance(shape, list):
        if not all((np.abs(np.asarray(part, float)) < FAR).all() for part in shape if isinstance(part, list)):
            raise ValueError("a coordinate is no number, or far outside of the image")
        return coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    code = coco_mask.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
    if list(code["size"]) != [height, width]:
        raise ValueError(f"its segmentation is for {code['size'][1]}x{code['size'][0]} pixels, not {width}x{height}")
    counts = code["counts"]  # bytes of pycocotools, text of a json
    check_counts([counts.decode("ascii") if isinstance(counts, bytes) else counts], height * width)
    return code


def _image_id(file: str) -> str:
    """The id of a `file_name`; Label Studio's hold folders, on Windows with backslashes."""
    return clean_id(PureWindowsPath(file).stem)


def _convert_image(
    masks: Path, index_of: dict[int, int], job: tuple[dict[str, Any], list[dict[str, Any]]]
) -> tuple[str, list[int]]:
    """Write the mask of an element of "images" with its "annotations", unless it is there; `index_of` a category id.

    Returns the image's id and its class indices 1..K, ascending.
    """
    image, annotations = job
    file = image["file_name"]
    path = masks / f"{_image_id(file)}.png"
    if not path.exists():
        shapes = [(item, outline(item["segmentation"])) for item in annotations]
        objects = [
            (index_of[item["category_id"]], bool(item["iscrowd"]), shape) for item, shape in shapes if shape is not None
        ]
        with reading(file, "outline of an object", "Unpack COCO's json again."):
            mask = paint(objects, image["height"], image["width"])
        save_mask(path, mask, voc_palette())
    return _image_id(file), sorted({index_of[item["category_id"]] for item in annotations})
