"""Geometry against padding and resizing done by hand, colours against torchvision one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from datasets import transforms as T
from tools import maps


def sample(height: int, width: int) -> dict[str, torch.Tensor]:
    """An image whose red and green are the pixel's row and column, and whose mask is its blue."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = (3 * rows + columns) % 5
    image = torch.stack([rows, columns, mask]).to(torch.uint8)
    return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask.to(torch.uint8))}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 64), st.integers(0, 999))
def test_crop_is_a_window_of_the_reflected_plane(height: int, width: int, size: int, seed: int):
    torch.manual_seed(seed)
    before = sample(height, width)
    crop = T.RandomCropReflect(size)
    after = crop(before)
    torch.manual_seed(seed)
    offset = crop.make_params(list(before.values()))
    rows, columns = offset["top"] + np.arange(size), offset["left"] + np.arange(size)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    for position, length in ((rows, height), (columns, width)):  # a short side is in the crop whole
        assert np.isin(np.arange(length), position).all() or ((position >= 0) & (position < length)).all()
    rows, columns = (np.pad(np.arange(n), 64, mode="reflect" if n > 1 else "edge") for n in (height, width))
    window = np.ix_(rows[64 + offset["top"] :][:size], columns[64 + offset["left"] :][:size])
    np.testing.assert_array_equal(after["image"].numpy(), before["image"].numpy()[(slice(None), *window)])
    np.testing.assert_array_equal(after["mask"].numpy(), np.where(inside, before["mask"].numpy()[window], 255))


def test_crop_reaches_every_place():
    crop = T.RandomCropReflect(3)
    corners = {(int(c["image"][0, 0, 0]), int(c["image"][1, 0, 0])) for c in (crop(sample(5, 4)) for _ in range(200))}
    assert corners == {(row, column) for row in range(3) for column in range(2)}


