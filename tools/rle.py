"""Masks as COCO's run lengths (RLE), the dicts {"size": [H, W], "counts": text} that pycocotools works on.

`counts` are the pixels outside and inside the mask by turns, column by column. As text, a character holds five bits of
a number, lowest first, and whether more follow; the last one's top bit is the sign. From the fourth on, a number is the
difference to the one two before it.
"""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_rle


def encode(masks: np.ndarray) -> list[dict]:
    """The RLE of masks bool [N, H, W], with counts as bytes."""
    # pycocotools wants the masks last and column-major: the transpose of [N, W, H] is that, after one copy.
    return coco_rle.encode(np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8).transpose(2, 1, 0))


def check_counts(texts: Sequence[str], pixels: int) -> None:
    """Make sure that the counts of each mask add up to `pixels`. pycocotools reads past others, or never ends.

    Raises:
        ValueError: they do not.
    """
    if not texts:
        return
    codes = np.frombuffer("".join(texts).encode("ascii"), np.uint8).astype(np.int64) - 48
    stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
    is_last = codes < 32  # character of its number
    if "" in texts or (codes < 0).any() or (codes > 63).any() or not is_last[stops - 1].all():
        raise ValueError("damaged run lengths")
    starts = np.flatnonzero(np.append(True, is_last)[:-1])
    places = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    if places.max() > 6:
        raise ValueError("damaged run lengths")
    digits = np.where(is_last, (codes ^ 16) - 16, codes & 31)
    numbers = np.add.reduceat(digits << 5 * places, starts)
    for runs in np.split(numbers, np.searchsorted(starts, stops[:-1])):
        runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
        if runs.min() < 0 or runs.sum() != pixels:
            raise ValueError("run lengths that do not add up to the image")
        if not runs[1:].all():  # pycocotools stops there, or never
            raise ValueError("a run of no pixels, not at the start")
