"""COCO's json against pycocotools' own reading of it, pixel by pixel, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from official import COCO_CLASSES, COCO_NUMBERS, coco_annotations, coco_instances, coco_name
from PIL import Image
from pycocotools.coco import COCO

from datasets import build_source
from datasets.folder import COCO14_PARTS, is_written
from datasets.prepare.coco14 import convert, paint
from tools.errors import UserError
from tools.files import load_mask, read_lines


def write(root: Path, change: Callable[[dict], object] = lambda content: None) -> Path:
    """`annotations/` of a small COCO, with eight objects and a crowd in most images."""
    (root / "annotations").mkdir(parents=True)
    for part, numbers in COCO_NUMBERS.items():
        objects = [a for n in numbers if n != 30 for a in coco_annotations(n, 8, n)]
        np.random.default_rng(0).shuffle(objects)  # annotations come in no order of images
        content = coco_instances(part, numbers, objects)
        change(content)
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write(tmp_path_factory.mktemp("coco"), lambda content: content["images"].reverse())
    assert not is_written(root, COCO14_PARTS)
    convert(root, workers=2)
    assert is_written(root, COCO14_PARTS)
    return root


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools itself
@pytest.mark.parametrize("part", COCO_NUMBERS)
def test_masks_are_those_of_pycocotools_pixel_by_pixel(converted, part, capsys):
    coco = COCO(str(converted / "annotations" / f"instances_{part}.json"))
    index_of = {1: 1, 13: 2, 90: 3}
    overlaps = 0
    for number in COCO_NUMBERS[part]:
        objects = coco.loadAnns(coco.getAnnIds(number))
        decoded = [(coco.annToMask(item), item) for item in objects]
        expected = np.zeros((40, 50), np.uint8)
        for y, x in np.ndindex(expected.shape):
            here = [(item["iscrowd"], mask.sum(), -k, item) for k, (mask, item) in enumerate(decoded) if mask[y, x]]
            if here:  # single objects before crowds, then the smallest, then the last
                expected[y, x] = index_of[min(here, key=lambda entry: entry[:3])[3]["category_id"]]
            overlaps += len({item["category_id"] for *_, item in here}) > 1
        np.testing.assert_array_equal(load_mask(converted / "masks" / f"{coco_name(part, number)}.png"), expected)
    assert overlaps > 100


def test_labels_are_the_categories_of_all_annotations(converted):
    assert read_lines(converted / "classes.txt") == COCO_CLASSES
    for part, numbers in COCO_NUMBERS.items():
        content = json.loads((converted / "annotations" / f"instances_{part}.json").read_text())
        ids = [coco_name(part, number) for number in numbers]
        assert read_lines(converted / "splits" / f"{part}.txt") == ids
        rows = dict(line.split(",") for line in read_lines(converted / "labels.csv")[1:])
        names = {1: "person", 13: "stop sign", 90: "toothbrush"}
        for number, image_id in zip(numbers, ids, strict=True):
            shown = {names[a["category_id"]] for a in content["annotations"] if a["image_id"] == number}
            assert set(filter(None, rows[image_id].split(";"))) == shown
    assert rows[coco_name("val2014", 42)] and not rows[coco_name("train2014", 30)]


def test_nothing_else_is_left(converted):
    assert sorted(os.listdir(converted)) == ["annotations", "classes.txt", "labels.csv", "masks", "splits"]
    assert len(os.listdir(converted / "masks")) == 4


def test_converted_again_only_missing_masks_are_made_with_the_same_bytes(converted):
    lost, kept = sorted((converted / "masks").iterdir())[:2]
    before = {path: path.read_bytes() for path in converted.rglob("*") if path.is_file()}
    time = kept.stat().st_mtime_ns
    lost.unlink()
    convert(converted, workers=0)
    assert {path: path.read_bytes() for path in before} == before and kept.stat().st_mtime_ns == time


def test_the_reader_takes_what_the_conversion_made(converted, tmp_path):
    root = shutil.copytree(converted, tmp_path / "coco")
    for part, numbers in COCO_NUMBERS.items():
        (root / part).mkdir()
        for number in numbers:
            Image.new("RGB", (50, 40)).save(root / part / f"{coco_name(part, number)}.jpg")
    source = build_source("coco14", root)
    for image_id in (image_id for part in COCO_NUMBERS for image_id in source.ids(part)):
        present = set(np.unique(source.mask(image_id)).tolist()) - {0}
        assert present <= set((np.flatnonzero(source.image_label(image_id)) + 1).tolist())


def test_crowds_lie_below_and_the_smaller_object_on_top():
    large, small = [[0.0, 0.0, 20.0, 0.0, 20.0, 20.0, 0.0, 20.0]], [[5.0, 5.0, 9.0, 5.0, 9.0, 9.0, 5.0, 9.0]]
    tiny_crowd = {"counts": [0, 3, 397], "size": [20, 20]}
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        objects = [(1, False, large), (2, False, small), (3, True, tiny_crowd)]
        mask = paint([objects[i] for i in order], 20, 20)
        assert mask[0, 0] == 1 and mask[6, 6] == 2 and 3 not in mask
    assert paint([(3, True, tiny_crowd)], 20, 20)[:3, 0].tolist() == [3, 3, 3]
    assert not paint([], 20, 20).any()


def test_of_objects_of_one_size_the_later_one_is_on_top():
    left, right = [[0.0, 0.0, 9.0, 0.0, 9.0, 9.0, 0.0, 9.0]], [[5.0, 0.0, 14.0, 0.0, 14.0, 9.0, 5.0, 9.0]]
    for order in ([0, 1], [1, 0]):
        mask = paint([[(1, False, left), (2, False, right)][i] for i in order], 20, 20)
        assert mask[4, 7] == order[-1] + 1


def test_an_empty_segmentation_counts_for_the_label_and_paints_nothing(tmp_path, capsys):
    """As Label Studio and CVAT write boxes."""

    def change(content: dict) -> None:
        here = [a for a in content["annotations"] if a["image_id"] in (25, 42)]
        for item in here:
            item.update(category_id=90, segmentation=[])
        here[0].update(category_id=13, segmentation={"counts": [], "size": [40, 50]})
        here[1].update(segmentation=[[], [1.0, 2.0, 30.0, 30.0]])
        here[2].update(segmentation=None)

    root = write(tmp_path / "coco", change)
    convert(root, workers=0)
    for part, number, names in (("train2014", 25, "stop sign;toothbrush"), ("val2014", 42, "stop sign;toothbrush")):
        image_id = coco_name(part, number)
        assert not load_mask(root / "masks" / f"{image_id}.png").any()
        assert f"{image_id},{names}" in read_lines(root / "labels.csv")
    assert capsys.readouterr().out.count("json: 10 annotations have an empty segmentation") == 2


def test_a_crowd_counts_for_the_label(tmp_path):
    convert(
        write(
            tmp_path, lambda content: [a.update(iscrowd=int(a["category_id"] == 90)) for a in content["annotations"]]
        ),
        0,
    )
    assert f"{coco_name('val2014', 42)},person;stop sign;toothbrush" in read_lines(tmp_path / "labels.csv")


def test_empty_parts_of_an_outline_are_left_out(tmp_path):
    def change(content: dict) -> None:
        content["annotations"] = content["annotations"][:1]
        square = [4.0, 4.0, 9.0, 4.0, 9.0, 9.0, 4.0, 9.0]
        content["annotations"][0].update(segmentation=[[0.0, 0.0, 40.0, 40.0], square, []], category_id=13, iscrowd=0)

    root = write(tmp_path, change)
    convert(root, workers=0)
    assert sorted((load_mask(path) == 2).sum() for path in (root / "masks").iterdir())[-2:] == [25, 25]


def test_folders_before_file_names_are_left_out(tmp_path):
    def change(content: dict) -> None:
        for image, folder in zip(content["images"], ("images\\3\\", "a/b/", "/"), strict=False):
            image["file_name"] = folder + image["file_name"].replace(".jpg", "\u200b.jpg")  # which copying leaves

    convert(write(tmp_path, change), workers=0)
    for part, numbers in COCO_NUMBERS.items():
        assert read_lines(tmp_path / "splits" / f"{part}.txt") == [coco_name(part, number) for number in numbers]


@pytest.mark.parametrize("counts", [[10, 20], [10, 591], [10, 589], [1.5, 598.5], "0b", "", "\u00e9"])
def test_run_lengths_that_do_not_fill_the_image_are_refused(counts):
    """pycocotools would paint what lies in memory behind them."""
    assert paint([(1, False, {"size": [20, 30], "counts": [10, 590]})], 20, 30).sum() == 590
    with pytest.raises(ValueError):
        paint([(1, False, {"size": [20, 30], "counts": counts})], 20, 30)


MISTAKES: dict[str, tuple[Callable[[dict], object], str]] = {
    "unknown category": (
        lambda c: c["annotations"][0].update(category_id=2),
        r"annotation of category_id 2, which is not in 'categ",
    ),
    "unknown image": (
        lambda c: c["annotations"][0].update(image_id=7),
        r"annotation of image_id 7, which is not in 'images'",
    ),
    "image twice": (lambda c: c["images"].append(c["images"][0]), r"an id occurs twice in 'images'\)\. Unpack"),
    "file twice": (
        lambda c: c["images"].append(c["images"][0] | {"id": 99, "file_name": "b/" + c["images"][0]["file_name"]}),
        r"file 'COCO\w+' occurs twice",
    ),
    "background": (
        lambda c: c.update(categories=[*c["categories"], {"id": 99, "name": "Background"}]),
        r"'Background' is too much like 'background'",
    ),
    "no annotations": (lambda c: c.pop("annotations"), r"no 'annotations' in it"),
    "no categories": (lambda c: c.update(categories=[]), r"no 'categories' in it"),
    "no segmentation": (
        lambda c: c["annotations"][3].pop("segmentation"),
        r"an element of 'annotations' lacks 'segmentation'",
    ),
    "captions": (
        lambda c: [a.pop("category_id") for a in c["annotations"]],
        r"not a readable json of COCO's objects \('category_id'\)",
    ),
    "list of numbers": (lambda c: c.update(images=[1, 2]), "not a readable json of COCO's objects"),
    "odd polygon": (
        lambda c: c["annotations"][0].update(segmentation="x"),
        r"COCO_train2014_\d+\.jpg: not a readable outline of an object",
    ),
    "no number": (
        lambda c: c["annotations"][0].update(segmentation=[[1, 1, 9, 1, 9, float("nan")]]),
        r"COCO_train2014_\d+\.jpg: not a readable outline of an object \(a coordinate is no number",
    ),
    "size of a mask": (
        lambda c: c["annotations"][0].update(segmentation={"counts": [4], "size": [2, 2]}),
        r"is for 2x2 pixels, not 50x40",
    ),
    "mask on its side": (
        lambda c: c["annotations"][0].update(segmentation={"counts": [0, 2000], "size": [50, 40]}),
        r"is for 40x50 pixels, not 50x40",
    ),
    "run lengths": (
        lambda c: c["annotations"][0].update(segmentation={"counts": [10, 20], "size": [40, 50]}),
        r"object \(run lengths that do not add up to the image\)\. Unpack",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_json_that_contradicts_itself_is_one_line(tmp_path, mistake):
    change, message = MISTAKES[mistake]
    root = write(tmp_path / "coco", lambda content: change(content))
    with pytest.raises(UserError, match=message) as caught:
        convert(root, workers=0)
    assert "\n" not in str(caught.value) and not is_written(root, COCO14_PARTS)
    assert sorted(os.listdir(root)) == ["annotations", "masks"]


def test_a_truncated_json_is_one_line(tmp_path):
    path = write(tmp_path) / "annotations" / "instances_train2014.json"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(
        UserError, match=r"instances_train2014\.json: not a readable json of COCO's objects \(.*\)\. Unpack"
    ) as caught:
        convert(tmp_path, workers=0)
    assert "\n" not in str(caught.value)


def test_categories_of_two_releases_and_a_missing_file(tmp_path):
    path = write(tmp_path) / "annotations" / "instances_val2014.json"
    content = path.read_text()
    swapped = content.replace("toothbrush", "x").replace("stop sign", "toothbrush").replace('"x"', '"stop sign"')
    for other in (content.replace("toothbrush", "broom"), swapped):
        path.write_text(other)
        with pytest.raises(UserError, match="other categories than in instances_train2014"):
            convert(tmp_path, workers=0)
    path.unlink()
    with pytest.raises(UserError, match=r"instances_val2014\.json: no such json"):
        convert(tmp_path, workers=0)
