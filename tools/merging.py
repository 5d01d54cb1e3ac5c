"""Give class-agnostic masks the classes of a pseudo mask: the merging rules of SEPL (arXiv 2305.05803).

A pseudo mask knows what is in the image, a mask proposal knows where it ends. Every proposal that lies mostly inside
one class of the pseudo mask takes that class:

    pseudo_mask = load_mask("pseudos/ID.png")
    refined = merge_masks(pseudo_mask, load_proposals("proposals-sam/ID.json", pseudo_mask.shape))

Masks stay run lengths (pycocotools) until the few that a class takes are painted.
"""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_rle

from tools.options import IGNORE_INDEX, MERGE_MODES, MERGE_ORDERS
from tools.rle import encode


def merge_masks(
    pseudo_mask: np.ndarray,
    masks: np.ndarray | Sequence[dict],
    mode: str = "max_iou_imp2",
    *,
    order: str = "class",
    inside_threshold: float = 0.5,
    recall_threshold: float = 0.85,
    keep_ignore: bool = False,
) -> np.ndarray:
    """Refine a pseudo mask with class-agnostic masks.

    The classes take their turns in ascending order. A class P takes each mask M not yet taken with
    |M & P| / |M| > `inside_threshold` or, in mode "max_iou_imp2", |M & P| / |P| >= `recall_threshold`, and becomes the
    union of what it took; except in mode "max_iou", it keeps its pixels that no mask free at its turn covers. Where
    classes overlap the later one stays.

    Args:
        pseudo_mask: uint8 HxW, class indices: 0 background, 255 ignore.
        masks: bool NxHxW, or COCO RLE as `load_proposals` reads it; in any order, overlapping or empty, or none at all.
        mode: which of SEPL's three rules.
        order: "class" offers each mask to every class (SEPL's released rule); "largest_overlap" offers it only to the
            foreground class that it shares most pixels with, the lowest index at a tie (SEPL's text).
        inside_threshold: in [0, 1], exceeded strictly.
        recall_threshold: in [0, 1], used by "max_iou_imp2" only.
        keep_ignore: ignored pixels that no class takes stay 255; otherwise they become background.

    Returns:
        uint8 HxW, class indices.
    """
    assert mode in MERGE_MODES, f"mode is {mode!r}, not one of {MERGE_MODES}"
    assert order in MERGE_ORDERS, f"order is {order!r}, not one of {MERGE_ORDERS}"
    masks = encode(masks) if isinstance(masks, np.ndarray) else masks
    assert all(tuple(mask["size"]) == pseudo_mask.shape for mask in masks), f"masks not of {pseudo_mask.shape}"
    pixels = np.bincount(pseudo_mask.ravel(), minlength=256)
    pixels[[0, IGNORE_INDEX]] = 0
    classes = np.flatnonzero(pixels)
    regions = pseudo_mask == classes[:, None, None]
    overlaps, areas = intersections(masks, encode(regions))
    wanted = overlaps / np.maximum(areas, 1)[:, None] > inside_threshold
    if mode == "max_iou_imp2":
        wanted |= overlaps / pixels[classes] >= recall_threshold
    if order == "largest_overlap" and len(classes):
        wanted &= np.arange(len(classes)) == overlaps.argmax(axis=1, keepdims=True)
    refined = _take_turns(masks, classes, regions, overlaps, wanted, keep_rest=mode != "max_iou")
    if keep_ignore:
        refined[(refined == 0) & (pseudo_mask == IGNORE_INDEX)] = IGNORE_INDEX
    return refined


def _take_turns(
    masks: Sequence[dict],
    classes: np.ndarray,
    regions: np.ndarray,
    overlaps: np.ndarray,
    wanted: np.ndarray,
    *,
    keep_rest: bool,
) -> np.ndarray:
    """Let each class take the free masks that it wants, bool [N, n]; uint8 HxW.

    Args:
        classes, regions: indices [n] and pixels bool [n, H, W] in the pseudo mask.
        overlaps: pixels that each mask shares with each class, [N, n].
        keep_rest: a class keeps its pixels that no free mask covers.
    """
    refined = np.zeros(regions.shape[1:], np.uint8)
    free = np.ones(len(masks), bool)
    for index, region, overlap, wants in zip(classes, regions, overlaps.T, wanted.T, strict=True):
        taken = union(masks, free & wants, region.shape)
        if keep_rest:
            taken |= region & ~union(masks, free & (overlap > 0), region.shape)
        refined[taken] = index
        free &= ~wants
    return refined


def intersections(masks: Sequence[dict], regions: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that each mask shares with each region, int64 [N, n], and pixels of each mask, int64 [N]."""
    if not masks or not regions:
        return np.zeros((len(masks), len(regions)), np.int64), np.zeros(len(masks), np.int64)
    areas = coco_rle.area(masks).astype(np.int64)
    # With a "crowd", the IoU is the share of the mask. Rounded, its product with the area is the count, exactly.
    shares = coco_rle.iou(masks, regions, [1] * len(regions))
    return np.rint(shares * areas[:, None]).astype(np.int64), areas


def union(masks: Sequence[dict], chosen: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels of size HxW that the `chosen` masks (bool [N]) cover, bool [H, W]."""
    parts = [masks[index] for index in np.flatnonzero(chosen)]
    return coco_rle.decode(coco_rle.merge(parts)).view(bool) if parts else np.zeros(size, bool)
