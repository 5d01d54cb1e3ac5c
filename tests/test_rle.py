"""The check of run lengths against pycocotools: what it writes passes, whatever is damaged does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_rle

from tools.rle import check_counts, encode


def compress(counts):
    """COCO's text of any counts."""
    size = (1, int(sum(counts)))
    return coco_rle.frPyObjects({"size": size, "counts": counts}, *size)["counts"].decode()


def test_masks_are_encoded_column_by_column():
    masks = np.random.default_rng(0).random((5, 7, 4)) < 0.5
    for mask, rle in zip(masks, encode(masks), strict=True):
        assert rle == coco_rle.encode(np.asfortranarray(mask, np.uint8))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=9), max_size=4), st.integers(1, 50_000))
def test_any_counts_pycocotools_can_write_pass(masks, more):
    """A first run of no pixels, an even and an odd number of counts, numbers of one to four characters."""
    masks = [[first, *(max(1, run) for run in runs)] for first, *runs in masks]
    pixels = max(map(sum, masks), default=0) + more
    texts = [compress([*counts, pixels - sum(counts)]) for counts in masks]
    check_counts(texts, pixels)
    for wrong in (pixels - 1, pixels + 1):
        if texts:
            with pytest.raises(ValueError, match="add up"):
                check_counts(texts, wrong)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.data())
def test_a_run_of_no_pixels_is_refused_but_at_the_start(runs, data):
    """pycocotools' union and intersection stop there, or go on for ever."""
    place = data.draw(st.integers(1, len(runs)))
    with pytest.raises(ValueError, match="a run of no pixels"):
        check_counts([compress([*runs[:place], 0, *runs[place:]])], sum(runs))


@pytest.mark.parametrize(
    "counts", ["", "a", "0", "67", "6\x7f", "\u00e9", "6 6", "6\x00", "o" * 20 + "1", "J6", "<0O1", ">N", "p0<"]
)
def test_damaged_counts_are_refused(counts):
    good = "0<"  # the whole of 12 pixels
    check_counts([good], 12)
    for masks in ([counts], [good, counts], [counts, good]):
        with pytest.raises(ValueError):
            check_counts(masks, 12)