@pytest.mark.parametrize("make", [lambda: T.train_geometry(32, 20, 40), lambda: T.segmentation_geometry(32, 20, 40)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (33, 47), (200, 10)])
def test_geometry_moves_image_and_mask_together(make, shape: tuple[int, int]):
    torch.manual_seed(0)
    flat = torch.zeros(3, *shape, dtype=torch.uint8)
    mask = torch.zeros(shape, dtype=torch.uint8)
    flat[:, :, shape[1] // 2 :], mask[:, shape[1] // 2 :] = 200, 1
    for _ in range(10):
        output = make()({"image": tv_tensors.Image(flat), "mask": tv_tensors.Mask(mask)})
        image, moved = output["image"], output["mask"]
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert moved.shape == (32, 32) and moved.dtype == torch.uint8
        assert set(moved.unique().tolist()) <= {0, 1, 255} and (moved != 255).any()
        known = moved != 255
        agree = ((image[0] > 100) == (moved == 1))[known].float().mean()
        assert agree > 0.9 or known.sum() < 40  # they may differ along the resampled edge


def test_scale_is_relative_to_the_image_and_long_side_is_absolute():
    scaled = [T.RandomScale(0.5, 2.0)(sample(40, 20))["image"].shape for _ in range(200)]
    assert all(abs(height - 2 * width) <= 1 for _, height, width in scaled)
    heights = [height for _, height, _ in scaled]
    assert min(heights) >= 20 and max(heights) <= 80
    assert min(heights) < 26 and max(heights) > 70
    sides = [max(T.RandomLongSide(10, 30)(sample(17, 40))["image"].shape[1:]) for _ in range(200)]
    assert set(range(11, 30)) <= set(sides) <= set(range(10, 31))


@pytest.mark.parametrize("shape", [(400, 100), (90, 360), (30, 20), (12, 5)])
def test_images_are_brought_to_the_size_of_training_first(shape: tuple[int, int]):
    """An unlabeled view shows all of a large photograph, a scaled one as much as it would of a small one."""
    flat = torch.zeros(3, *shape, dtype=torch.uint8)
    flat[:, : shape[0] // 2] = 200
    view = T.crop_geometry(40, 20)({"image": tv_tensors.Image(flat)})["image"]
    assert view.shape == (3, 40, 40) and {0, 200} <= set(view.unique().tolist())
    side = min(40, max(20, *shape))
    sides = [max(T.RandomScale(0.5, 1.5, (20, 40))(sample(*shape))["image"].shape[1:]) for _ in range(100)]
    assert side // 2 <= min(sides) < 0.7 * side and 1.3 * side < max(sides) <= 1.5 * side + 1


def test_reduced_images_are_those_of_pillow_which_antialiases():
    noise = torch.randint(0, 256, (3, 40, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = T.RandomScale(0.25, 0.25)({"image": tv_tensors.Image(noise)})["image"]
    expected = Image.fromarray(noise.permute(1, 2, 0).numpy()).resize((7, 10), Image.Resampling.BILINEAR)
    assert np.abs(small.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_flip_happens_half_the_time():
    torch.manual_seed(0)
    geometry = T.train_geometry(8, 8, 8)
    flips = sum(int(geometry(sample(8, 8))["image"][1, 0, 0]) == 7 for _ in range(400))
    assert 150 < flips < 250


def test_unlabeled_geometry_only_crops():
    before = sample(8, 8)
    assert torch.equal(T.crop_geometry(8, 8)(before)["image"], before["image"])


def test_randaugment_changes_images_and_refuses_masks():
    torch.manual_seed(0)
    before = sample(16, 16)
    geometry = T.train_geometry(16, 16, 16, randaugment=True)
    assert (geometry.transforms[-1].num_ops, geometry.transforms[-1].magnitude) == (2, 10)
    outputs = [geometry({"image": before["image"]})["image"] for _ in range(20)]
    assert all(output.shape == (3, 16, 16) and output.dtype == torch.uint8 for output in outputs)
    assert len({output.numpy().tobytes() for output in outputs}) > 10
    with pytest.raises(TypeError):
        geometry(before)


def images(count: int, height: int = 21, width: int = 17) -> torch.Tensor:
    noise = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(0))
    noise[0, :, :3] = 77  # grey: its hue is undefined
    noise[-1, :, 3:5] = torch.tensor([255, 0, 0]).view(3, 1, 1)
    return noise.to(torch.uint8)


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation"])
@pytest.mark.parametrize("factors", [[0.75, 1.0, 1.25], [0.0, 0.3, 2.0]])
def test_adjustments_match_torchvision(name: str, factors: list[float]):
    x = images(3).float() / 255
    expected = torch.stack([getattr(VF, name)(image, factor) for image, factor in zip(x, factors, strict=True)])
    torch.testing.assert_close(getattr(T, name)(x, torch.tensor(factors)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shifts", [[-0.25, 0.0, 0.25], [0.5, -0.5, 0.01]])
def test_hue_matches_torchvision(shifts: list[float]):
    x = images(3).float() / 255
    expected = torch.stack([VF.adjust_hue(image, shift) for image, shift in zip(x, shifts, strict=True)])
    torch.testing.assert_close(T.adjust_hue(x, torch.tensor(shifts)), expected, atol=5e-6, rtol=0)


def test_blur_matches_torchvision_and_zero_sigma_is_identity():
    x = images(4).float() / 255
    sigma = [0.15, 0.7, 1.15]
    blurred = T.gaussian_blur(x, torch.tensor([*sigma, 0.0]), radius=3)
    expected = torch.stack([VF.gaussian_blur(image, [7, 7], [s, s]) for image, s in zip(x, sigma, strict=False)])
    torch.testing.assert_close(blurred[:3], expected, atol=1e-6, rtol=0)
    assert torch.equal(blurred[3], x[3])


def test_images_that_are_not_chosen_keep_every_pixel(monkeypatch):
    x = images(8)
    monkeypatch.setattr(T, "JITTER_PROB", 0)
    assert torch.equal(T.PhotometricAugmentation(blur_prob=0)(x), x)


def test_photometric_probabilities_hold_per_image(monkeypatch):
    torch.manual_seed(0)
    x = images(1, 8, 8).expand(600, -1, -1, -1)
    for options, jitter_prob, probability in (({"blur_prob": 0}, T.JITTER_PROB, 0.8), ({}, 0, 0.5)):
        monkeypatch.setattr(T, "JITTER_PROB", jitter_prob)
        monkeypatch.setattr(T, "SIGMA", (0.8, 1.15))  # weak blurs change nothing in some images
        y = T.PhotometricAugmentation(**options)(x)
        assert y.dtype == torch.uint8 and y.shape == x.shape
        assert (y != x).flatten(1).any(1).float().mean() == pytest.approx(probability, abs=0.06)
        assert len(y.unique(dim=0)) > 0.8 * probability * 600  # every image drew its own strength


def test_photometric_strengths_stay_in_range(monkeypatch):
    """Of the brightness, without the others."""
    monkeypatch.setattr(T, "JITTER_PROB", 1)
    for other in ("adjust_contrast", "adjust_saturation", "adjust_hue"):
        monkeypatch.setattr(T, other, lambda x, factor: x)
    torch.manual_seed(0)
    x = torch.full((500, 3, 4, 4), 100, dtype=torch.uint8)
    y = T.PhotometricAugmentation(blur_prob=0)(x)
    assert 75 <= y.min() < 80 and 120 < y.max() <= 125


def test_normalize_matches_torchvision():
    x = images(5)
    reference = v2.Normalize(maps.IMAGENET_MEAN, maps.IMAGENET_STD)(x.float() / 255)
    torch.testing.assert_close(maps.normalize(x), reference, atol=1e-5, rtol=1e-5)


def test_only_uint8_batches_are_accepted():
    for function in (maps.normalize, T.PhotometricAugmentation()):
        with pytest.raises(AssertionError, match=r"expected uint8 images, got torch\.float32"):
            function(torch.zeros(1, 3, 4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_colours_on_a_gpu_match_the_cpu_and_never_wait():
    x, augment = images(6), T.PhotometricAugmentation()
    on_gpu = x.cuda()
    torch.testing.assert_close(maps.normalize(on_gpu).cpu(), maps.normalize(x))
    torch.cuda.set_sync_debug_mode("error")
    try:
        maps.normalize(augment(on_gpu))
    finally:
        torch.cuda.set_sync_debug_mode("default")
