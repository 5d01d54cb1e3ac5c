"""Multi-scale CAMs against plain loops, and CAM files: what is written is read, what is damaged is refused."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools.cam import enlarged_argmax, multi_scale_cams, multi_scale_logits, scaled_views, working_photograph
from tools.cam_files import cam_labels, load_cams, read_cams, save_cams
from tools.errors import FileError, UserError
from tools.options import Views

SIZES = [(33, 48), (37, 29), (1, 17)]


@pytest.fixture(scope="module")
def forward():
    """A network of output stride 16 in small: one strided convolution to four maps."""
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 4, 3, stride=16, padding=1).requires_grad_(False)


def image_of(size):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


def views_of(scales, hflip=False, long_side=(0, math.inf)):
    return Views(tuple(scales), hflip, long_side)


def resized(maps, size):
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def slow_cams(forward, image, label, scales, hflip, size):
    """One class, one scale, one flip at a time."""
    maps = []
    for index in np.flatnonzero(label):
        total = torch.zeros(size)
        for view in scaled_views(image, views_of(scales)):
            activation = forward(view)[:, index : index + 1].relu()
            if hflip:
                activation = activation + forward(view.flip(-1))[:, index : index + 1].relu().flip(-1)
            total = total + resized(activation, size)[0, 0]
        maps.append(total / (total.max() + 1e-5))
    return torch.stack(maps)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scales, hflip", [([1], False), ([1], True), ([0.5, 1, 1.7], True)])
@pytest.mark.parametrize("label", [[0, 1, 0, 0], [1, 0, 1, 1]])
def test_multi_scale_cams_are_the_plain_sums(forward, size, scales, hflip, label):
    image, label = image_of(size), torch.tensor(label, dtype=torch.float32)
    keys, cam, hr_cam = multi_scale_cams(forward, image, label, views_of(scales, hflip))
    assert keys.tolist() == [0, *(1 + np.flatnonzero(label))] and keys.dtype == np.int64
    for maps, shape in ((cam, tuple(-(-side // 4) for side in size)), (hr_cam, size)):
        expected = slow_cams(forward, image, label, scales, hflip, shape)
        np.testing.assert_allclose(maps, expected, atol=1e-5)
        assert maps.min() >= 0 and maps.max() <= 1


def test_scales_are_relative_to_the_size_of_training():
    """Longer photographs are reduced to its crop, shorter ones enlarged to its smallest size; others stay."""
    sizes = lambda image, *flags: [view.shape[-2:] for view in scaled_views(image, views_of(*flags))]  # noqa: E731
    large, medium, small = (torch.zeros(1, 3, 4 * side, 3 * side) for side in (160, 24, 10))
    assert sizes(large, [0.5, 1, 2], False, (80, 128)) == sizes(large, [0.1, 0.2, 0.4])
    assert sizes(medium, [0.5, 1, 2], False, (80, 128)) == sizes(medium, [0.5, 1, 2])
    assert sizes(small, [0.5, 1, 2], False, (80, 128)) == sizes(small, [1, 2, 4])


def test_an_image_without_classes_has_empty_maps(forward):
    keys, cam, hr_cam = multi_scale_cams(forward, image_of((33, 48)), torch.zeros(4), views_of([1], True))
    assert keys.tolist() == [0] and cam.shape == (0, 9, 12) and hr_cam.shape == (0, 33, 48)


def test_a_class_that_nothing_activates_has_a_map_of_zeros():
    dead = lambda views: -torch.ones(len(views), 2, 3, 3)  # noqa: E731
    _, cam, hr_cam = multi_scale_cams(dead, image_of((33, 48)), torch.ones(2), views_of([1, 2], True))
    assert not cam.any() and not hr_cam.any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hflip", [True, False])
def test_multi_scale_logits_are_the_plain_means(forward, size, hflip):
    image, maps = image_of(size), []
    for view in scaled_views(image, views_of([0.5, 1])):
        maps.append(resized(forward(view), size))
        if hflip:
            maps.append(resized(forward(view.flip(-1)).flip(-1), size))
    logits = multi_scale_logits(forward, image, views_of([0.5, 1], hflip))
    torch.testing.assert_close(logits, torch.stack(maps).mean(dim=0))


@pytest.mark.parametrize(
    "size, expected",
    [
        ((640, 480), (640, 480)),
        ((64, 48), (320, 240)),
        ((320, 200), (320, 200)),
        ((2000, 1000), (1024, 512)),
        ((1, 5000), (1, 1024)),
    ],
)
def test_photographs_are_brought_to_the_working_size(size, expected):
    photograph = torch.full((1, 3, *size), 7, dtype=torch.uint8)
    views = Views(scales=(0.5, 2), hflip=True, long_side=(320, 512))
    working = working_photograph(photograph, views)
    assert tuple(working.shape[-2:]) == expected and working.dtype == torch.uint8 and (working == 7).all()
    assert working_photograph(photograph, dataclasses.replace(views, long_side=(0, 3000))) is photograph


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.tuples(st.integers(1, 7), st.integers(1, 7)), st.tuples(st.integers(1, 9), st.integers(1, 9))
)
def test_enlarged_argmax_is_that_of_the_enlarged_maps(classes, small, large):
    maps = torch.randint(0, 4, (1, classes, *small)).float()  # with ties: the first class wins
    assert torch.equal(enlarged_argmax(maps, large), resized(maps, large)[0].argmax(dim=0))


def test_cams_of_a_reduced_photograph_have_the_size_of_the_photograph(forward):
    image, label = image_of((33, 48)), torch.tensor([1.0, 0, 1, 0])
    _, cam, hr_cam = multi_scale_cams(forward, image, label, views_of([1]), size=(66, 95))
    expected = slow_cams(forward, image, label, [1], False, (66, 95))
    np.testing.assert_allclose(hr_cam, expected, atol=1e-5)
    assert cam.shape == (2, 17, 24)


def test_a_mirrored_image_has_mirrored_maps(forward):
    image = image_of((33, 48))
    maps = multi_scale_logits(forward, image, views_of([1, 1.5], True))
    torch.testing.assert_close(
        multi_scale_logits(forward, image.flip(-1), views_of([1, 1.5], True)), maps.flip(-1), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("size", [*SIZES, (500, 334), (281, 500)])
def test_views_have_sides_of_16n_plus_1_next_to_the_scaled_ones(size):
    for scale, view in zip((0.5, 1, 1.5), scaled_views(torch.zeros(1, 3, *size), views_of((0.5, 1, 1.5))), strict=True):
        for side, original in zip(view.shape[-2:], size, strict=True):
            assert side % 16 == 1 and side >= 17
            assert abs(side - original * scale) <= 8 or side == 17


def test_reduced_views_are_those_of_pillow_which_antialiases():
    image = image_of((113, 97))
    (view,) = scaled_views(image, views_of([0.3]))
    expected = Image.fromarray(image[0, 0].numpy()).resize((33, 33), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(view[0, 0], np.asarray(expected), atol=1e-5)


def test_reduced_photographs_are_those_of_pillow_which_antialiases():
    photograph = torch.randint(0, 256, (1, 3, 4, 3000), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    working = working_photograph(photograph, views_of([1], long_side=(0, 1024)))
    expected = Image.fromarray(photograph[0].permute(1, 2, 0).numpy()).resize((1024, 1), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(working[0].permute(1, 2, 0), np.asarray(expected), atol=1)


def test_labels_of_pixels():
    maps = np.array([[[0.2, 0.4, 0.9]], [[0.1, 0.5, 0.95]]], dtype=np.float16)
    assert cam_labels(maps, 0.45).tolist() == [[0, 2, 2]]
    assert cam_labels(maps, 0.99).tolist() == [[0, 0, 0]]
    assert cam_labels(maps, np.array([[0.0, 1.0, 0.0]])).tolist() == [[1, 0, 2]]
    assert cam_labels(np.full((1, 1, 1), 0.5), 0.5).tolist() == [[0]], "background wins ties"
    assert cam_labels(np.zeros((0, 2, 3)), 0.4).tolist() == [[0] * 3] * 2, "an image without classes"


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npz", "npy"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_is_written_is_read(tmp_path, suffix, count):
    keys, path = np.arange(count + 1), tmp_path / "cams" / f"2007_000032.{suffix}"
    cam, hr_cam = np.random.default_rng(0).random((count, 3, 5)), np.random.default_rng(1).random((count, 9, 17))
    save_cams(path, keys, cam, hr_cam)
    read = load_cams(path)
    assert [array.dtype for array in read] == [np.int64, np.float16, np.float16]
    for array, expected in zip(read, (keys, cam, hr_cam), strict=True):
        np.testing.assert_array_equal(array, expected.astype(array.dtype))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary file stays"


def test_equal_maps_give_equal_bytes(tmp_path):
    arrays = np.arange(2), np.ones((1, 2, 2)), np.ones((1, 8, 8))
    for name in ("a.npz", "b.npz"):
        save_cams(tmp_path / name, *arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_the_npy_file_is_the_dict_that_peers_tools_read(tmp_path):
    save_cams(tmp_path / "a.npy", np.array([0, 5]), np.ones((1, 2, 2)), np.ones((1, 8, 8)))
    content = np.load(tmp_path / "a.npy", allow_pickle=True).item()
    assert sorted(content) == ["cam", "hr_cam", "keys"] and content["keys"].tolist() == [0, 5]


def test_an_npz_file_is_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", keys=np.array([print], dtype=object), cam=np.ones(1), hr_cam=np.ones(1))
    with pytest.raises(UserError, match=r"a\.npz: not a readable CAM file"):
        load_cams(tmp_path / "a.npz")


def damaged_files(folder):
    """(name, content) of files that are no CAM files."""
    save_cams(folder / "whole.npz", np.arange(2), np.ones((1, 20, 20)), np.ones((1, 80, 80)))
    whole = (folder / "whole.npz").read_bytes()
    np.savez(folder / "other.npz", keys=np.arange(2))
    np.save(folder / "array.npy", np.ones(3))
    return {
        "empty": b"",
        "text": b"<html>404</html>",
        "cut": whole[:1000],
        "flipped": whole[:500] + bytes(255 - value for value in whole[500:600]) + whole[600:],
        "keys only": (folder / "other.npz").read_bytes(),
        "bare array": (folder / "array.npy").read_bytes(),
        "list": pickle.dumps([1, 2]),
        "unknown class": b"cno_such_module\nThing\n.",
    }


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_damaged_files_are_answered_in_one_line(tmp_path, suffix):
    for name, content in damaged_files(tmp_path).items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_cams(path)
        assert str(error.value).startswith(f"{path}: not a readable CAM file") and "\n" not in str(error.value)


def test_a_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(UserError, match="no such CAM file. Run inference.py again"):
        load_cams(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_cam_files_of_others_with_other_names_are_not_to_be_deleted(tmp_path, suffix):
    """IRN's, and CLIP-ES's are like them."""
    content, path = {"keys": np.arange(2), "cam": np.ones((1, 2, 2)), "high_res": np.ones((1, 8, 8))}, tmp_path / "a"
    np.savez(path, **content) if suffix == "npz" else np.save(path, content)
    message = "not a readable CAM file: holds keys, cam, high_res, no hr_cam. Make it as docs/seeds.md says."
    with pytest.raises(FileError) as error:
        load_cams(f"{path}.{suffix}")
    assert str(error.value) == f"{path}.{suffix}: {message}"


HR_CAM = np.array([[[0, 0.25, 1], [0.5, 1, 0]], [[1, 0, 0.125], [0, 1, 0.5]]])  # of classes 1 and 2, 3x2 pixels


def write_cams(path, keys, hr_cam):
    """A CAM file as somebody else might write it: nothing is converted."""
    content = {"keys": np.asarray(keys), "cam": np.zeros(1), "hr_cam": np.asarray(hr_cam)}
    np.savez(path, **content) if path.suffix == ".npz" else np.save(path, content)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
@pytest.mark.parametrize("keys", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("values", [np.float16, np.float32, np.float64, np.uint8, bool])
def test_cams_of_others_may_have_any_type_of_numbers(tmp_path, suffix, keys, values):
    write_cams(tmp_path / f"a.{suffix}", np.array([0, 1, 2], keys), HR_CAM.astype(values))
    read_keys, read = read_cams(tmp_path / f"a.{suffix}", (2, 3), num_classes=3)
    assert read_keys.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(read, HR_CAM.astype(values))


@pytest.mark.parametrize(
    "keys, hr_cam, message",
    [
        ([0, 1], HR_CAM[0], r"keys int64 [2], hr_cam float64 [2, 3]"),
        ([0, 1, 2], HR_CAM[:, None], r"hr_cam float64 [2, 1, 2, 3]"),
        (1, HR_CAM, r"keys int64 []"),
        ([[0, 1, 2]], HR_CAM, r"keys int64 [1, 3]"),
        ([0.0, 1.0, 2.0], HR_CAM, r"keys float64 [3]"),
        (["background", "cat", "dog"], HR_CAM, r"keys <U10 [3]"),
        ([0, 1, 2], HR_CAM.astype(str), r"hr_cam <U32 [2, 2, 3]"),
        ([0, 1, 2], HR_CAM * 1j, r"hr_cam complex128 [2, 2, 3]"),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_cams_of_others_of_another_form_are_named(tmp_path, suffix, keys, hr_cam, message):
    write_cams(tmp_path / f"a.{suffix}", keys, hr_cam)
    with pytest.raises(FileError) as error:
        read_cams(tmp_path / f"a.{suffix}", (2, 3), num_classes=3)
    text = str(error.value)
    assert text.startswith(f"{tmp_path}/a.{suffix}: ") and message in text and "\n" not in text
    assert text.endswith("expected whole numbers [n+1] and numbers [n, H, W]. Make it as docs/seeds.md says.")


@pytest.mark.parametrize(
    "hr_cam, message",
    [
        ((255 * HR_CAM).astype(np.uint8), "from 0 to 255"),
        (1.02 * HR_CAM, "from 0 to 1.02"),
        (8 * HR_CAM - 4, "from -4 to 4"),
        (HR_CAM - 0.02, "from -0.02 to 0.98"),
    ],
)
def test_cams_that_are_not_normalised_are_named(tmp_path, hr_cam, message):
    write_cams(tmp_path / "a.npz", [0, 1, 2], hr_cam)
    with pytest.raises(FileError) as error:
        read_cams(tmp_path / "a.npz", (2, 3), num_classes=3)
    remedy = "Set what is below 0 to 0, and divide each CAM by its maximum."
    assert str(error.value) == f"{tmp_path}/a.npz: values {message}; expected 0 to 1. {remedy}"


@pytest.mark.parametrize("keys", [[0, 1], [0, 1, 3], [0, 0, 1], [0, -1, 1], [1, 1, 2]])
def test_keys_that_are_not_zero_and_a_class_per_cam(tmp_path, keys):
    write_cams(tmp_path / "a.npz", keys, HR_CAM)
    with pytest.raises(FileError) as error:
        read_cams(tmp_path / "a.npz", (2, 3), num_classes=3)
    assert f"a.npz: keys {keys} for 2 CAMs; expected 0 and one class from 1 to 2 per CAM." in str(error.value)


def test_what_rounding_adds_to_cams_is_no_fault(tmp_path):
    write_cams(tmp_path / "a.npz", [0, 1, 2], 1.012 * HR_CAM - 0.005)
    assert read_cams(tmp_path / "a.npz", (2, 3), num_classes=3)[1].max() == pytest.approx(1.007)
