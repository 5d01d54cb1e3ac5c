"""Give class-agnostic masks the classes of a pseudo mask: the merging rules of SEPL (arXiv 2305.05803).

A pseudo mask knows what is in the image, a mask proposal knows where it ends. Every proposal that lies mostly inside
one class of the pseudo mask takes that class:

    refined = merge_masks(load_mask("pseudos/ID.png"), load_proposals("proposals-sam/ID.json"))
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Mode = Literal["max_iou", "max_iou_imp", "max_iou_imp2"]
Order = Literal["class", "largest_overlap"]
MODES: tuple[str, ...] = get_args(Mode)
ORDERS: tuple[str, ...] = get_args(Order)
IGNORE = 255


def merge_masks(
    pseudo_mask: np.ndarray,
    masks: np.ndarray,
    mode: Mode = "max_iou_imp2",
    *,
    order: Order = "class",
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
        masks: bool NxHxW, in any order; they may overlap, be empty, or be none at all.
        mode: which of SEPL's three rules.
        order: "class" offers each mask to every class (SEPL's released rule); "largest_overlap" offers it only to the
            foreground class that it shares most pixels with, the lowest index at a tie (SEPL's text).
        inside_threshold: in [0, 1], exceeded strictly.
        recall_threshold: in [0, 1], used by "max_iou_imp2" only.
        keep_ignore: ignored pixels that no class takes stay 255; otherwise they become background.

    Returns:
        uint8 HxW, class indices.
    """
    assert mode in MODES, f"mode is {mode!r}, not one of {MODES}"
    assert order in ORDERS, f"order is {order!r}, not one of {ORDERS}"
    assert masks.ndim == 3 and masks.shape[1:] == pseudo_mask.shape, f"{masks.shape} masks on {pseudo_mask.shape}"
    masks = masks.astype(bool, copy=False)
    classes = np.setdiff1d(np.unique(pseudo_mask), (0, IGNORE))
    inside, recall, overlaps = _overlap_ratios(pseudo_mask, masks, classes)
    wanted = inside > inside_threshold
    if mode == "max_iou_imp2":
        wanted |= recall >= recall_threshold
    if order == "largest_overlap" and len(classes):
        wanted &= np.arange(len(classes)) == overlaps.argmax(axis=1, keepdims=True)

    refined = np.full_like(pseudo_mask, 0)
    if keep_ignore:
        refined[pseudo_mask == IGNORE] = IGNORE
    free = np.ones(len(masks), dtype=bool)
    for column, class_index in enumerate(classes):
        taken = free & wanted[:, column]
        region = _union(masks, taken)
        if mode != "max_iou":
            region |= (pseudo_mask == class_index) & ~_union(masks, free)
        refined[region] = class_index
        free &= ~taken
    return refined


def _overlap_ratios(
    pseudo_mask: np.ndarray, masks: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|M & P| / |M|, |M & P| / |P| and |M & P| of N masks and n classes, each [N, n]; an empty mask gets zeros."""
    # float32 makes it one BLAS call and counts exactly up to 2^24 pixels.
    dtype = np.float32 if pseudo_mask.size <= 2**24 else np.float64
    one_hot = (pseudo_mask.reshape(-1, 1) == classes).astype(dtype)
    flat = masks.reshape(len(masks), pseudo_mask.size).astype(dtype)
    overlaps = (flat @ one_hot).astype(np.float64)
    areas = np.count_nonzero(masks, axis=(1, 2))
    return overlaps / np.maximum(areas, 1)[:, None], overlaps / one_hot.sum(axis=0, dtype=np.float64), overlaps


def _union(masks: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The pixels that any chosen mask covers, bool HxW; none where no mask is chosen."""
    return np.logical_or.reduce(masks[chosen], axis=0)
