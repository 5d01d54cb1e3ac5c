"""Pixel labels from CAMs and from the teacher: golden values, batches of unlike images, and images without classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.maps import resize_labels
from tools.pseudo_labels import (
    RelativeReading,
    mutual_promotion_labels,
    object_threshold,
    reliable_cam_labels,
    teacher_labels,
)


@pytest.fixture(scope="module")
def golden():
    data = np.load(Path(__file__).parent / "golden" / "pseudo_labels.npz")
    images = torch.from_numpy(data["images_u8"]).permute(0, 3, 1, 2).contiguous()
    return data, images, torch.from_numpy(data["cams"]), torch.from_numpy(data["labels"])


def test_reliable_cam_labels_golden(golden):
    """The thresholds are the published ones: the defaults."""
    data, images, cams, labels = golden
    ours = reliable_cam_labels(images, cams, labels)
    assert ours.dtype == torch.int64
    assert (ours.numpy() == data["masks_cam_mode"]).mean() >= 0.999


def test_mutual_promotion_labels_golden(golden):
    data, _, cams, labels = golden
    ours = mutual_promotion_labels(torch.from_numpy(data["bg_probs"]), cams, labels)
    assert (ours.numpy() == data["masks_mutual_promotion_mode"]).mean() >= 0.999


def test_more_maps_than_classes_change_nothing(golden):
    _, *inputs = golden
    assert torch.equal(reliable_cam_labels(*inputs, max_classes=4), reliable_cam_labels(*inputs))


def test_an_image_gets_the_same_labels_alone_and_in_a_batch_with_more_classes():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 17, 23), dtype=torch.uint8)
    cams = F.interpolate(torch.randn(3, 5, 2, 2), (5, 6), mode="bilinear")
    labels = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).float()
    together = reliable_cam_labels(images, cams, labels, crf_iterations=3)
    for i in range(3):
        alone = reliable_cam_labels(images[i : i + 1], cams[i : i + 1], labels[i : i + 1], crf_iterations=3)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("crf_iterations", [0, 2])
def test_no_class_in_any_image_is_all_background(crf_iterations):
    images = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    labels = reliable_cam_labels(images, torch.randn(2, 4, 3, 3), torch.zeros(2, 4), crf_iterations=crf_iterations)
    assert torch.equal(labels, torch.zeros(2, 9, 7, dtype=torch.long))


def plain_labels(cam, image_label, foreground, background, size):
    """The two readings for one image without a CRF, pixel by pixel, over all the classes."""
    cam = np.maximum(cam * image_label[:, None, None], 0)
    cam = cam / (cam.max(axis=(1, 2), keepdims=True) + 1e-5)
    cam = F.interpolate(torch.from_numpy(cam)[None], size, mode="bilinear", align_corners=True)[0].numpy()
    labels = np.full(size, 255)
    for y, x in np.ndindex(*size):
        sure = np.argmax([foreground, *cam[:, y, x]])
        maybe = np.argmax([background, *cam[:, y, x]])
        if sure > 0 or maybe == 0:
            labels[y, x] = sure
    return labels


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4))
def test_without_crf_it_is_two_thresholds(seed, batch, num_classes):
    rng = np.random.default_rng(seed)
    cams = rng.normal(size=(batch, num_classes, 3, 4)).astype(np.float32)
    image_labels = (rng.random((batch, num_classes)) < 0.5).astype(np.float32)
    ours = reliable_cam_labels(
        torch.zeros(batch, 3, 7, 9, dtype=torch.uint8),
        torch.from_numpy(cams),
        torch.from_numpy(image_labels),
        background_threshold=0.2,
        foreground_threshold=0.5,
        crf_iterations=0,
    )
    expected = [plain_labels(cam, label, 0.5, 0.2, (7, 9)) for cam, label in zip(cams, image_labels, strict=True)]
    np.testing.assert_array_equal(ours.numpy(), np.stack(expected))


def test_mutual_promotion_ignores_what_no_map_is_sure_of():
    cams = torch.tensor([[[[1.0, 0.5, 0.1]], [[9.0, 9.0, 9.0]]]])
    background = torch.tensor([[[0.2, 0.3, 0.9]]])
    labels = mutual_promotion_labels(background, cams, torch.tensor([[1.0, 0.0]]), sigma=0.75)
    assert labels.tolist() == [[[1, 255, 0]]]


def test_teacher_labels_are_the_renormalised_softmax_over_present_classes():
    torch.manual_seed(0)
    logits, image_labels = 3 * torch.randn(3, 5, 4, 6), torch.tensor([[1, 0, 0.4, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    masked = logits.softmax(1) * (F.pad(image_labels, (1, 0), value=1) > 0)[:, :, None, None]
    expected_confidence, expected_labels = (masked / masked.sum(1, keepdim=True)).max(1)
    labels, confidence = teacher_labels(logits, image_labels, logits.shape[-2:])
    assert torch.equal(labels, expected_labels)
    torch.testing.assert_close(confidence, expected_confidence)
    assert labels[1].eq(0).all() and confidence[1].eq(1).all()


def random_reading(reading, seed, batch, num_classes):
    """Logits float64 [B,K+1,3,4] and image labels [B,K] at random; and the labels and confidence read from them."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(batch, num_classes + 1, 3, 4)) + np.arange(num_classes, -1, -1)[:, None, None] / 2
    image_labels = (rng.random((batch, num_classes)) < 0.5) * rng.choice([0.3, 1.0], (batch, num_classes))
    read = teacher_labels(torch.from_numpy(logits), torch.from_numpy(image_labels), (3, 4), reading=reading)
    return logits, image_labels, *read


