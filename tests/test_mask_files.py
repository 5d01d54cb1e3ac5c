"""Masks of other programs: what amg.py and SA-1B write is read as it was meant, and damage is named."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_rle
from segment_anything.utils.amg import mask_to_rle_pytorch

from tools.errors import UserError
from tools.proposals.files import fingerprints, read_masks
from tools.rle import encode

SIZE = (9, 14)
MASKS = np.random.default_rng(0).random((12, *SIZE)) < 0.4
IMAGE = np.zeros((*SIZE, 3), np.uint8)


def write_folder(folder, masks):
    """As `write_masks_to_folder` of segment_anything's amg.py, whose 255 is 1 in some that others write."""
    folder.mkdir(parents=True)
    rows = ["id,area,bbox_x0,bbox_y0,bbox_w,bbox_h,point_input_x,point_input_y,predicted_iou,stability_score"]
    for index, mask in enumerate(masks):
        cv2.imwrite(str(folder / f"{index}.png"), mask * (1 if index % 2 else 255))
        rows.append(f"{index},{mask.sum()},0,0,1,1,0.5,0.5,0.9,0.9")
    (folder / "metadata.csv").write_text("\n".join(rows))


def records(masks):
    rles = [{"size": list(SIZE), "counts": rle["counts"].decode()} for rle in encode(masks)]
    return [{"segmentation": rle, "area": 1} for rle in rles]


def read(root):
    (masks,) = read_masks(root, ["a"], [IMAGE])
    return coco_rle.decode(masks).transpose(2, 0, 1) if masks else np.zeros((0, *SIZE))


@pytest.mark.parametrize("count", [0, 1, 12])
def test_folders_of_pictures(tmp_path, count):
    write_folder(tmp_path / "a", MASKS[:count])
    np.testing.assert_array_equal(read(tmp_path), MASKS[:count])


def test_fingerprints_are_of_the_list_and_the_pictures(tmp_path):
    write_folder(tmp_path / "a", MASKS)
    (tmp_path / "b.json").write_text("[]")
    before = fingerprints(tmp_path, "abc")
    assert before == fingerprints(tmp_path, "abc") and before["c"] == "" != before["b"]
    cv2.imwrite(str(tmp_path / "a" / "3.png"), np.zeros(SIZE))
    (tmp_path / "b.json").write_text("[ ]")
    after = fingerprints(tmp_path, "abc")
    assert before["a"] != after["a"] and before["b"] != after["b"] and after["c"] == ""


def test_a_table_with_the_mark_of_utf8(tmp_path):
    write_folder(tmp_path / "a", MASKS)
    table = tmp_path / "a" / "metadata.csv"
    table.write_text(table.read_text(), encoding="utf-8-sig")
    np.testing.assert_array_equal(read(tmp_path), MASKS)


@pytest.mark.parametrize("layout", ["amg", "sa1b", "uncompressed"])
def test_rle_in_json(tmp_path, layout):
    content = {
        "amg": records(MASKS),
        "sa1b": {"image": {"image_id": 1}, "annotations": records(MASKS)},
        "uncompressed": [{"segmentation": rle} for rle in mask_to_rle_pytorch(torch.from_numpy(MASKS))],
    }[layout]
    (tmp_path / "a.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(read(tmp_path), MASKS)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"no masks of a: neither a/metadata.csv nor a.json"):
        read(tmp_path)
    (tmp_path / "a").rmdir()
    write_folder(tmp_path / "a", MASKS)
    (tmp_path / "a" / "3.png").unlink()
    with pytest.raises(UserError, match="3.png: no such mask"):
        read(tmp_path)


def test_masks_of_another_image_are_named(tmp_path):
    write_folder(tmp_path / "a", MASKS[:, :-1])
    with pytest.raises(UserError, match=r"0.png: 14x8 pixels, but its image is 14x9"):
        read(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.json").write_text(json.dumps(records(MASKS)).replace("[9, 14]", "[14, 9]"))
    with pytest.raises(UserError, match=r"a.json: 9x14 pixels"):
        read(tmp_path / "b")


@pytest.mark.parametrize("text", ["", "[1]", '{"masks": []}', '[{"segmentation": {"size": [9, 14], "counts": "z5"}}]'])
def test_damaged_rle_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a.json: not a readable file of masks as COCO RLE"):
        read(tmp_path)


def test_another_table_is_named(tmp_path):
    write_folder(tmp_path / "a", MASKS)
    for text in ("name\n0\n", ""):
        (tmp_path / "a" / "metadata.csv").write_text(text)
        with pytest.raises(UserError, match=r"metadata.csv: not a readable list of masks"):
            read(tmp_path)
