"""Mask proposals: the files that keep them, one per image. A module for each backend that makes them.

    save_proposals("proposals-sam/ID.json", masks, size)
    masks = load_proposals("proposals-sam/ID.json", size)  # what tools.merging takes

    generator    Segment Anything              regions    image regions, without weights
    later_sams   Segment Anything 2 and 3      files      what another program made

A file is JSON in the layout of the SA-1B dataset, with masks as compressed COCO RLE:

    {"image": {"height": H, "width": W}, "annotations": [{"segmentation": {"size": [H, W], "counts": "..."}}, ...]}

`pycocotools.mask.decode(annotation["segmentation"])` reads a mask; further keys, as in SA-1B's own files, are ignored.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_rle

from tools.files import atomic_write, check_size, reading
from tools.rle import check_counts, encode

Propose = Callable[[Sequence[str], Sequence[np.ndarray]], Sequence[np.ndarray | list[dict]]]
"""A backend: from ids and images, uint8 RGB HxWx3, to class-agnostic masks of each image, bool [N, H, W] or COCO RLE.
They may overlap, and N may be 0."""


def save_proposals(path: str | os.PathLike, masks: np.ndarray | Sequence[dict], size: tuple[int, int]) -> None:
    """Write the masks of one image of `size` (H, W), atomically (UserError: the file cannot be written).

    Args:
        masks: bool [N, H, W], or compressed COCO RLE dicts ("size", "counts" as bytes or text).
    """
    masks = encode(masks) if isinstance(masks, np.ndarray) else masks
    height, width = map(int, size)
    counts = [_text(mask["counts"], size) for mask in masks]
    content = {
        "image": {"height": height, "width": width},
        "annotations": [{"segmentation": {"size": [height, width], "counts": text}} for text in counts],
    }
    with atomic_write(path, durable=False) as temporary:
        temporary.write_text(json.dumps(content, separators=(",", ":")), encoding="ascii")


def load_proposals(path: str | os.PathLike, size: tuple[int, int]) -> list[dict]:
    """Read the masks of one image of `size` (H, W), as COCO RLE with counts as text.

    Besides the layout above: a mere list of annotations, and counts as lists of numbers, as Segment Anything's `amg.py`
    writes them.

    Raises:
        UserError: the file is missing, damaged, not such a file, or its masks are of another size.
    """
    remedy = "Run refine_sam.py --stage propose, or what made it, again; if the file is there, delete it first."
    with reading(path, "file of masks as COCO RLE", remedy):
        content = json.loads(Path(path).read_bytes())
        records = content["annotations"] if isinstance(content, dict) else content
        masks = [record["segmentation"] for record in records]
        for mask in masks:
            check_size(path, mask["size"], size)
        texts = [_text(mask["counts"], size) for mask in masks]
        check_counts(texts, size[0] * size[1])
    return [{"size": list(size), "counts": text} for text in texts]


def _text(counts: str | bytes | Sequence[int], size: tuple[int, int]) -> str:
    """Compressed counts as text; COCO also knows them as bytes and as a list of numbers."""
    if isinstance(counts, list):
        counts = coco_rle.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