def plain_foreground_reading(logits, image_label):
    """(label, confidence) of one pixel: float64 logits [K+1] and the image's label [K]."""
    exponentials = np.exp(logits - logits.max())
    background = exponentials[0] / exponentials.sum()
    present = np.flatnonzero(image_label > 0)
    if len(present) == 0:
        return 0, 1.0
    if 1 - background > 0.5:
        return 1 + present[np.argmax(logits[1 + present])], 1 - background
    return 0, background


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4))
def test_foreground_reading_pixel_by_pixel(seed, batch, num_classes):
    logits, image_labels, labels, confidence = random_reading("foreground", seed, batch, num_classes)
    for i, y, x in np.ndindex(batch, 3, 4):
        expected, probability = plain_foreground_reading(logits[i, :, y, x], image_labels[i])
        assert labels[i, y, x] == expected
        assert confidence[i, y, x].item() == pytest.approx(probability, abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4))
def test_relative_reading_pixel_by_pixel(seed, batch, num_classes):
    logits, image_labels, labels, confidence = random_reading("relative", seed, batch, num_classes)
    for i in range(batch):
        present = np.flatnonzero(image_labels[i])
        p = np.exp(logits[i]) / np.exp(logits[i]).sum(axis=0)
        relative = {1 + c: (1 - p[0]) * p[1 + c] / p[1 + present].sum(axis=0) for c in present}
        relative = {c: value / (value.max() + 1e-5) for c, value in relative.items()}
        for y, x in np.ndindex(3, 4):
            best = max(relative, key=lambda c: relative[c][y, x], default=0)
            score = relative[best][y, x] if best else 0.0
            assert labels[i, y, x] == (best if score > 0.65 else 0)
            assert confidence[i, y, x].item() == pytest.approx(
                max(score, 1 - score) if score > 0.65 else 1 - score, abs=1e-5
            )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 24), st.integers(1, 40))
def test_of_equal_channels_max_takes_the_first_as_argmax_does(seed, channels, width):
    """Hard labels are found by the faster of the two; also where nothing but -inf is left."""
    maps = torch.randint(0, 3, (2, channels, 17, width), generator=torch.Generator().manual_seed(seed)).float()
    maps[maps == 2] = -torch.inf
    for dim in range(4):
        assert torch.equal(maps.max(dim=dim).indices, maps.argmax(dim=dim))


def test_what_similar_absent_classes_share_is_background_in_one_reading_and_object_in_the_other():
    """The cow of a photograph: background .39, cow .13, absent animals .48."""
    logits = torch.tensor([0.39, 0.13, 0.24, 0.24]).log().view(1, 4, 1, 1)
    cow = torch.tensor([[1.0, 0.0, 0.0]])
    label, confidence = teacher_labels(logits, cow, (1, 1))
    assert label.item() == 0 and confidence.item() == pytest.approx(0.39 / 0.52, abs=1e-5)
    label, confidence = teacher_labels(logits, cow, (1, 1), reading="foreground")
    assert label.item() == 1 and confidence.item() == pytest.approx(0.61, abs=1e-5)


