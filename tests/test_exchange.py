"""Masks to annotation tools and back: our round trips byte for byte, the files in the tools' own readers."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import shutil
import sys
import types
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import SIZES
from PIL import Image

from datasets import build_source
from datasets.base import DatasetInfo, voc_palette
from datasets.exchange import __main__ as exchange
from datasets.exchange.labels import Labels
from tools.errors import UserError
from tools.files import load_mask, save_mask

HAS_SDK = importlib.util.find_spec("label_studio_sdk") is not None
FORMATS = ["cvat", "coco", "labelstudio"]
FILES = {"cvat": "masks.zip", "coco": "instances.json", "labelstudio": "tasks.json"}


@pytest.fixture(autouse=True)
def brush(monkeypatch):
    """The codec of Label Studio's SDK. Where that is not installed, one that packs nothing stands in for it."""
    if not HAS_SDK:
        codec = types.ModuleType("label_studio_sdk.converter.brush")
        codec.encode_rle, codec.decode_rle = np.ndarray.tolist, functools.partial(np.array, dtype=np.uint8)
        codec.mask2rle = lambda mask: codec.encode_rle(np.repeat(mask.ravel(), 4))
        monkeypatch.setitem(sys.modules, codec.__name__, codec)
    return importlib.import_module("label_studio_sdk.converter.brush")


