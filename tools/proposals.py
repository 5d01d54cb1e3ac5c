"""Mask proposals: the generators that make them, and the files that keep them, one per image.

    generator = SamGenerator(load_sam("sam_vit_h_4b8939.pth", "vit_h", device), points_per_side=32)
    save_proposals("proposals-sam/ID.json", generator(image))
    masks = load_proposals("proposals-sam/ID.json")  # bool [N, H, W]

A file is JSON in the layout of the SA-1B dataset, with masks as compressed COCO RLE:

    {"image": {"height": H, "width": W}, "annotations": [{"segmentation": {"size": [H, W], "counts": "..."}}, ...]}

`pycocotools.mask.decode(annotation["segmentation"])` reads a mask; further keys, as in SA-1B's own files, are ignored.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from pycocotools import mask as coco_rle

from tools.errors import UserError
from tools.files import atomic_write

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

SAM_TYPES = ("vit_h", "vit_l", "vit_b")


class ProposalGenerator(Protocol):
    """Anything that turns an image into class-agnostic masks. A new backend is one such class."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """bool [N, H, W] masks of a uint8 RGB HxWx3 image; they may overlap, and N may be 0."""


class SamGenerator:
    """Segment Anything (ICCV 2023) prompted with a grid of points: its own automatic mask generator."""

    def __init__(self, model: Sam, **options: Any) -> None:
        """
        Args:
            model: from `load_sam`, already on its device.
            options: of `segment_anything.SamAutomaticMaskGenerator`, such as points_per_side or pred_iou_thresh.
        """
        from segment_anything import SamAutomaticMaskGenerator

        self.generator = SamAutomaticMaskGenerator(model, output_mode="binary_mask", **options)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Masks bool [N, H, W] of an image, uint8 RGB HxWx3."""
        masks = [record["segmentation"] for record in self.generator.generate(image)]
        return np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), dtype=bool)


def load_sam(checkpoint: str | os.PathLike, model_type: str, device: torch.device) -> Sam:
    """Build SAM and load its public weights, without unpickling anything but tensors.

    Args:
        checkpoint: a file such as sam_vit_h_4b8939.pth.
        model_type: one of `SAM_TYPES`.
        device: where the model goes.

    Raises:
        UserError: no such file, not a checkpoint, or weights of another model type.
    """
    from segment_anything import sam_model_registry

    state = _load_state(Path(checkpoint))
    model = sam_model_registry[model_type](checkpoint=None)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint}: not the weights of SAM {model_type}. Set --model_type to match the file."
        ) from error
    return model.to(device).eval()


def _load_state(checkpoint: Path) -> Any:
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint}: no such checkpoint. Download one, or use --proposals regions.") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{checkpoint}: not a PyTorch checkpoint, or cut short. Download it again.") from error


def save_proposals(
    path: str | os.PathLike, masks: np.ndarray | Sequence[dict], size: tuple[int, int] | None = None
) -> None:
    """Write the masks of one image, atomically.

    Args:
        path: the .json file.
        masks: bool [N, H, W], or compressed COCO RLE dicts ("size", "counts" as bytes or text).
        size: (H, W) of the image; needed with RLE only, which may be an empty list.

    Raises:
        UserError: the file cannot be written.
    """
    if isinstance(masks, np.ndarray):
        size = masks.shape[1:]
        masks = encode(masks)
    assert size is not None, "RLE masks without the size of their image"
    content = {
        "image": {"height": int(size[0]), "width": int(size[1])},
        "annotations": [{"segmentation": {"size": [int(n) for n in size], "counts": _text(rle)}} for rle in masks],
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, separators=(",", ":")), encoding="ascii")


def encode(masks: np.ndarray) -> list[dict]:
    """Compressed COCO RLE of masks bool [N, H, W]."""
    # pycocotools wants the masks last and column-major: the transpose of [N, W, H] is that, after one copy.
    return coco_rle.encode(np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8).transpose(2, 1, 0))


def load_proposals(path: str | os.PathLike) -> np.ndarray:
    """Read the masks of one image: bool [N, H, W].

    Raises:
        UserError: the file is missing, is not a proposal file, or holds masks of different sizes.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        size = (content["image"]["height"], content["image"]["width"])
        masks = [annotation["segmentation"] for annotation in content["annotations"]]
        if any(tuple(mask["size"]) != size for mask in masks):
            raise ValueError("masks of another size than the image")
        if not masks:
            return np.zeros((0, *size), dtype=bool)
        return np.ascontiguousarray(coco_rle.decode(masks).transpose(2, 0, 1)).view(bool)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such proposals. Run refine_sam.py --stage propose first.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a proposal file ({error}). Delete it and run --stage propose again.") from error


def _text(rle: dict) -> str:
    counts = rle["counts"]
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
