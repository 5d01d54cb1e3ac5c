"""Give class-agnostic masks the classes of a pseudo mask: the merging rules of SEPL (arXiv 2305.05803).

A pseudo mask knows what is in the image, a mask proposal knows where it ends. Every proposal that lies mostly inside
one class of the pseudo mask takes that class:

    refined = merge_masks(load_mask("pseudos/ID.png"), load_proposals("proposals-sam/ID.json"))
"""

from __future__ import annotations

import numpy as np

from tools.maps import IGNORE_INDEX
from tools.options import MERGE_MODES, MERGE_ORDERS
from tools.runs import Runs, Stretches


def merge_masks(
    pseudo_mask: np.ndarray,
    masks: np.ndarray | Runs,
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
        masks: bool NxHxW, or as `load_proposals` reads them; in any order, overlapping or empty, or none at all.
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
    size = masks.size if isinstance(masks, Runs) else masks.shape[1:]
    assert size == pseudo_mask.shape, f"masks of {size} on a pseudo mask of {pseudo_mask.shape}"
    runs = masks if isinstance(masks, Runs) else Runs.from_masks(masks)
    pixels = runs.flatten(pseudo_mask)
    labels = Stretches.of(pixels)
    areas = labels.areas()
    areas[[0, IGNORE_INDEX]] = 0
    classes = np.flatnonzero(areas).astype(np.uint8)
    overlaps = runs.overlaps(labels, classes)
    wanted = overlaps / np.maximum(runs.areas(), 1)[:, None] > inside_threshold
    if mode == "max_iou_imp2":
        wanted |= overlaps / areas[classes] >= recall_threshold
    if order == "largest_overlap" and len(classes):
        wanted &= np.arange(len(classes)) == overlaps.argmax(axis=1, keepdims=True)

    # Class k takes the masks that no class before it wanted; the last group is of those that nobody wants.
    taker = np.column_stack((wanted, np.ones(len(wanted), dtype=bool))).argmax(axis=1)
    *claims, covered = runs.unions(np.where(overlaps.any(axis=1), taker, -1), len(classes) + 1)
    refined = np.zeros_like(pixels)
    for class_index, claim in zip(reversed(classes), reversed(claims), strict=True):
        covered |= claim  # by the masks that are free when it is this class's turn
        if mode != "max_iou":
            claim |= (pixels == class_index) & ~covered
        # Of classes that overlap the later one stays, and it has the larger index.
        np.maximum(refined, claim * class_index, out=refined)
    if keep_ignore:
        refined[(refined == 0) & (pixels == IGNORE_INDEX)] = IGNORE_INDEX
    return runs.unflatten(refined)