def call(root, direction, tool, masks, output, *flags):
    arguments = [direction, "--format", tool, "--dataset", "folder", "--data_dir", root, "--masks_dir", masks]
    arguments += ["--output_dir", output, *flags]
    exchange.main(exchange.make_parser().parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def masks(folder_root, tmp_path):
    """Masks of a, b, c, which are of odd sizes: random ones, one of all classes and 255, one empty."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "masks"
    save_mask(folder / "a.png", generator.choice([0, 1, 2, 255], SIZES["a"]), voc_palette())
    save_mask(folder / "b.png", np.zeros(SIZES["b"]), voc_palette())
    single = np.zeros(SIZES["c"])
    single[-1, -1] = 2  # one pixel, in the corner
    save_mask(folder / "c.png", single, voc_palette())
    return folder


def finish(path: Path) -> Path:
    """What Label Studio exports once somebody has accepted the pre-annotations; other files as they are."""
    if path.name == "tasks.json":
        tasks = json.loads(path.read_text())
        for task in tasks:
            task["annotations"] = [{"result": prediction["result"]} for prediction in task.pop("predictions")]
        path.write_text(json.dumps(tasks))
    return path


@pytest.mark.parametrize("tool", FORMATS)
def test_nothing_changes_on_the_way_there_and_back(folder_root, masks, tmp_path, tool, capsys):
    call(folder_root, "export", tool, masks, tmp_path / "out")
    path = finish(tmp_path / "out" / FILES[tool])
    call(folder_root, "import", tool, masks, tmp_path / "corrected", "--input", path)
    seen = 2 if tool == "labelstudio" else 3  # one without strokes does not count
    assert f"0 of {seen} masks differ" in capsys.readouterr().out
    assert list((tmp_path / "corrected").iterdir()) == []


@pytest.mark.parametrize("tool", FORMATS)
def test_masks_come_back_byte_for_byte(folder_root, masks, tmp_path, tool):
    call(folder_root, "export", tool, masks, tmp_path / "out")
    path = finish(tmp_path / "out" / FILES[tool])
    wrong = tmp_path / "wrong"  # as if all of it had been drawn in the tool
    for image_id in "abc":
        save_mask(wrong / f"{image_id}.png", np.full(SIZES[image_id], 2), voc_palette())
    call(folder_root, "import", tool, wrong, tmp_path / "corrected", "--input", path)
    for image_id in "ac" if tool == "labelstudio" else "abc":
        assert (tmp_path / "corrected" / f"{image_id}.png").read_bytes() == (masks / f"{image_id}.png").read_bytes()


def repaint(path: Path, tool: str) -> Path:
    """Give mask c of an export the class 1 in its second row, as a person would in the tool."""
    if tool == "cvat":
        with zipfile.ZipFile(path) as file:
            content = {name: file.read(name) for name in file.namelist()}
        with Image.open(io.BytesIO(content["SegmentationClass/c.png"])) as picture:
            pixels = np.array(picture.convert("RGB"))  # as CVAT writes them
        pixels[1] = voc_palette()[1]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        with zipfile.ZipFile(path, "w") as file:
            for name, data in content.items():
                file.writestr(name, buffer.getvalue() if name == "SegmentationClass/c.png" else data)
        return path
    content = json.loads(path.read_text())
    if tool == "coco":
        height, width = SIZES["c"]
        box = [0, 1, width, 1, width, 2, 0, 2]
        content["annotations"].append({"id": 99, "image_id": 3, "category_id": 1, "segmentation": [box]})
    else:
        from label_studio_sdk.converter.brush import mask2rle

        drawn = np.zeros(SIZES["c"], np.uint8)
        drawn[1] = 255
        stroke = {**content[2]["annotations"][0]["result"][0]}
        stroke["value"] = {"format": "rle", "rle": mask2rle(drawn), "brushlabels": ["cat"]}
        content[2]["annotations"][0]["result"].append(stroke)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("tool", FORMATS)
def test_only_what_was_changed_is_written(folder_root, masks, tmp_path, tool):
    call(folder_root, "export", tool, masks, tmp_path / "out")
    path = repaint(finish(tmp_path / "out" / FILES[tool]), tool)
    call(folder_root, "import", tool, masks, tmp_path / "corrected", "--input", path)
    assert [file.name for file in (tmp_path / "corrected").iterdir()] == ["c.png"]
    expected = load_mask(masks / "c.png").copy()
    expected[1] = 1
    assert np.array_equal(load_mask(tmp_path / "corrected" / "c.png"), expected)


def test_a_class_put_right_is_a_change(folder_root, masks, tmp_path):
    """Nothing is drawn or erased then."""
    call(folder_root, "export", "coco", masks, tmp_path / "out")
    path = tmp_path / "out" / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"][-1]["category_id"] = 1
    path.write_text(json.dumps(content))
    call(folder_root, "import", "coco", masks, tmp_path / "corrected", "--input", path)
    assert load_mask(masks / "c.png")[-1, -1] == 2 and load_mask(tmp_path / "corrected" / "c.png")[-1, -1] == 1


def test_a_mask_on_its_side_is_refused(folder_root, masks, tmp_path, monkeypatch):
    height, width = SIZES["a"]
    monkeypatch.setitem(SIZES, "a", (width, height))
    path = cvat_zip(tmp_path / "x.zip", "background:0,0,0::\n", a=(0, 0, 0))
    with pytest.raises(UserError, match=f"x.zip/a: {height}x{width} pixels, but its image is {width}x{height}"):
        call(folder_root, "import", "cvat", masks, tmp_path / "out", "--input", path)


def test_a_folder_of_a_stage_takes_no_corrections(folder_root, masks, tmp_path):
    call(folder_root, "export", "coco", masks, tmp_path / "out")
    path = repaint(tmp_path / "out" / "instances.json", "coco")
    before = (masks / "c.png").read_bytes()
    (masks / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="masks: holds what a stage made. Choose another --output_dir"):
        call(folder_root, "import", "coco", masks, masks, "--input", path)
    assert (masks / "c.png").read_bytes() == before


def test_a_correction_taken_back_is_taken_back(folder_root, masks, tmp_path):
    call(folder_root, "export", "coco", masks, tmp_path / "out")
    original = (tmp_path / "out" / "instances.json").read_text()
    repaint(tmp_path / "out" / "instances.json", "coco")
    for _ in range(2):
        call(folder_root, "import", "coco", masks, tmp_path / "corrected", "--input", tmp_path / "out/instances.json")
        (tmp_path / "out" / "instances.json").write_text(original)
    assert np.array_equal(load_mask(tmp_path / "corrected" / "c.png"), load_mask(masks / "c.png"))


def test_the_first_of_the_queue_are_exported_with_their_photographs(folder_copy, masks, tmp_path):
    (tmp_path / "review.csv").write_text("id,doubt\nc,0.9\na,0.5\nb,0.1\n")
    turned = Image.fromarray(np.zeros((18, 50, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(folder_copy / "images" / "c.jpeg", exif=exif)
    flags = ["--review", tmp_path / "review.csv", "--first", 2]
    call(folder_copy, "export", "coco", masks, tmp_path / "out", *flags)
    content = json.loads((tmp_path / "out" / "instances.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["c.png", "a.jpg"]
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["a.jpg", "c.png"]
    assert Image.open(tmp_path / "out" / "images" / "c.png").size == (18, 50)
    copied, original = tmp_path / "out" / "images" / "a.jpg", folder_copy / "images" / "a.jpg"
    assert copied.read_bytes() == original.read_bytes()
    call(folder_copy, "export", "coco", masks, tmp_path / "out", *flags)
    with pytest.raises(UserError, match="out/images/a.jpg: of another export. Choose another --output_dir."):
        call(folder_copy, "export", "coco", masks, tmp_path / "out", *flags[:-1], 1)


def test_photographs_that_browsers_do_not_show_become_png(folder_copy, masks, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZES["a"], 3), np.uint8)
    Image.fromarray(pixels).save(folder_copy / "images" / "a.tif")
    (folder_copy / "images" / "a.jpg").unlink()
    call(folder_copy, "export", "coco", masks, tmp_path / "out", "--first", 1)
    (file,) = (tmp_path / "out" / "images").iterdir()
    assert file.name == "a.png" and np.array_equal(Image.open(file), pixels)


def test_cvat_is_given_indices_without_gaps(folder_root, masks, tmp_path):
    call(folder_root, "export", "cvat", masks, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "masks.zip") as file:
        lines = file.read("labelmap.txt").decode().splitlines()
        picture, objects = (
            Image.open(io.BytesIO(file.read(f"Segmentation{kind}/a.png"))) for kind in ("Class", "Object")
        )
        assert file.read("ImageSets/Segmentation/default.txt") == b"a\nb\nc\n"
    assert lines[1:] == ["background:0,0,0::", "cat:128,0,0::", "dog:0,128,0::", "ignored:224,224,192::"]
    assert picture.mode == "P" and np.unique(np.asarray(picture)).tolist() == [0, 1, 2, 3]
    assert np.array_equal(objects, picture)  # one object per class, none of the background
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert [(label["name"], label["color"]) for label in labels] == [
        ("cat", "#800000"),
        ("dog", "#008000"),
        ("ignored", "#e0e0c0"),
    ]


def test_datumaro_reads_what_cvat_is_given(folder_root, masks, tmp_path):
    datumaro = pytest.importorskip("datumaro")
    call(folder_root, "export", "cvat", masks, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "masks.zip") as file:
        file.extractall(tmp_path / "unpacked")
    dataset = datumaro.Dataset.import_from(str(tmp_path / "unpacked"), "voc_segmentation")
    assert_read(dataset, datumaro, masks)


def test_datumaro_reads_our_coco_json(folder_root, masks, tmp_path):
    datumaro = pytest.importorskip("datumaro")
    call(folder_root, "export", "coco", masks, tmp_path / "out")
    (tmp_path / "unpacked" / "annotations").mkdir(parents=True)
    shutil.copy(tmp_path / "out" / "instances.json", tmp_path / "unpacked" / "annotations" / "instances_default.json")
    shutil.copytree(tmp_path / "out" / "images", tmp_path / "unpacked" / "images" / "default")
    assert_read(datumaro.Dataset.import_from(str(tmp_path / "unpacked"), "coco_instances"), datumaro, masks)


def assert_read(dataset, datumaro, masks):
    """Datumaro found our masks, one object per class, and no object of the background."""
    labels = [label.name for label in dataset.categories()[datumaro.AnnotationType.label]]
    value_of = {"cat": 1, "dog": 2, "ignored": 255}
    for image_id in "abc":
        item = next(item for item in dataset if item.id == image_id)
        seen = np.zeros(SIZES[image_id], np.uint8)
        found = [one for one in item.annotations if one.type != datumaro.AnnotationType.bbox]  # COCO has boxes too
        for annotation in found:
            assert annotation.type == datumaro.AnnotationType.mask and labels[annotation.label] != "background"
            seen[np.asarray(annotation.image, dtype=bool)] = value_of[labels[annotation.label]]
        assert np.array_equal(seen, load_mask(masks / f"{image_id}.png"))
        assert len(found) == len(np.unique(seen[seen > 0]))


def test_what_datumaro_writes_for_cvat_comes_back(folder_root, masks, tmp_path, capsys):
    datumaro = pytest.importorskip("datumaro")
    call(folder_root, "export", "cvat", masks, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "masks.zip") as file:
        file.extractall(tmp_path / "unpacked")
    dataset = datumaro.Dataset.import_from(str(tmp_path / "unpacked"), "voc_segmentation")
    dataset.export(
        str(tmp_path / "again"), "voc_segmentation", save_media=False, apply_colormap=True, label_map="source"
    )
    archive = shutil.make_archive(tmp_path / "cvat", "zip", tmp_path / "again")
    call(folder_root, "import", "cvat", masks, tmp_path / "corrected", "--input", archive)
    assert "0 of 3" in capsys.readouterr().out


def test_label_studio_accepts_our_tasks(folder_root, masks, tmp_path):
    sdk = pytest.importorskip("label_studio_sdk.label_interface")
    call(folder_root, "export", "labelstudio", masks, tmp_path / "out")
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    interface = sdk.LabelInterface((tmp_path / "out" / "config.xml").read_text())
    assert [task["data"]["id"] for task in tasks] == ["a", "b", "c"]
    assert tasks[0]["data"]["image"] == "/data/local-files/?d=images/a.jpg"
    for task in tasks:
        (prediction,) = task["predictions"]
        assert interface.validate_prediction(prediction)
    prediction = tasks[0]["predictions"][0]
    prediction["result"][0]["value"]["brushlabels"] = ["no class"]
    assert not interface.validate_prediction(prediction)


def test_label_studio_is_given_a_stroke_of_each_class_and_the_names_of_all(folder_copy, masks, tmp_path):
    (folder_copy / "images" / "a.jpg").rename(folder_copy / "images" / "a #1.jpg")
    (masks / "a.png").rename(masks / "a #1.png")
    (folder_copy / "splits" / "train.txt").write_text("a #1\nb\n")
    call(folder_copy, "export", "labelstudio", masks, tmp_path / "out")
    first, second = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert first["data"] == {"image": "/data/local-files/?d=images/a%20%231.jpg", "id": "a #1"}
    strokes = first["predictions"][0]["result"]
    assert [stroke["value"]["brushlabels"] for stroke in strokes] == [["cat"], ["dog"], ["ignored"]]
    assert {(stroke["original_height"], stroke["original_width"]) for stroke in strokes} == {SIZES["a"]}
    assert second["predictions"][0]["result"] == []
    labels = ElementTree.parse(tmp_path / "out" / "config.xml").iter("Label")
    assert [(label.get("value"), label.get("background")) for label in labels] == [
        ("cat", "#800000"),
        ("dog", "#008000"),
        ("ignored", "#e0e0c0"),
    ]


def test_strokes_count_from_half_opacity_and_lie_on_earlier_ones(folder_root, masks, tmp_path, brush):
    call(folder_root, "export", "labelstudio", masks, tmp_path / "out")
    path = finish(tmp_path / "out" / "tasks.json")
    tasks = json.loads(path.read_text())
    strokes = tasks[2]["annotations"][0]["result"]
    strokes.append({**strokes[0]})
    for stroke, name, rows in zip(strokes, ("dog", "cat"), (slice(0, 4), slice(3, 5)), strict=True):
        pixels = np.zeros((*SIZES["c"], 4), np.uint8)
        pixels[rows, :, 3], pixels[6, :, 3], pixels[7, :, :3] = 128, 127, 255
        stroke["value"] = {"format": "rle", "rle": brush.encode_rle(pixels.ravel()), "brushlabels": [name]}
    path.write_text(json.dumps([tasks[2]]))
    call(folder_root, "import", "labelstudio", masks, tmp_path / "back", "--input", path)
    assert load_mask(tmp_path / "back" / "c.png")[:9, 3].tolist() == [2, 2, 2, 1, 1, 0, 0, 0, 0]


def test_without_the_sdk_the_remedy_is_named(folder_root, masks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "label_studio_sdk.converter.brush", None)
    with pytest.raises(UserError, match="pip install label-studio-sdk"):
        call(folder_root, "export", "labelstudio", masks, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))  # no photographs either


def test_what_nobody_has_looked_at_or_cancelled_is_left_out(folder_root, masks, tmp_path, capsys):
    call(folder_root, "export", "labelstudio", masks, tmp_path / "out")
    path = finish(tmp_path / "out" / "tasks.json")
    tasks = json.loads(path.read_text())
    tasks[0]["annotations"][0]["was_cancelled"] = True
    tasks[2]["annotations"].append({**tasks[2]["annotations"][0], "was_cancelled": True})
    path.write_text(json.dumps(tasks))
    call(folder_root, "import", "labelstudio", masks, tmp_path / "corrected", "--input", path)
    told = capsys.readouterr().out
    assert "0 of 1 masks differ" in told and "CORRECTED" not in told


def test_of_several_annotations_the_one_changed_last_counts(folder_root, masks, tmp_path):
    call(folder_root, "export", "labelstudio", masks, tmp_path / "out")
    path = finish(tmp_path / "out" / "tasks.json")
    tasks = json.loads(path.read_text())
    (new,) = tasks[2]["annotations"]
    old = json.loads(json.dumps(new))
    old["result"][0]["value"]["brushlabels"] = ["cat"]
    for one, day in ((old, 1), (new, 2)):
        one["updated_at"] = f"2026-01-0{day}T10:00:00.000000Z"
    for order in ([old, new], [new, old]):
        tasks[2]["annotations"] = order
        path.write_text(json.dumps(tasks))
        call(folder_root, "import", "labelstudio", masks, tmp_path / "back", "--input", path)
        assert list((tmp_path / "back").iterdir()) == []


def test_a_submission_without_strokes_is_told_and_changes_nothing(folder_root, masks, tmp_path, brush, capsys):
    """It may be a slip: a new annotation does not show the pre-annotations. The dot that is asked for does its work."""
    call(folder_root, "export", "labelstudio", masks, tmp_path / "out")
    path = finish(tmp_path / "out" / "tasks.json")
    tasks = json.loads(path.read_text())
    (stroke,) = tasks[2]["annotations"][0]["result"]
    tasks[0]["annotations"] = [{"result": []}, {"result": [], "was_cancelled": True}]
    tasks[1]["annotations"] = []
    dot = np.zeros(SIZES["c"], np.uint8)
    dot[5, 4] = 255
    stroke["value"] = {"format": "rle", "rle": brush.mask2rle(dot), "brushlabels": ["ignored"]}
    path.write_text(json.dumps(tasks))
    call(folder_root, "import", "labelstudio", masks, tmp_path / "corrected", "--input", path)
    told = capsys.readouterr().out
    assert f"{path}: tasks submitted without strokes, not imported: 1. If" in told and "1 of 1 masks differ; wr" in told
    assert [file.name for file in (tmp_path / "corrected").iterdir()] == ["c.png"]
    assert np.array_equal(load_mask(tmp_path / "corrected" / "c.png"), dot)
    tasks[0]["annotations"].pop(0)
    path.write_text(json.dumps(tasks))
    call(folder_root, "import", "labelstudio", masks, tmp_path / "corrected", "--input", path)
    assert "submitted" not in capsys.readouterr().out


def test_what_is_not_drawn_with_the_brush_is_named(folder_root, masks, tmp_path):
    """A choice about the whole photograph, which has no size, too."""
    call(folder_root, "export", "labelstudio", masks, tmp_path / "out")
    path = finish(tmp_path / "out" / "tasks.json")
    tasks = json.loads(path.read_text())
    choice = {"type": "choices", "from_name": "quality", "to_name": "image", "value": {"choices": ["good"]}}
    tasks[0]["annotations"][0]["result"].insert(0, choice)
    path.write_text(json.dumps(tasks))
    with pytest.raises(UserError, match="tasks.json: choices of 'image'. Use the brush only."):
        call(folder_root, "import", "labelstudio", masks, tmp_path / "back", "--input", path)


def test_what_other_tools_add_to_coco_json_does_no_harm(folder_root, masks, tmp_path):
    """A category of no object (Roboflow), two points (a box to pycocotools), folders of Windows, a mark of UTF-8."""
    call(folder_root, "export", "coco", masks, tmp_path / "out")
    path = tmp_path / "out" / "instances.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 0, "name": "animals"})
    content["annotations"].append({"id": 99, "image_id": 2, "category_id": 1, "segmentation": [[0.0, 0.0, 9.0, 9.0]]})
    for image in content["images"]:
        image["file_name"] = "C:\\birds\\" + image["file_name"]
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    call(folder_root, "import", "coco", masks, tmp_path / "back", "--input", path)
    assert list((tmp_path / "back").iterdir()) == []


@pytest.mark.parametrize(
    "shape",
    [[], None, {}, {"size": [31, 31], "counts": []}, [[]], [[[0, 0], [9, 0], [9, 9], [0, 9]]], [[[0, 0], [9, 9]] * 3]],
)
def test_boxes_without_an_outline_are_refused_before_they_erase_masks(folder_root, masks, tmp_path, shape):
    """As CVAT and Label Studio write rectangles; and points in pairs, which pycocotools reads as others."""
    call(folder_root, "export", "coco", masks, tmp_path / "out")
    path = tmp_path / "out" / "instances.json"
    damaged(path, annotations={"segmentation": shape, "bbox": [0, 0, 9, 9]})
    with pytest.raises(UserError) as caught:
        call(folder_root, "import", "coco", masks, tmp_path / "back", "--input", path)
    assert str(caught.value) == (
        f"{path}: an object of 'a.jpg' has no outline. Draw polygons or brush strokes, not boxes, and export again."
    )
    assert list((tmp_path / "back").iterdir()) == []


def test_a_brush_stroke_lies_on_a_larger_polygon(folder_root, masks, tmp_path):
    """CVAT writes brush strokes as run lengths of "crowds"."""
    path = drawn(tmp_path / "x.json", "b.png")
    content = json.loads(path.read_text())
    square = {"size": [31, 31], "counts": [33, 3, 31 * 31 - 36]}
    content["annotations"].append({"image_id": 0, "category_id": 2, "iscrowd": 1, "segmentation": square})
    content["categories"].append({"id": 2, "name": "dog"})
    path.write_text(json.dumps(content))
    call(folder_root, "import", "coco", masks, tmp_path / "back", "--input", path)
    assert load_mask(tmp_path / "back" / "b.png")[:6, 1].tolist() == [1, 1, 2, 2, 2, 1]


def test_run_lengths_cut_short_are_refused(folder_root, masks, tmp_path):
    call(folder_root, "export", "coco", masks, tmp_path / "out")
    path = tmp_path / "out" / "instances.json"
    code = json.loads(path.read_text())["annotations"][0]["segmentation"]
    damaged(path, annotations={"segmentation": {**code, "counts": code["counts"][: len(code["counts"]) // 2]}})
    with pytest.raises(UserError, match=r"run lengths.*\)\. Export it again"):
        call(folder_root, "import", "coco", masks, tmp_path / "back", "--input", path)


DAMAGED = "not a readable COCO json of objects"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c["images"][1].update(id=1),
            f"{DAMAGED} (an id occurs twice in 'images'). Export it again, by itself.",
        ),
        (
            lambda c: c["categories"].insert(0, {"id": 1, "name": "dog"}),
            f"{DAMAGED} (an id occurs twice in 'categories'). Export it again, by itself.",
        ),
        (
            lambda c: c["annotations"][0].update(image_id="1"),
            f"{DAMAGED} (an annotation of image_id 1, which is not in 'images'). Export it again, by itself.",
        ),
        (
            lambda c: c["images"].append({**c["images"][0], "id": 77, "file_name": "job 2/a.jpg"}),
            "'a' occurs twice. Import one export at a time.",
        ),
        (
            lambda c: c["images"].insert(0, {**c["images"][0], "id": 77}),
            "'a' occurs twice. Import one export at a time.",
        ),
    ],
)  # fmt: skip
def test_exports_put_together_are_refused(folder_root, masks, tmp_path, change, message):
    call(folder_root, "export", "coco", masks, tmp_path / "out")
    path = tmp_path / "out" / "instances.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        call(folder_root, "import", "coco", masks, tmp_path / "back", "--input", path)
    assert str(caught.value) == f"{path}: {message}"
    assert list((tmp_path / "back").iterdir()) == []


def test_an_id_may_be_a_number(folder_copy, masks, tmp_path):
    """As other programs write tasks."""
    (folder_copy / "images" / "a.jpg").rename(folder_copy / "images" / "7.jpg")
    (masks / "a.png").rename(masks / "7.png")
    (folder_copy / "splits" / "train.txt").write_text("7\n")
    call(folder_copy, "export", "labelstudio", masks, tmp_path / "out")
    path = finish(tmp_path / "out" / "tasks.json")
    (task,) = json.loads(path.read_text())
    task["data"]["id"] = 7
    path.write_text(json.dumps([task]), encoding="utf-8-sig")  # and saved again by an editor of Windows
    save_mask(masks / "7.png", np.zeros(SIZES["a"]), voc_palette())
    call(folder_copy, "import", "labelstudio", masks, tmp_path / "back", "--input", path)
    assert [file.name for file in (tmp_path / "back").iterdir()] == ["7.png"]


def test_a_task_that_occurs_twice_is_refused(folder_root, masks, tmp_path):
    call(folder_root, "export", "labelstudio", masks, tmp_path / "out")
    path = finish(tmp_path / "out" / "tasks.json")
    tasks = json.loads(path.read_text())
    path.write_text(json.dumps([*tasks, tasks[2]]))
    with pytest.raises(UserError, match="tasks.json: 'c' occurs twice"):
        call(folder_root, "import", "labelstudio", masks, tmp_path / "back", "--input", path)


def test_masks_that_become_empty_are_counted(folder_root, masks, tmp_path, capsys):
    """Of a and c; b is empty before, too."""
    call(folder_root, "export", "coco", masks, tmp_path / "out")
    path = tmp_path / "out" / "instances.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    call(folder_root, "import", "coco", masks, tmp_path / "back", "--input", path)
    assert f"2 of 3 masks differ, 2 of them show nothing now; written to {tmp_path}" in capsys.readouterr().out
    assert [load_mask(file).max() for file in sorted((tmp_path / "back").iterdir())] == [0, 0]
    path.write_text(json.dumps(content))
    call(folder_root, "import", "coco", masks, tmp_path / "back", "--input", path)
    assert "2 of 3 masks differ; written" in capsys.readouterr().out


def test_pycocotools_reads_our_coco_json(folder_root, masks, tmp_path):
    from pycocotools.coco import COCO

    call(folder_root, "export", "coco", masks, tmp_path / "out")
    coco = COCO(tmp_path / "out" / "instances.json")
    mask = load_mask(masks / "a.png")
    for annotation in coco.imgToAnns[1]:
        value = {1: 1, 2: 2, 3: 255}[annotation["category_id"]]
        assert np.array_equal(coco.annToMask(annotation), mask == value)
        rows, columns = np.nonzero(mask == value)
        assert annotation["area"] == len(rows)
        left, top = columns.min(), rows.min()
        assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
    assert sorted(coco.anns) == [1, 2, 3, 4]  # to pycocotools' evaluation, the object 0 would be none


@pytest.mark.parametrize("tool", ["cvat", "coco", "labelstudio"])
@pytest.mark.parametrize("content", [b"", b"[1]", b'{"images": []}', b"PK\x05\x06" + bytes(18)])
def test_files_that_are_no_export(folder_root, masks, tmp_path, tool, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match="file: "):
        call(folder_root, "import", tool, masks, tmp_path / "out", "--input", path)
    with pytest.raises(UserError, match="nowhere: no such"):
        call(folder_root, "import", tool, masks, tmp_path / "out", "--input", tmp_path / "nowhere")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("tool", FORMATS)
def test_exports_without_a_mask(folder_root, masks, tmp_path, tool):
    path = tmp_path / "file"
    if tool == "coco":
        drawn(path)
    elif tool == "cvat":
        cvat_zip(path, "background:0,0,0::\n")
    else:
        path.write_text('[{"annotations": []}]')
    with pytest.raises(UserError) as caught:
        call(folder_root, "import", tool, masks, tmp_path / "back", "--input", path)
    assert str(caught.value) == f"{path}: no finished mask in it. Finish one in the tool, and export again."


def damaged(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key][0].update(value)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"categories": {"name": "bird"}}, "label 'bird' is no class of the dataset. Known: background, cat, dog, ign"),
        ({"images": {"file_name": "x.jpg"}}, "no image 'x'"),
        ({"images": {"height": 9}}, "pixels, not"),
    ],
)  # fmt: skip
def test_exports_of_another_dataset_are_refused_before_anything_is_written(
    folder_root, masks, tmp_path, changes, message
):
    call(folder_root, "export", "coco", masks, tmp_path / "out")
    damaged(tmp_path / "out" / "instances.json", **changes)
    save_mask(masks / "b.png", np.ones(SIZES["b"]), voc_palette())
    with pytest.raises(UserError, match=message):
        call(folder_root, "import", "coco", masks, tmp_path / "back", "--input", tmp_path / "out" / "instances.json")
    assert list((tmp_path / "back").iterdir()) == []


def cvat_zip(path, label_map, **colours):
    """What CVAT exports: a picture of one colour for each image id."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("labelmap.txt", label_map)
        for image_id, colour in colours.items():
            buffer = io.BytesIO()
            Image.fromarray(np.full((*SIZES[image_id], 3), colour, np.uint8)).save(buffer, format="PNG")
            file.writestr(f"SegmentationClass/{image_id}.png", buffer.getvalue())
    return path


def test_a_colour_that_no_label_has_is_named(folder_root, masks, tmp_path):
    path = cvat_zip(tmp_path / "x.zip", "# label\nbackground:0,0,0::\ncat:1,2,3::\n", a=(9, 8, 7))
    with pytest.raises(UserError, match="a.png has the colour 9,8,7, which is not in labelmap.txt"):
        call(folder_root, "import", "cvat", masks, tmp_path / "out", "--input", path)


@pytest.mark.parametrize(
    "lines, two", [("cat:1,2,3::\ndog:1,2,3", "'cat' and 'dog'"), ("dog:0,0,0", "'background' and 'dog'")]
)
def test_two_labels_of_one_colour_are_refused(folder_root, masks, tmp_path, lines, two):
    path = cvat_zip(tmp_path / "x.zip", f"background:0,0,0::\n{lines}::\n", a=(1, 2, 3))
    with pytest.raises(UserError) as caught:
        call(folder_root, "import", "cvat", masks, tmp_path / "out", "--input", path)
    told = f"{path}: labelmap.txt gives {two} the colour {lines[-5:]}. "
    assert str(caught.value) == told + "Give one another colour in CVAT, and export the task again."


def test_a_label_map_may_have_the_mark_of_windows_a_label_twice_and_one_of_no_object(folder_root, masks, tmp_path):
    label_map = "\ufeff# label:color_rgb\r\nbackground:0,0,0::\r\ndog:1,2,3::\r\ndog:1,2,3::\r\ncat:4,5,6::\r\n"
    label_map += "unsure:7,8,9::\r\n"
    path = cvat_zip(tmp_path / "x.zip", label_map, b=(1, 2, 3), c=(4, 5, 6))
    call(folder_root, "import", "cvat", masks, tmp_path / "out", "--input", path)
    assert [np.unique(load_mask(tmp_path / "out" / f"{i}.png")).tolist() for i in "bc"] == [[2], [1]]
    cvat_zip(path, label_map, b=(7, 8, 9))
    with pytest.raises(UserError, match="label 'unsure' is no class of the dataset"):
        call(folder_root, "import", "cvat", masks, tmp_path / "out", "--input", path)


def test_what_cvat_lists_without_a_picture_shows_nothing_now(folder_root, masks, tmp_path, capsys):
    """So it exports a photograph whose last object was deleted; b was empty before, and d is not in the export."""
    path = cvat_zip(tmp_path / "x.zip", "background:0,0,0::\ndog:1,2,3::\n", c=(1, 2, 3))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("ImageSets/Segmentation/default.txt", "\ufeffc\r\na\r\nb\r\n")
    call(folder_root, "import", "cvat", masks, tmp_path / "out", "--input", path)
    assert "2 of 3 masks differ, 1 of them show nothing now" in capsys.readouterr().out
    assert [np.unique(load_mask(file)).tolist() for file in sorted((tmp_path / "out").iterdir())] == [[0], [2]]


def test_folders_a_tool_puts_before_an_id_are_overlooked(folder_root):
    source = build_source("folder", folder_root)
    assert exchange.find_id(source, "a", Path("x")) == exchange.find_id(source, "task 1/images/a", Path("x")) == "a"


@pytest.fixture
def nested(folder_copy, masks):
    """`a`, `sub/a`, `za` and `é`, all of them b with its empty mask."""
    for image_id in ("a", "sub/a", "za", "é"):
        (folder_copy / "images" / "sub").mkdir(exist_ok=True)
        shutil.copy(folder_copy / "images" / "b.png", folder_copy / "images" / f"{image_id}.png")
        save_mask(masks / f"{image_id}.png", np.zeros(SIZES["b"]), voc_palette())
    (folder_copy / "images" / "a.jpg").unlink()
    return folder_copy


def drawn(path, *files):
    """A COCO json of these photographs, each with a square in its corner."""
    images = [{"id": i, "file_name": file, "height": 31, "width": 31} for i, file in enumerate(files)]
    square = [[0, 0, 9, 0, 9, 9, 0, 9]]
    objects = [{"image_id": i, "category_id": 1, "segmentation": square} for i in range(len(files))]
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}))
    return path


