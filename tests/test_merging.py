"""The merging rules against public golden vectors and against the rule written as plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.merging import merge_masks
from tools.options import MERGE_MODES as MODES
from tools.options import MERGE_ORDERS as ORDERS
from tools.rle import encode

GOLDEN = Path(__file__).parent / "golden" / "sam_merge.npz"


def literal_rule(pseudo, masks, mode, order, inside_threshold=0.5, recall_threshold=0.85):
    """SEPL's rule, one mask and one class at a time."""
    classes = [c for c in range(1, 255) if (pseudo == c).any()]
    refined = np.zeros_like(pseudo)
    unused = list(range(len(masks)))
    for c in classes:
        region = pseudo == c
        candidates = list(unused)
        union = np.zeros(pseudo.shape, bool)
        for index in candidates:
            overlap = int((masks[index] & region).sum())
            area = int(masks[index].sum())
            if order == "largest_overlap":
                shares = [int((masks[index] & (pseudo == other)).sum()) for other in classes]
                if classes[shares.index(max(shares))] != c:
                    continue
            inside = area > 0 and overlap / area > inside_threshold
            recalled = mode == "max_iou_imp2" and overlap / int(region.sum()) >= recall_threshold
            if inside or recalled:
                union |= masks[index]
                unused.remove(index)
        if mode != "max_iou":
            covered = np.zeros(pseudo.shape, bool)
            for index in candidates:
                covered |= masks[index]
            union |= region & ~covered
        refined[union] = c
    return refined


@st.composite
def cases(draw):
    height, width, count = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(0, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pseudo = rng.choice(np.array([0, 1, 2, 5, 255], np.uint8), size=(height, width), p=[0.3, 0.3, 0.2, 0.1, 0.1])
    masks = rng.random((count, height, width)) < rng.choice([0.0, 0.2, 0.6, 1.0], size=(count, 1, 1))
    # Some masks follow a class closely, so that both thresholds matter.
    for index in range(0, count, 2):
        masks[index] = (pseudo == rng.choice([0, 1, 2, 5])) ^ (rng.random((height, width)) < 0.15)
    return pseudo, masks


@pytest.mark.parametrize("mode", MODES)
def test_golden_vectors(mode):
    golden = np.load(GOLDEN)
    height, width = int(golden["height"]), int(golden["width"])
    for i in range(int(golden["num_images"])):
        masks = np.unpackbits(golden[f"masks_packed_{i}"], axis=-1)[: golden[f"num_masks_{i}"], :height, :width]
        refined = merge_masks(golden[f"pseudo_{i}"], masks.astype(bool), mode)
        np.testing.assert_array_equal(refined, golden[f"{mode}_{i}"])


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(MODES), st.sampled_from(ORDERS))
def test_equals_the_literal_rule(case, mode, order):
    pseudo, masks = case
    expected = literal_rule(pseudo, masks, mode, order)
    np.testing.assert_array_equal(merge_masks(pseudo, masks, mode, order=order), expected)
    np.testing.assert_array_equal(merge_masks(pseudo, encode(masks), mode, order=order), expected)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([0.25, 0.5, 1.0]))
def test_thresholds(case, inside, recall):
    pseudo, masks = case
    refined = merge_masks(pseudo, masks, inside_threshold=inside, recall_threshold=recall)
    np.testing.assert_array_equal(refined, literal_rule(pseudo, masks, "max_iou_imp2", "class", inside, recall))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("value", [0, 255])
def test_nothing_to_refine(mode, order, value):
    pseudo = np.full((5, 7), value, np.uint8)
    masks = np.ones((3, 5, 7), bool)
    assert not merge_masks(pseudo, masks, mode, order=order).any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("masks", [np.zeros((0, 4, 6), bool), np.zeros((2, 4, 6), bool)])
def test_without_masks_only_max_iou_loses_the_class(masks, order):
    pseudo = np.zeros((4, 6), np.uint8)
    pseudo[2, 3] = 4
    assert not merge_masks(pseudo, masks, "max_iou", order=order).any()
    for mode in ("max_iou_imp", "max_iou_imp2"):
        np.testing.assert_array_equal(merge_masks(pseudo, masks, mode, order=order), pseudo)


def test_half_inside_is_not_enough_but_high_recall_is():
    pseudo = np.zeros((1, 4), np.uint8)
    pseudo[0, :2] = 3
    masks = np.ones((1, 1, 4), bool)
    assert not merge_masks(pseudo, masks, "max_iou_imp").any()
    assert (merge_masks(pseudo, masks, "max_iou_imp2") == 3).all()


def test_largest_overlap_gives_a_mask_to_the_class_it_covers_most():
    pseudo = np.array([[1, 2, 2, 2]], np.uint8)
    masks = np.ones((1, 1, 4), bool)
    # Class 1 takes the mask for its recall; class 2 then paints its own pixels, which no free mask covers, over it.
    assert merge_masks(pseudo, masks, order="class").tolist() == [[1, 2, 2, 2]]
    assert (merge_masks(pseudo, masks, order="largest_overlap") == 2).all()


def test_ignore_is_kept_on_request_where_no_class_claims_it():
    pseudo = np.array([[1, 1, 255, 255, 0]], np.uint8)
    masks = np.array([[[1, 1, 1, 0, 0]]], bool)
    assert merge_masks(pseudo, masks).tolist() == [[1, 1, 1, 0, 0]]
    assert merge_masks(pseudo, masks, keep_ignore=True).tolist() == [[1, 1, 1, 255, 0]]


def test_inputs_are_left_alone_and_the_result_is_uint8():
    pseudo = np.array([[1, 1, 0]], np.uint8)
    masks = np.array([[[0, 1, 1]], [[1, 1, 1]]], bool)
    before = pseudo.copy(), masks.copy()
    assert merge_masks(pseudo, masks).dtype == np.uint8
    np.testing.assert_array_equal(pseudo, before[0])
    np.testing.assert_array_equal(masks, before[1])


def test_the_order_of_the_masks_does_not_matter():
    rng = np.random.default_rng(0)
    pseudo = rng.integers(0, 3, (9, 11)).astype(np.uint8)
    masks = rng.random((6, 9, 11)) < 0.4
    np.testing.assert_array_equal(merge_masks(pseudo, masks), merge_masks(pseudo, masks[::-1]))


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
@pytest.mark.parametrize("shape", [(5, 8, 8), (6, 9, 11), (1, 1, 1)])
def test_any_memory_layout(axes, shape):
    rng = np.random.default_rng(0)
    pseudo = rng.integers(0, 3, shape[1:]).astype(np.uint8)
    masks = rng.random(shape) < 0.4
    laid_out = np.ascontiguousarray(masks.transpose(axes)).transpose(np.argsort(axes))
    np.testing.assert_array_equal(merge_masks(np.asfortranarray(pseudo), laid_out), merge_masks(pseudo, masks))


def test_wrong_sizes_and_names_are_named():
    pseudo = np.zeros((3, 4), np.uint8)
    with pytest.raises(AssertionError, match="masks not of"):
        merge_masks(pseudo, np.zeros((1, 4, 3), bool))
    with pytest.raises(AssertionError, match="best"):
        merge_masks(pseudo, np.zeros((1, 3, 4), bool), "best")
