"""The synthetic set: reproducible bytes, VOC layout, masks and labels that agree, refusals that touch nothing."""

from __future__ import annotations

import hashlib
import runpy
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import build_source
from datasets.prepare.shapes import IGNORE_INDEX, MARKER, draw, generate
from datasets.prepare.shapes_painting import Brush, Canvas, ellipse, hsv, noise, polygon
from datasets.voc12 import SHAPES_CLASSES
from tools.errors import UserError

SMALL = {"num_train": 5, "num_val": 3, "size": 64, "seed": 3}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("shapes") / "set", **SMALL, workers=1)


@pytest.fixture(scope="module")
def samples() -> list:
    return [draw(np.random.default_rng((7, index)), 96) for index in range(80)]


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_bytes_do_not_depend_on_the_number_of_processes(small_set: Path, tmp_path: Path) -> None:
    assert digests(generate(tmp_path / "set", **SMALL, workers=2)) == digests(small_set)


def test_images_do_not_depend_on_how_many_there_are(small_set: Path, tmp_path: Path) -> None:
    fewer = digests(generate(tmp_path / "set", **{**SMALL, "num_train": 2}, workers=1))
    assert fewer["JPEGImages/train_00001.jpg"] == digests(small_set)["JPEGImages/train_00001.jpg"]
    assert fewer["SegmentationClass/val_00002.png"] == digests(small_set)["SegmentationClass/val_00002.png"]


def test_another_seed_and_another_split_give_other_images(small_set: Path, tmp_path: Path) -> None:
    other = digests(generate(tmp_path / "set", **{**SMALL, "seed": 4}, workers=1))
    images = [value for tree in (other, digests(small_set)) for name, value in tree.items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images) == 16


def test_the_dataset_reader_finds_everything(small_set: Path) -> None:
    source = build_source("shapes", small_set)
    assert source.info.classes == SHAPES_CLASSES
    assert sorted(source.domains()) == ["train", "val"]
    assert [len(source.ids(domain)) for domain in ("train", "val")] == [5, 3]
    for image_id in source.ids("train") + source.ids("val"):
        image, mask, label = source.image(image_id), source.mask(image_id), source.image_label(image_id)
        assert image.shape[:2] == mask.shape and max(mask.shape) == 64
        shown = {int(value) for value in np.unique(mask)} - {0, IGNORE_INDEX}
        assert shown <= {int(index) + 1 for index in np.nonzero(label)[0]} and label.any()


def test_annotations_are_those_of_the_devkit(small_set: Path) -> None:
    for path in (small_set / "Annotations").iterdir():
        tree = ET.parse(path)
        width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
        assert tree.findtext("filename") == f"{path.stem}.jpg"
        for item in tree.iterfind("object"):
            xmin, ymin, xmax, ymax = (int(item.findtext(f"bndbox/{end}")) for end in ("xmin", "ymin", "xmax", "ymax"))
            assert item.findtext("name") in SHAPES_CLASSES[1:]
            assert 1 <= xmin <= xmax <= width and 1 <= ymin <= ymax <= height


def test_a_complete_set_is_kept(small_set: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}
    assert generate(small_set, **SMALL) == small_set
    assert written == {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}
    assert [path.name for path in small_set.parent.iterdir()] == ["set"]


def test_other_parameters_are_refused(small_set: Path) -> None:
    with pytest.raises(UserError, match="other parameters.*delete"):
        generate(small_set, **{**SMALL, "seed": 5})
    assert digests(generate(small_set, **SMALL))[MARKER]


