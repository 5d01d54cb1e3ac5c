"""Verification: what it counts, what it finds, and what it makes of an official list."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import refusal, run
from conftest import OBJECTS, SPLITS
from PIL import Image

from datasets import build_source
from datasets.base import DatasetInfo
from datasets.verify import (
    ERRORS,
    PUBLISHED,
    WARNINGS,
    Published,
    Split,
    histogram,
    print_findings,
    table,
    verify,
    write_report,
)

SHARED = {"overlap": ["1 of 2 ids of val are in train too, the first is 'b'"]}  # in every fixture


def look(root: Path, published: dict[str, Published] | None = None, dataset: str = "folder"):
    return verify(build_source(dataset, root), published or {}, workers=0)


def found(findings: dict[str, list[str]]) -> dict[str, list[str]]:
    return {kind: texts for kind, texts in findings.items() if texts}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sound_folder_has_no_findings_and_these_counts(folder_root, workers):
    splits, findings = verify(build_source("folder", folder_root), {}, workers)
    assert found(findings) == SHARED and set(findings) == {*ERRORS, *WARNINGS}
    source = build_source("folder", folder_root)
    for domain, ids in SPLITS.items():
        split = splits[domain]
        assert (split.images, split.counts["labels"], split.counts["masks"]) == (len(ids),) * 3
        assert split.label_counts.tolist() == [0, *(sum(c in OBJECTS[i] for i in ids) for c in ("cat", "dog"))]
        pixels = [sum(int((source.mask(i) == index).sum()) for i in ids) for index in range(3)]
        assert split.pixel_counts.tolist() == pixels


def test_every_fault_is_found_where_it_is(folder_copy):
    images, masks = folder_copy / "images", folder_copy / "masks"
    (images / "c.jpeg").write_bytes((images / "a.jpg").read_bytes())
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:300])
    Image.fromarray(np.full((24, 40), 2, np.uint8)).save(masks / "a.png")
    (masks / "d.png").unlink()
    (folder_copy / "splits" / "val.txt").write_text("b\nd\nd\nghost\n")
    (folder_copy / "splits" / "empty.txt").touch()
    (folder_copy / "labels.csv").write_text("id,labels\na,cat\nb,cat;dog\n")
    splits, findings = look(folder_copy)
    assert findings["list"] == ["split 'empty' is empty", "split 'val' lists 'd' twice"]
    assert findings["missing"] == ["ghost: no photograph"]
    assert len(findings["unreadable"]) == 1 and "images/b.png: not a readable image" in findings["unreadable"][0]
    assert findings["unlabelled"] == [f"{masks / 'a.png'}: shows dog, unlike the image label"]
    assert findings["copies"] == ["a (train) = c (train)"]
    assert findings["label"] == [
        "split 'train': 2 of 3 images have labels, so it cannot be learnt from; the first without is 'c'",
        "split 'val': 1 of 2 images have labels, so it cannot be learnt from; the first without is 'd'",
    ]
    lacking = "split 'val': 1 of 2 images have masks, so it cannot be scored; the first without is 'd'"
    assert findings["partial"] == [lacking] and splits["val"].partly() == {"labels": ["d"], "masks": ["d"]}
    assert [text.split(": ")[0] for text in findings["mask"]] == [f"{masks / 'c.png'}"]  # now of another size
    assert splits["train"].counts["copies"] == 2 and splits["val"].counts["missing"] == 1


def test_labels_are_not_asked_of_a_test_split(folder_copy):
    (folder_copy / "labels.csv").write_text("id,labels\na,cat\nb,cat;dog\nc,dog\n")
    (folder_copy / "splits" / "val.txt").write_text("d\n")
    (folder_copy / "masks" / "d.png").unlink()
    assert found(look(folder_copy)[1]) == {}


def test_a_folder_without_any_label_teaches_nothing(folder_copy):
    (folder_copy / "labels.csv").unlink()
    assert found(look(folder_copy)[1]) == SHARED | {
        "label": ["no training image has a label, so nothing can be learnt"]
    }


def test_a_class_that_is_everywhere_cannot_be_told_from_the_background(folder_copy):
    (folder_copy / "labels.csv").write_text("id,labels\na,cat\nb,cat;dog\nc,cat\nd,cat\n")
    everywhere = "class 'cat' is in every training label, so labels cannot tell where it is. Add images without it"
    assert look(folder_copy)[1]["unused"] == [everywhere]


@pytest.mark.parametrize("name", ["train", "my_train"])
def test_a_class_that_only_val_shows_cannot_be_learnt(folder_copy, name):
    """As lists are that were cut from a table sorted by class."""
    (folder_copy / "splits" / "train.txt").unlink()
    (folder_copy / "splits" / f"{name}.txt").write_text("a\n")
    (folder_copy / "splits" / "val.txt").write_text("b\nc\nd\n")
    assert "class 'dog' is in no training label" in look(folder_copy)[1]["unused"]
    (folder_copy / "labels.csv").write_text("id,labels\nb,cat;dog\nc,dog\nd,\n")
    assert look(folder_copy)[1]["label"] == ["no training image has a label, so nothing can be learnt"]


@pytest.mark.parametrize(
    "label, told", [("", ": with different labels"), ("dog", ": with different labels"), ("cat", "")]
)
def test_a_leak_from_val_into_train_is_a_copy_of_two_splits(folder_copy, label, told):
    (folder_copy / "images" / "d.webp").write_bytes((folder_copy / "images" / "a.jpg").read_bytes())
    (folder_copy / "labels.csv").write_text(f"id,labels\na,cat\nb,cat;dog\nc,dog\nd,{label}\n")
    assert look(folder_copy)[1]["copies"] == [f"a (train) = d (val){told}"]


def test_copies_count_in_every_split_of_each(folder_copy):
    (folder_copy / "images" / "c.jpeg").write_bytes((folder_copy / "images" / "b.png").read_bytes())
    splits, findings = look(folder_copy)
    assert findings["copies"] == ["b (train, val) = c (train): with different labels"]
    assert (splits["train"].counts["copies"], splits["val"].counts["copies"]) == (2, 1)


def test_labels_that_name_no_class_teach_nothing(folder_copy):
    (folder_copy / "labels.csv").write_text("id,labels\na,\nb,background\nc,\nd,\n")
    assert look(folder_copy)[1]["label"] == ["no training label names a class, so nothing can be learnt"]


@pytest.mark.parametrize("brightest", [0, 16, 17])
def test_photographs_that_are_nearly_black_are_warned_of(folder_copy, brightest):
    """As numbers of 12 bits in a file of 16 are."""
    path = folder_copy / "images" / "b.png"
    Image.new("RGB", (31, 31), (0, brightest, 0)).save(path)
    remedy = "If it holds 12 bits in 16, stretch them; if it is black, replace it"
    text = f"{path}: no value above {brightest} of 255. {remedy}"
    findings = look(folder_copy)[1]
    assert findings["dark"] == [text] * (brightest <= 16) and findings["unreadable"] == []
    for name, size in (("a.jpg", (40, 24)), ("d.webp", (20, 20))):
        Image.new("RGB", size).save(folder_copy / "images" / name)
    assert len(look(folder_copy)[1]["unreadable"]) == (brightest <= 16)


def test_findings_are_shortened_on_screen(capsys):
    print_findings({kind: ["x" * 3000] * 7 if kind == "copies" else [] for kind in (*ERRORS, *WARNINGS)})
    _, title, *lines, rest = capsys.readouterr().out.splitlines()
    assert "several ids (7)" in title and rest == "  ... and 2 more"
    assert lines == ["  " + "x" * 400 + " ..."] * 5


def test_published_are_the_official_lists(voc_copy, tmp_path, capsys):
    """As their authors count them; the command compares with them."""
    counts = {name: {domain: split.images for domain, split in splits.items()} for name, splits in PUBLISHED.items()}
    assert counts == {
        "voc12": {"train_aug": 10582, "train": 1464, "val": 1449, "test": 1456},
        "coco14": {"train2014": 82783, "val2014": 40504},
    }
    bare = {(name, domain) for name in PUBLISHED for domain, split in PUBLISHED[name].items() if not split.labels}
    assert bare == {("voc12", "test")}
    refusal(
        capsys, "datasets.verify", "--dataset", "voc12", "--data_dir", voc_copy, "--output_dir", tmp_path / "report"
    )
    assert json.loads((tmp_path / "report" / "verify.json").read_text())["findings"]["list"] == [
        "split 'train' lists 3 images, the published list 1464",
        "split 'train_aug' lists 4 images, the published list 10582",
        "split 'val' lists 2 images, the published list 1449",
    ]


def test_photographs_of_a_published_dataset_may_be_in_no_list(voc_copy):
    (voc_copy / "ImageSets" / "Segmentation" / "train_aug.txt").unlink()
    (voc_copy / "ImageSets" / "Segmentation" / "val.txt").write_text("b\n")
    assert look(voc_copy, dataset="voc12")[1]["unlisted"] == [f"{voc_copy}/JPEGImages/d.jpg: in no list"]
    published = {"train": Published(3), "val": Published(1)}
    splits, findings = look(voc_copy, published, "voc12")
    assert findings["unlisted"] == []
    columns, row, _ = (line.split() for line in table(splits, {"train": Published(7)}).splitlines())
    assert row[columns.index("known")] == "7"


def test_a_published_split_must_have_its_images_labels_and_masks(voc_copy):
    published = {
        "train": Published(3),
        "val": Published(7),
        "train_aug": Published(4, masks=False),
    }
    (voc_copy / "SegmentationClass" / "c.png").unlink()
    (voc_copy / "Annotations" / "d.xml").unlink()
    findings = look(voc_copy, published, "voc12")[1]
    assert found(findings) == {
        "list": ["split 'val' lists 2 images, the published list 7"],
        "mask": ["split 'train': 2 of 3 images have masks, so it cannot be scored; the first without is 'c'"],
        "label": [
            "split 'train_aug': 3 of 4 images have labels, so it cannot be learnt from; the first without is 'd'",
            "split 'val': 1 of 2 images have labels, so it cannot be learnt from; the first without is 'd'",
        ],
        "overlap": [*SHARED["overlap"], "2 of 2 ids of val are in train_aug too, the first is 'b'"],
    }


def test_a_published_split_without_masks_may_be_asked_for_them(voc_copy):
    published = {"train_aug": Published(4, masks=False)}
    (voc_copy / "SegmentationClass" / "d.png").unlink()
    source = build_source("voc12", voc_copy)
    assert verify(source, published, 0)[1]["mask"] == []
    text = "split 'train_aug': 3 of 4 images have masks, so it cannot be scored; the first without is 'd'"
    assert verify(source, published, 0, scored=["train_aug"])[1]["mask"] == [text]


def test_broken_labels_and_masks_are_bad(voc_copy):
    (voc_copy / "Annotations" / "a.xml").write_text("<annotation><object><name>cow boy</name></object></annotation>")
    (voc_copy / "SegmentationClass" / "b.png").write_bytes(b"no mask")
    Image.fromarray(np.full((50, 18), 77, np.uint8)).save(voc_copy / "SegmentationClass" / "c.png")
    splits, findings = look(voc_copy, dataset="voc12")
    assert "unknown class 'cow boy'" in findings["label"][0] and len(findings["label"]) == 1
    assert ["not a readable mask" in findings["mask"][0], "holds the value 77" in findings["mask"][1]] == [True, True]
    assert splits["train"].counts["mask"] == 2 and splits["train"].counts["label"] == 1
    columns, row = (line.split() for line in table({"train": splits["train"]}, {}).splitlines())
    assert row[columns.index("bad")] == "3"


def test_the_command_prints_the_table_and_writes_the_report(folder_root, tmp_path, capsys):
    run("datasets.verify", "train", "--dataset", "folder", "--data_dir", folder_root, "--output_dir", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.startswith(("split", "train", "val"))]
    assert table[1] == ["train", "3", "-", "0", "0", "3", "3", "0", "0", "0"] and len(table[0]) == len(table[1])
    report = json.loads((tmp_path / "verify.json").read_text())
    assert report["splits"]["train"]["images_by_class"] == {"cat": 2, "dog": 2}
    assert found(report["findings"]) == SHARED
    with Image.open(tmp_path / "classes.png") as picture:
        assert picture.size[0] > 600 and len(set(picture.convert("L").tobytes())) > 2


def test_counts_of_one_image_are_numbers(folder_copy, tmp_path):
    (folder_copy / "splits" / "dev.txt").write_text("a\n")
    run("datasets.verify", "dev", "--dataset", "folder", "--data_dir", folder_copy, "--output_dir", tmp_path)
    split = json.loads((tmp_path / "verify.json").read_text())["splits"]["dev"]
    assert [(split[what], type(split[what])) for what in ("labels", "masks")] == [(1, int), (1, int)]


def test_it_does_without_pytorch(folder_root, tmp_path):
    """Which would be half of the time that 2,139 photographs take."""
    flags = ["--dataset", "folder", "--data_dir", str(folder_root), "--output_dir", str(tmp_path), "--num_workers", "0"]
    code = (
        f"import runpy, sys; sys.argv = {['verify', *flags]}; runpy.run_module('datasets.verify', run_name='__main__')"
        "; print('torch' in sys.modules)"
    )
    root = Path(sys.modules["datasets"].__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("classes.png\nFalse\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "labels.csv").write_text("id,labels\na,cow\n"),
            "labels.csv, line 2: unknown class 'cow'",
        ),
        (lambda root: (root / "splits" / "dev.txt").rename(root / "x"), "no domain 'dev'. Choose one of: train, val."),
        (lambda root: (root / "splits" / "dev.txt").write_text("nobody\n"), "2 errors, listed in report/verify.json"),
        (lambda root: (root / "classes.txt").unlink(), "classes.txt: no such file"),
    ],
)
def test_what_is_wrong_ends_in_one_line_and_code_2(folder_copy, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (folder_copy / "splits" / "dev.txt").write_text("b\n")
    (folder_copy / "images" / "c.jpeg").write_bytes(b"no image")
    change(folder_copy)
    flags = ["dev", "--dataset", "folder", "--data_dir", folder_copy, "--output_dir", "report", "--num_workers", "0"]
    assert message in refusal(capsys, "datasets.verify", *flags)


def test_a_split_to_be_scored_must_be_there(folder_root, tmp_path, capsys):
    flags = ["--dataset", "folder", "--data_dir", folder_root, "--output_dir", tmp_path, "--scored", "vall"]
    assert "no domain 'vall'. Choose one of: train, val." in refusal(capsys, "datasets.verify", *flags)


def test_the_histogram_shows_shares_to_scale(tmp_path):
    info = DatasetInfo(("background", "cat", "dog"))
    split = Split(5, classes=3)  # one of them without labels
    split.label_counts[:], split.pixel_counts[:] = [0, 4, 1], [60, 30, 10]
    split.counts["labels"] = 4
    axes = histogram(info, {"train": split, "val": Split(0, classes=3)}).axes
    bars = [[patch.get_width() for patch in axis.patches] for axis in axes]
    np.testing.assert_allclose(bars[0], [np.nan, 100, 25, np.nan, 0, 0])  # three classes of train, then of val
    np.testing.assert_allclose(bars[1], [60, 30, 10, 0, 0, 0])
    assert [text.get_text() for text in axes[1].texts] == ["60.0", "30.0", "10.0"]
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["background", "cat", "dog"]
    write_report(tmp_path, info, {"train": split}, {})
    assert json.loads((tmp_path / "verify.json").read_text())["splits"]["train"] == {
        "images": 5,
        "labels": 4,
        "images_by_class": {"cat": 4, "dog": 1},
        "pixels_by_class": {"background": 60, "cat": 30, "dog": 10},
    }
