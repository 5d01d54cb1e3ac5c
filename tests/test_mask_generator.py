"""The mask generator against segment_anything's own, on a small model of its classes, and its parts one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_rle
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils.amg import mask_to_rle_pytorch

from tests.tiny_sam import SHARPENED_THRESHOLDS, build_tiny_sam, sharpen, synthetic_image
from tools.errors import UserError
from tools.proposals.generator import MaskGenerator, MaskOptions, View, interpolation_matrix, uncompressed_rle

SHAPES = [(120, 160), (130, 100), (97, 97)]


@pytest.fixture(scope="module")
def model():
    return sharpen(build_tiny_sam())


@pytest.fixture(scope="module")
def images():
    return [synthetic_image(seed, *shape) for seed, shape in enumerate(SHAPES)]


def assert_partners(found, expected):
    """As many masks, and a partner for each, one to one; as many empty ones, which overlap with nothing."""
    assert len(found) == len(expected)
    found, expected = ([mask for mask in masks if coco_rle.area(mask)] for masks in (found, expected))
    assert len(found) == len(expected)
    if not found:
        return
    iou = coco_rle.iou(found, expected, [0] * len(expected))
    assert sorted(iou.argmax(axis=1)) == list(range(len(expected)))
    assert (iou.max(axis=1) > 0.95).all()


def stock(model, image, **options):
    generator = SamAutomaticMaskGenerator(model, output_mode="coco_rle", **options)
    return [record["segmentation"] for record in generator.generate(image)]


def test_it_finds_the_masks_of_the_stock_generator(model, images):
    options = {"points_per_side": 24, **SHARPENED_THRESHOLDS}
    found = MaskGenerator(model, MaskOptions(**options), images_per_batch=2, points_per_batch=100)(images[:2])
    assert 80 < sum(len(masks) for masks in found) < 250
    for masks, image in zip(found, images[:2], strict=True):
        expected = stock(model, image, **options)
        assert_partners(masks, expected)
        assert [mask["size"] for mask in masks] == [mask["size"] for mask in expected]


@pytest.mark.parametrize(
    "options",
    [
        {"crop_n_layers": 1},
        {"min_mask_region_area": 60},
        {"crop_n_layers": 2, "min_mask_region_area": 30},
        {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.9},
        {"pred_iou_thresh": 9.0},
    ],
)
def test_every_option_means_the_same(model, images, options):
    options = {"points_per_side": 10, **SHARPENED_THRESHOLDS, **options}
    assert_partners(MaskGenerator(model, MaskOptions(**options))(images[1:2])[0], stock(model, images[1], **options))


def test_without_a_threshold_masks_of_any_predicted_iou_are_kept(model, images, monkeypatch):
    generator = MaskGenerator(model, MaskOptions(points_per_side=6, **SHARPENED_THRESHOLDS | {"pred_iou_thresh": 0.0}))
    expected, decode = generator(images[:1]), generator._decode
    monkeypatch.setattr(generator, "_decode", lambda *args: (decode(*args)[0], decode(*args)[1] - 2))
    assert generator(images[:1]) == expected and expected[0]


@pytest.mark.parametrize("batch", [{"images_per_batch": 3}, {"points_per_batch": 7}, {"points_per_batch": 1000}])
def test_batches_change_nothing(model, images, batch):
    options = MaskOptions(points_per_side=8, **SHARPENED_THRESHOLDS)
    one_by_one = [MaskGenerator(model, options)([image])[0] for image in images]
    for found, expected in zip(MaskGenerator(model, options, **batch)(images), one_by_one, strict=True):
        assert_partners(found, expected)


def test_half_precision_finds_nearly_the_same(model, images):
    options = MaskOptions(points_per_side=16, **SHARPENED_THRESHOLDS | {"box_nms_thresh": 1.0})
    (exact,), (half,) = (MaskGenerator(model, options, dtype=dtype)(images[:1]) for dtype in (None, torch.bfloat16))
    iou = coco_rle.iou(half, exact, [0] * len(exact)).max(axis=1)
    assert 0.8 < len(half) / len(exact) < 1.25 and np.mean(iou > 0.9) > 0.8


def test_scores_that_are_no_numbers_are_refused(model, images, monkeypatch):
    """As from a network that overflows in fp16: without the check, its images would silently have no masks."""
    generator = MaskGenerator(model, MaskOptions(points_per_side=8), points_per_batch=50)
    decode = generator._decode
    monkeypatch.setattr(generator, "_decode", lambda *args: (decode(*args)[0], decode(*args)[1] * torch.nan))
    with pytest.raises(UserError, match="--mixed_precision"):
        generator(images[:1])


def test_no_image_and_no_mask(model):
    generator = MaskGenerator(model, MaskOptions(points_per_side=3, pred_iou_thresh=99.0))
    assert generator([]) == [] and generator([np.zeros((20, 30, 3), np.uint8)]) == [[]]


def test_clearing_small_regions_keeps_what_duplicates_of_crops_may_share(model):
    """Two masks whose boxes have an IoU of .64, between box_nms_thresh and the .7 of crops; the first has an island."""
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[0, :10, :10] = masks[1, :10, 2:12] = masks[0, 15, 15] = True
    boxes = torch.tensor([[0, 0, 15, 15], [2, 0, 11, 9]])
    options = MaskOptions(box_nms_thresh=0.5, min_mask_region_area=3)
    found = MaskGenerator(model, options)._finish(uncompressed_rle(masks), boxes)
    masks[0, 15, 15] = False
    assert_partners(found, [coco_rle.encode(np.asfortranarray(mask, np.uint8)) for mask in masks.numpy()])


def test_boxes_of_a_crop_lie_in_the_image(model):
    generator, view = (
        MaskGenerator(model, MaskOptions(stability_score_thresh=0.0)),
        View(0, (300, 320), (100, 90, 300, 290)),
    )
    logits = torch.full((1, 32, 32), -9.0)
    logits[:, 12:18, 13:20] = 9
    rows, columns = np.nonzero(generator._enlarge(view, logits)[0].numpy() > generator.mask_threshold)
    expected = [100 + columns.min(), 90 + rows.min(), 100 + columns.max(), 90 + rows.max()]
    assert generator._stable(view, logits, torch.ones(1))["boxes"].tolist() == [expected]


def test_the_matrices_enlarge_as_the_model_does(model):
    logits = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    for size, used in (((75, 100), (96, 128)), ((300, 111), (128, 47)), ((128, 128), (128, 128))):
        expected = model.postprocess_masks(logits, used, size)
        rows, columns = (interpolation_matrix(32, 128, n, m, logits.device) for n, m in zip(used, size, strict=True))
        torch.testing.assert_close(rows @ logits @ columns.T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_rle_of_many_masks_is_that_of_each(count):
    masks = torch.rand(count, 11, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[count // 2 :][:1] = False
    masks[count // 3 :][:1] = True
    assert uncompressed_rle(masks) == mask_to_rle_pytorch(masks)