def test_a_name_that_may_have_lost_its_folder_is_refused(nested, masks, tmp_path):
    """Unless both photographs come back, so the tool keeps folders."""
    path = drawn(tmp_path / "x.json", "job/a.png")
    with pytest.raises(UserError) as caught:
        call(nested, "import", "coco", masks, tmp_path / "back", "--input", path)
    assert str(caught.value) == f"{path}: 'a' may be 'sub/a' without its folder. Export both, or rename one of them."
    assert list((tmp_path / "back").iterdir()) == []
    drawn(path, "sub/a.png")
    call(nested, "import", "coco", masks, tmp_path / "back", "--input", path)
    drawn(path, "sub/a.png", "a.png")
    call(nested, "import", "coco", masks, tmp_path / "both", "--input", path)
    assert [len(list((tmp_path / folder).rglob("a.png"))) for folder in ("back", "both")] == [1, 2]


def test_names_of_a_mac_are_found(nested, masks, tmp_path):
    path = drawn(tmp_path / "x.json", "e\u0301.png")
    call(nested, "import", "coco", masks, tmp_path / "back", "--input", path)
    (file,) = (tmp_path / "back").iterdir()
    assert file.name == "é.png" and (load_mask(file) == 1).sum() == 81


def test_classes_that_the_formats_cannot_name(folder_copy, masks, tmp_path):
    with pytest.raises(UserError, match="class 'ignored'"):
        Labels(DatasetInfo(("background", "ignored")))
    (folder_copy / "classes.txt").write_text("background\ncat\ndog\na:b\n")
    with pytest.raises(UserError, match="class 'a:b': CVAT's label map cannot hold ':'"):
        call(folder_copy, "export", "cvat", masks, tmp_path / "out")


def test_flags_that_are_missing_or_name_other_images(folder_root, masks, tmp_path):
    with pytest.raises(UserError, match="--input: the file to import"):
        call(folder_root, "import", "coco", masks, tmp_path)
    remedy = ". Remove them from the list, or add their photographs."
    for image_id, told in (("z", remedy), ("a.jpg", ": write ids without suffix (a).")):
        (tmp_path / "review.csv").write_text(f"id,doubt\n{image_id},0.9\n")
        with pytest.raises(UserError) as caught:
            call(folder_root, "export", "coco", masks, tmp_path, "--review", tmp_path / "review.csv")
        fault = f"1 of 1 ids have no image in {folder_root}, the first is '{image_id}'"
        assert str(caught.value) == f"{tmp_path / 'review.csv'}: {fault}{told}"
    (tmp_path / "review.csv").write_text("id,doubt\na,0.9\nb,0.8\na,0.7\n")
    with pytest.raises(UserError, match=r"review\.csv: id 'a' is listed twice. Remove one."):
        call(folder_root, "export", "coco", masks, tmp_path, "--review", tmp_path / "review.csv")
