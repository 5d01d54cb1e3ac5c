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
    classes = np.setdiff1d(np.unique(pseudo_mask), (0, IGNORE))
    bits = _pack(masks, pseudo_mask.size)
    regions = _pack(pseudo_mask == classes[:, None, None], pseudo_mask.size)
    overlaps = _overlaps(bits, regions)
    inside = overlaps / np.maximum(_count(bits), 1)[:, None]
    recall = overlaps / _count(regions)
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
        claim = _union(bits[taken])
        if mode != "max_iou":
            claim |= regions[column] & ~_union(bits[free])
        refined[_unpack(claim, pseudo_mask.shape)] = class_index
        free &= ~taken
    return refined


def _pack(masks: np.ndarray, pixels: int) -> np.ndarray:
    """Masks as rows of bits, uint64 [N, words]: an eighth of the memory, and 64 pixels to an operation."""
    packed = np.packbits(masks.reshape(len(masks), pixels).astype(bool, copy=False), axis=1)
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
    return np.ascontiguousarray(padded).view(np.uint64)  # numpy keeps the caller's memory layout until here


def _unpack(bits: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One row of `_pack` as a mask, bool HxW."""
    return np.unpackbits(bits.view(np.uint8), count=shape[0] * shape[1]).reshape(shape).view(bool)


def _count(bits: np.ndarray) -> np.ndarray:
    """Pixels of each packed mask, int64 [N]."""
    return np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)


def _overlaps(bits: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Pixels that each of N masks shares with each of n regions, int64 [N, n]: a matrix product over bits."""
    overlaps = np.zeros((len(bits), len(regions)), dtype=np.int64)
    for column, region in enumerate(regions):  # not broadcast: the product of all pairs would not fit the cache
        overlaps[:, column] = _count(bits & region)
    return overlaps


def _union(bits: np.ndarray) -> np.ndarray:
    """The pixels that any of the packed masks covers; none if there are no masks."""
    return np.bitwise_or.reduce(bits, axis=0)