def test_a_relative_reading_pixel_by_pixel():
    """Background, a sure class, an unsure one that is left out, a sure one; columns are pixels."""
    p = torch.tensor([[0.2, 0.5, 0.4, 0.9], [0.7, 0.3, 0.0, 0.1], [0.0, 0.2, 0.0, 0.0], [0.1, 0.0, 0.6, 0.0]])
    p = p[None, :, None]
    reading = RelativeReading.of(p)
    assert reading.keys.tolist() == [0, 1, 3]
    # p_fg shared by classes 1 and 3: .8 x 7/8, .5 and 0, .1 of class 1; .8 x 1/8, 0, .6 and 0 of class 3.
    torch.testing.assert_close(reading.highest.flatten(), torch.tensor([0.7, 0.6]))
    assert 0.1 / 0.7 < reading.threshold <= 0.65  # Otsu's, between .5/.7 = .71 and .1/.7
    assert reading.labels(p).tolist() == [[[1, 1, 2, 0]]]
    # A part of the image is compared with the maxima of the whole.
    assert reading.labels(p[..., 3:]).tolist() == [[[0]]]
    half = p.clone()
    half[0, 1:, 0, 2], half[0, 0, 0, 2] = p[0, 1:, 0, 2] / 8, 0.95
    assert reading.labels(half[..., 2:3]).tolist() == [[[0]]]


def test_labels_are_reduced_to_the_first_pixel_of_each_cell():
    labels = torch.arange(2 * 8 * 12).view(2, 8, 12)
    assert torch.equal(resize_labels(labels, (2, 3)), labels[:, ::4, ::4])


def plain_triangle(values: np.ndarray) -> float:
    """The value whose point on the histogram is farthest below the line from the peak to the farther end."""
    counts, edges = np.histogram(values, 256)
    peak, (first, *_, last) = int(counts.argmax()), np.flatnonzero(counts)
    end = first if peak - first >= last - peak else last
    best, farthest = peak, 0.0
    for level in range(min(peak, end), max(peak, end) + 1):
        line = counts[peak] * abs(level - end) / abs(peak - end)
        if line - counts[level] > farthest:
            best, farthest = level, line - counts[level]
    return (edges[best] + edges[best + 1]) / 2


@pytest.mark.parametrize("objects", [0.1, 0.4, 0.7, 0.95])
def test_objects_begin_where_the_flank_of_the_highest_peak_ends(objects):
    generator, found = np.random.default_rng(0), set()
    for spread in (0.02, 0.1, 0.3):
        background = abs(generator.normal(0, spread, (60, 60)))
        inside = 1 - abs(generator.normal(0, 0.25, (60, 60)))
        first = np.where(generator.random((60, 60)) < objects, inside, background).clip(0, 1).astype(np.float32)
        maps = np.stack([first, first.mean() * generator.random((60, 60), np.float32)])
        expected = min(max(float(plain_triangle(maps.max(axis=0))), 0.3), 0.65)
        assert object_threshold(maps, graded=True) == pytest.approx(expected, abs=1 / 128)
        found.add(expected)
    assert (max(found) == 0.65) == (objects > 0.5)  # an object that fills the image


def test_an_object_begins_somewhere_on_any_maps():
    for maps in (np.zeros((0, 2, 2)), np.zeros((1, 2, 2)), np.ones((1, 1, 1)), np.full((2, 3, 1), 0.7)):
        assert 0.3 <= object_threshold(maps.astype(np.float32), graded=True) <= 0.65
        assert 0 <= object_threshold(maps.astype(np.float32)) <= 0.65


def test_a_relative_reading_without_a_sure_class_is_background():
    """A half is not sure."""
    for probabilities in (torch.full((1, 3, 2, 2), 1 / 3), torch.full((1, 2, 2, 2), 1 / 2)):
        reading = RelativeReading.of(probabilities)
        assert reading.keys.tolist() == [0]
        assert not reading.labels(probabilities).any()
