"""Mask proposals: the backends that make them, and the files that keep them, one per image.

    sam = load_sam("sam_vit_h_4b8939.pth", "vit_h", device)
    generator = MaskGenerator(sam, MaskOptions(), dtype=torch.bfloat16)
    for image_id, masks in zip(ids, generator(images)):
        save_proposals(f"proposals-sam/{image_id}.json", masks, size)
    masks = load_proposals("proposals-sam/ID.json", size)  # what tools.merging takes

A file is JSON in the layout of the SA-1B dataset, with masks as compressed COCO RLE:

    {"image": {"height": H, "width": W}, "annotations": [{"segmentation": {"size": [H, W], "counts": "..."}}, ...]}

`pycocotools.mask.decode(annotation["segmentation"])` reads a mask; further keys, as in SA-1B's own files, are ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pycocotools import mask as coco_rle

from tools.errors import UserError
from tools.files import atomic_write, check_size, reading
from tools.rle import check_counts, encode
from tools.weights import common_prefix, load_weights

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


SAM_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # channels of the image encoder


Propose = Callable[[Sequence[str], Sequence[np.ndarray]], Sequence[np.ndarray | list[dict]]]
"""A backend: from ids and images, uint8 RGB HxWx3, to class-agnostic masks of each image, bool [N, H, W] or COCO RLE.
They may overlap, and N may be 0."""


def load_sam(checkpoint: str | os.PathLike, model_type: str, device: torch.device) -> Sam:
    """Build SAM (one of `options.SAM_TYPES`), and load its public weights; nothing but tensors is unpickled.

    Raises:
        UserError: no such file, not a checkpoint, or weights of another model type.
    """
    from segment_anything import sam_model_registry

    if not Path(checkpoint).is_file():
        remedy = "Download one, or use --proposals regions (or sam2, for a folder or a name on the hub)."
        raise UserError(f"{checkpoint}: no such checkpoint. {remedy}")
    tensors = load_weights(checkpoint).tensors
    model = sam_model_registry[model_type](checkpoint=None)
    wanted = model.state_dict()
    prefix = common_prefix(tensors, set(wanted))
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    fits = sum(name in state and state[name].shape == tensor.shape for name, tensor in wanted.items())
    if fits < len(wanted) or len(state) > len(wanted):
        position = state.get("image_encoder.pos_embed", torch.zeros(1))
        other = SAM_WIDTHS.get(position.shape[-1], model_type)
        remedy = "Pass weights of the first SAM; those of SAM-HQ, MobileSAM, SAM 2 and others cannot be used."
        if other != model_type:
            remedy = f"Set --model_type {other}."
        raise UserError(
            f"{checkpoint}: not the weights of SAM {model_type} ({fits} of {len(wanted)} tensors fit). {remedy}"
        )
    model.load_state_dict(state)
    return model.to(device).eval()


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
