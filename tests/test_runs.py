"""Masks as runs against the same masks as pixels, and the RLE reader against pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_rle

from tools.proposals import encode
from tools.runs import Runs, Stretches


def texts(masks):
    return [{"counts": rle["counts"].decode()} for rle in encode(masks)]


def paint(runs):
    """The masks of `runs`, bool [N, H, W], one run at a time."""
    masks = np.zeros((len(runs.counts), runs.size[0] * runs.size[1]), bool)
    owners = np.repeat(np.arange(len(runs.counts)), runs.counts)
    for owner, start, end in zip(owners, runs.starts, runs.ends, strict=True):
        assert 0 <= start <= end <= masks.shape[1] and not masks[owner, start:end].any()
        masks[owner, start:end] = True
    return np.array([mask.reshape(runs.size, order=runs.order) for mask in masks]).reshape(-1, *runs.size)


@st.composite
def masks_of_one_image(draw):
    """Blocky and noisy masks; large images too, so that run lengths need several characters."""
    count, height, width = draw(st.integers(0, 6)), draw(st.integers(1, 90)), draw(st.integers(1, 90))
    cell, share = draw(st.sampled_from([1, 7, 40])), draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coarse = rng.random((count, height // cell + 1, width // cell + 1)) < share
    return coarse.repeat(cell, axis=1).repeat(cell, axis=2)[:, :height, :width], rng


def both(masks):
    return Runs.from_masks(masks), Runs.from_rle(texts(masks), masks.shape[1:])


@settings(max_examples=100, deadline=None)
@given(masks_of_one_image())
def test_the_runs_are_the_masks(case):
    masks, _ = case
    for runs in both(masks):
        np.testing.assert_array_equal(paint(runs), masks)
        np.testing.assert_array_equal(runs.areas(), masks.sum(axis=(1, 2)))


@settings(max_examples=100, deadline=None)
@given(masks_of_one_image())
def test_overlaps_are_the_matrix_product(case):
    masks, rng = case
    labels = rng.choice(np.array([0, 3, 200, 255], np.uint8), size=masks.shape[1:])
    labels[: len(labels) // 2] = 3  # long stretches too
    classes = np.array([3, 7, 200], np.uint8)
    one_hot = labels.reshape(-1, 1) == classes
    for runs in both(masks):
        stretches = Stretches.of(runs.flatten(labels))
        expected = masks.reshape(len(masks), labels.size).astype(int) @ one_hot
        np.testing.assert_array_equal(runs.overlaps(stretches, classes), expected)
        np.testing.assert_array_equal(stretches.areas(), np.bincount(labels.ravel(), minlength=256))
        np.testing.assert_array_equal(runs.unflatten(runs.flatten(labels)), labels)


@settings(max_examples=100, deadline=None)
@given(masks_of_one_image())
def test_unions_are_those_of_the_pixels(case):
    masks, rng = case
    groups = rng.integers(-1, 3, len(masks))
    for runs in both(masks):
        unions = runs.unions(groups, 3)
        for group in range(3):
            np.testing.assert_array_equal(runs.unflatten(unions[group]), masks[groups == group].any(axis=0))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=9))
def test_any_counts_pycocotools_can_write_are_read(counts):
    """Runs of no pixels, an even and an odd number of counts, numbers of one to three characters."""
    size = (1, sum(counts) + 5)
    rle = coco_rle.frPyObjects({"size": size, "counts": [*counts, 5]}, *size)
    runs = Runs.from_rle([{"counts": rle["counts"].decode()}] * 2, size)
    np.testing.assert_array_equal(paint(runs), [coco_rle.decode(rle)] * 2)


@pytest.mark.parametrize("counts", ["", "a", "0", "67", "6\x7f", "\u00e9", "6 6", "o" * 20 + "1", "J6"])
def test_damaged_counts_are_refused(counts):
    good = texts(np.ones((1, 3, 4), bool))
    for masks in ([{"counts": counts}], [*good, {"counts": counts}], [{"counts": counts}, *good]):
        with pytest.raises(ValueError):
            Runs.from_rle(masks, (3, 4))
