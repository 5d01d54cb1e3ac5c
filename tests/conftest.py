"""Fixtures for everybody: two tiny datasets on disk, one per layout.

`voc_root` and `folder_root` are shared by the whole run, so only read them; `voc_copy` and `folder_copy` are yours to
break.
They hold the same four images (`SIZES`) with the objects of `OBJECTS`: coloured rectangles that the masks outline.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.base import voc_palette
from tools.files import save_mask

SIZES = {"a": (24, 40), "b": (31, 31), "c": (50, 18), "d": (20, 20)}  # height, width
OBJECTS = {"a": ["cat"], "b": ["cat", "dog"], "c": ["dog"], "d": []}
SPLITS = {"train": ["a", "b", "c"], "val": ["b", "d"]}
COLOURS = {"cat": (220, 60, 40), "dog": (40, 90, 220)}

torch.set_num_threads(1)


def draw(image_id: str, index_of: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """A photograph (uint8 HxWx3) and its mask (uint8 HxW), with one ignored row below each object."""
    height, width = SIZES[image_id]
    image = np.random.default_rng(ord(image_id)).integers(90, 140, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    for order, name in enumerate(OBJECTS[image_id]):
        rows = slice(2 + 9 * order, 8 + 9 * order)
        image[rows, 3:12] = COLOURS[name]
        mask[rows, 3:12] = index_of[name]
        mask[rows.stop, 3:12] = 255
    return image, mask


def write_folder(root: Path) -> Path:
    """The `folder` layout: images of every accepted suffix, classes background, cat, dog."""
    for name in ("images", "masks", "splits"):
        (root / name).mkdir(parents=True)
    for image_id, suffix in zip(SIZES, ("jpg", "png", "jpeg", "webp"), strict=True):
        image, mask = draw(image_id, {"cat": 1, "dog": 2})
        Image.fromarray(image).save(root / "images" / f"{image_id}.{suffix}")
        save_mask(root / "masks" / f"{image_id}.png", mask, voc_palette())
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    rows = [f"{image_id},{';'.join(names)}\n" for image_id, names in OBJECTS.items()]
    (root / "labels.csv").write_text("id,labels\n" + "".join(rows))
    for domain, ids in SPLITS.items():
        (root / "splits" / f"{domain}.txt").write_text("\n".join(ids) + "\n")
    return root


def write_voc(root: Path) -> Path:
    """The VOC devkit layout, with VOC's own class indices (cat 8, dog 12)."""
    for name in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for image_id, names in OBJECTS.items():
        image, mask = draw(image_id, {"cat": 8, "dog": 12})
        Image.fromarray(image).save(root / "JPEGImages" / f"{image_id}.jpg")
        save_mask(root / "SegmentationClass" / f"{image_id}.png", mask, voc_palette())
        part = "<part><name>head</name></part>"
        objects = "".join(f"<object><name>{name}</name>{part}</object>" for name in [*names, *names[:1]])
        (root / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{objects}</annotation>")
    lists = root / "ImageSets" / "Segmentation"
    for domain, ids in SPLITS.items():
        (lists / f"{domain}.txt").write_text("\n".join(ids) + "\n")
    paths = [f"/JPEGImages/{image_id}.jpg /SegmentationClassAug/{image_id}.png\n" for image_id in SIZES]
    (lists / "train_aug.txt").write_text("".join(paths))
    return root


@pytest.fixture(scope="session")
def folder_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "folder")


@pytest.fixture(scope="session")
def voc_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `VOCdevkit/VOC2012` in it."""
    root = tmp_path_factory.mktemp("data")
    write_voc(root / "VOCdevkit" / "VOC2012")
    return root


@pytest.fixture
def folder_copy(folder_root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder_root, tmp_path / "folder")


@pytest.fixture
def voc_copy(voc_root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(voc_root / "VOCdevkit" / "VOC2012", tmp_path / "voc")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Change into a new folder, so that runs of one tag do not see each other."""

    def change(name: str) -> None:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)

    return change
