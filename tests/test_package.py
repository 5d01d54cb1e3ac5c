"""The archive for VOC's evaluation server: its tree, its masks, and what is refused before anything is written."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from command import refusal, run
from conftest import SIZES
from PIL import Image

from datasets.base import voc_palette
from datasets.exchange import voc_server
from tools.files import save_mask

IDS = ["a", "c", "d"]


@pytest.fixture
def command(voc_copy, tmp_path, monkeypatch):
    """The command line for three test photographs and their masks, one of which is grey."""
    monkeypatch.chdir(tmp_path)
    (voc_copy / "ImageSets/Segmentation/test.txt").write_text("\n".join(IDS) + "\n")
    rng = np.random.default_rng(0)
    for image_id in IDS:
        save_mask(f"deeplab@test/masks/{image_id}.png", rng.integers(0, 21, SIZES[image_id]), voc_palette())
    grey = Image.fromarray(np.asarray(Image.open("deeplab@test/masks/c.png")))
    grey.save("deeplab@test/masks/c.png")
    data = ["--dataset", "voc12", "--data_dir", voc_copy]
    return ["evaluate", *data, "--domain", "test", "--pred_dir", "deeplab@test/masks", "--package", "voc12-test"]


def members(path):
    """Name and content of all entries, in order."""
    with tarfile.open(path, "r:gz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive.getmembers()}


@pytest.mark.parametrize("package, folder", [("voc12-test", "comp6_test_cls"), ("voc12-test-comp5", "comp5_test_cls")])
def test_the_tree_and_the_masks(command, tmp_path, capsys, package, folder):
    run(*command, "--package", package)
    path = tmp_path / "deeplab@test" / f"{package}.tar.gz"
    entries = members(path)
    assert list(entries) == [f"results/VOC2012/Segmentation/{folder}/{image_id}.png" for image_id in IDS]
    for image_id, content in zip(IDS, entries.values(), strict=True):
        image = Image.open(io.BytesIO(content))
        assert image.mode == "P" and image.format == "PNG" and image.size == SIZES[image_id][::-1]
        assert np.array_equal(image, Image.open(f"deeplab@test/masks/{image_id}.png"))
        assert image.getpalette()[:6] == [0, 0, 0, 128, 0, 0] and image.getpalette()[60:63] == [0, 64, 128]
    assert "Warning: 3 images, but the server scores the 1,456 of VOC" in capsys.readouterr().out
    before = path.read_bytes()
    assert before[4:8] == bytes(4)  # no time
    run(*command, "--package", package)
    assert path.read_bytes() == before


def test_the_whole_list_is_no_cause_for_a_warning(command, monkeypatch, capsys):
    monkeypatch.setattr(voc_server, "TEST_IMAGES", 3)
    run(*command, "--output", "here.tgz")
    assert "Warning" not in capsys.readouterr().out and len(members("here.tgz")) == 3


def mask_of(value, size=SIZES["c"]):
    return lambda: save_mask("deeplab@test/masks/c.png", np.full(size, value), voc_palette())


@pytest.mark.parametrize(
    "change, message",
    [
        (mask_of(255), "c.png: holds 255 (undecided), which the server does not take"),
        (mask_of(21), "c.png: holds the value 21, but masks of this dataset hold 0..20"),
        (mask_of(1, SIZES["c"][::-1]), "c.png: 50x18 pixels, but its image is 18x50 pixels"),
        (
            lambda: save_mask("deeplab@test/masks/b.png", np.zeros(SIZES["b"]), voc_palette()),
            "b.png: not on the list (1 such masks)",
        ),
    ],
)
def test_masks_that_are_refused(command, tmp_path, capsys, change, message):
    change()
    assert message in refusal(capsys, *command)
    assert [path.name for path in (tmp_path / "deeplab@test").iterdir()] == ["masks"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--output", "x.tar"], "--output x.tar: the server takes .tar.gz or .tgz"),
        (["--domain", "val"], "--package: needs masks of the test split. Pass --domain test"),
        (["--mode", "cams"], "--package: needs masks of the test split"),
        (["--dataset", "shapes"], "--package: the server scores VOC's 20 classes. Pass --dataset voc12."),
    ],
)
def test_flags_that_do_not_fit(command, capsys, flags, message):
    assert message in refusal(capsys, *command, *flags)


def test_a_missing_mask(command, tmp_path, capsys):
    (tmp_path / "deeplab@test/masks/d.png").unlink()
    assert "d.png is missing (1 of 3 are)" in refusal(capsys, *command)