def test_a_folder_with_other_content_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "VOC2012").mkdir()
    (tmp_path / "VOC2012" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        generate(tmp_path / "VOC2012", **SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["VOC2012", "notes.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert (generate(tmp_path, num_train=1, num_val=1, size=48, workers=1) / MARKER).is_file()


def test_a_failed_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of paint")

    monkeypatch.setattr("datasets.prepare.shapes.draw", fail)
    with pytest.raises(RuntimeError, match="out of paint"):
        generate(tmp_path / "set", **SMALL, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_val": -1}, {"size": 20}, {"seed": -1}])
def test_numbers_out_of_range(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        generate(tmp_path / "set", **{**SMALL, **wrong})


@given(seed=st.integers(0, 2**32), size=st.integers(48, 90))
@settings(max_examples=15, deadline=None)
def test_every_picture_is_consistent(seed: int, size: int) -> None:
    sample = draw(np.random.default_rng(seed), size)
    assert sample.image.dtype == sample.mask.dtype == np.uint8
    assert sample.image.shape == (*sample.mask.shape, 3)
    assert max(sample.mask.shape) == size and min(sample.mask.shape) >= 0.83 * size
    listed = {SHAPES_CLASSES.index(name) for name, _ in sample.objects}
    assert sample.objects and set(np.unique(sample.mask).tolist()) <= listed | {0, IGNORE_INDEX}
    boxed = np.zeros_like(sample.mask, dtype=bool)
    for _, (xmin, ymin, xmax, ymax) in sample.objects:
        boxed[ymin - 1 : ymax, xmin - 1 : xmax] = True
    assert boxed[(sample.mask > 0) & (sample.mask != IGNORE_INDEX)].all()


def test_void_separates_whatever_differs(samples: list) -> None:
    for sample in samples:
        for a, b in ((sample.mask[1:], sample.mask[:-1]), (sample.mask[:, 1:], sample.mask[:, :-1])):
            assert not ((a != b) & (a != IGNORE_INDEX) & (b != IGNORE_INDEX)).any()


def test_the_mix_is_what_the_demo_needs(samples: list) -> None:
    counts = np.array([len(sample.objects) for sample in samples])
    kinds = [{name for name, _ in sample.objects} for sample in samples]
    area = np.array([np.isin(sample.mask, range(1, len(SHAPES_CLASSES))).mean() for sample in samples])
    assert set.union(*kinds) == set(SHAPES_CLASSES[1:])
    assert set(counts) == {1, 2, 3}
    assert 0.2 < np.mean([len(names) > 1 for names in kinds]) < 0.5
    assert 0.15 < area.mean() < 0.35 and area.max() < 0.75
    assert len({sample.mask.shape for sample in samples}) > 10


def test_outlines_are_colour_edges(samples: list) -> None:
    """Colours differ across an outline by more than the dense CRF's bilateral kernel forgives (5 levels)."""
    contrast = []
    for sample in samples:
        inside = (sample.mask > 0) & (sample.mask != IGNORE_INDEX)
        around = cv2.dilate(inside.astype(np.uint8), np.ones((11, 11), np.uint8)).astype(bool) & (sample.mask == 0)
        colours = sample.image.astype(float)
        contrast.append(np.abs(colours[inside].mean(0) - colours[around].mean(0)).max())
    assert np.median(contrast) > 25 and np.mean(np.array(contrast) > 5) > 0.9


def test_noise_is_standardised() -> None:
    field = noise(300, 300, 12.0, np.random.default_rng(0))
    assert field.dtype == np.float32 and abs(field.mean()) < 0.1 and 0.8 < field.std() < 1.2


def test_what_covers_hides_what_is_behind() -> None:
    canvas = Canvas(np.zeros((60, 80, 3), np.float32), np.random.default_rng(0))
    canvas.visible = [np.zeros((60, 80), np.float32) for _ in range(2)]
    matrix = np.float32([[10, 0, 40], [0, 10, 30]])
    square = polygon((-1, -1), (1, -1), (1, 1), (-1, 1))
    Brush(canvas, matrix, 0).fill(square, hsv(0, 1, 1), grain=0)
    assert canvas.visible[0].sum() == pytest.approx(21 * 21, rel=0.1)
    np.testing.assert_allclose(canvas.picture[30, 40], [1, 0, 0], atol=1e-4)
    Brush(canvas, matrix, 1).fill(square + np.float32([1, 0]), hsv(0.5, 1, 1), grain=0)
    Brush(canvas, matrix).fill(ellipse(1, 0, 0.5, 0.5), hsv(0.3, 1, 1), grain=0)
    assert canvas.visible[0][30, 35] == 1 and canvas.visible[0][30, 45] == 0
    assert canvas.visible[1][30, 50] == 0 and canvas.visible[1][30, 57] == 1
    assert (canvas.visible[0] + canvas.visible[1]).max() <= 1 + 1e-5


def test_parts_outside_the_picture_change_nothing() -> None:
    canvas = Canvas(np.zeros((20, 20, 3), np.float32), np.random.default_rng(0))
    Brush(canvas, np.float32([[10, 0, 500], [0, 10, 0]])).fill(ellipse(0, 0, 1, 1), hsv(0, 1, 1))
    assert not canvas.picture.any()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # a script is run as a fresh copy of its module
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    command = ["shapes", "--data-dir", str(tmp_path / "set"), "--num_train", "2", "--num-val", "1", "--size", "48"]
    monkeypatch.setattr(sys, "argv", [*command, "--workers", "1"])
    runpy.run_module("datasets.prepare.shapes", run_name="__main__")
    assert "2 training and 1 validation images" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--seed", "9"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("datasets.prepare.shapes", run_name="__main__")
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
