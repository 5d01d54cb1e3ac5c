"""Readers: what they find, and the one line a user gets for each mistake."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OBJECTS
from PIL import Image

from datasets import build_source
from datasets.base import DatasetInfo, DataSource, voc_palette
from datasets.dataset import ImageDataset
from tools.errors import UserError


@pytest.fixture(params=["folder", "voc12"])
def source(request: pytest.FixtureRequest, folder_root: Path, voc_root: Path) -> DataSource:
    return build_source(request.param, folder_root if request.param == "folder" else voc_root)


def multi_hot(source: DataSource, *names: str) -> np.ndarray:
    return np.array([name in names for name in source.info.classes[1:]], np.float32)


def test_both_layouts_give_the_same_data(source: DataSource):
    assert source.ids("train") == ["a", "b", "c"]
    assert source.ids("val") == ["b", "d"]
    assert {"train", "val"} <= set(source.domains())
    for image_id, shape, names in (("a", (24, 40), ["cat"]), ("b", (31, 31), ["cat", "dog"]), ("d", (20, 20), [])):
        image, mask, label = source.image(image_id), source.mask(image_id), source.image_label(image_id)
        assert image.shape == (*shape, 3) and image.dtype == np.uint8
        assert mask.shape == shape and mask.dtype == np.uint8
        np.testing.assert_array_equal(label, multi_hot(source, *names))
        present = {0, *(source.info.classes.index(name) for name in names), *([255] if names else [])}
        assert set(np.unique(mask)) == present


def test_labels_of_many_ids_are_the_labels_of_each(source: DataSource):
    ids = ["d", "b", "a"]
    np.testing.assert_array_equal(source.image_labels(ids), np.stack([source.image_label(i) for i in ids]))
    assert source.image_labels([]).shape == (0, source.info.num_foreground)


def test_source_can_be_sent_to_a_worker(source: DataSource):
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.image_label("b"), source.image_label("b"))
    assert again.info == source.info


def test_voc_is_found_at_and_above_its_root(voc_root: Path):
    for folder in (voc_root, voc_root / "VOCdevkit", voc_root / "VOCdevkit" / "VOC2012"):
        assert build_source("voc12", folder).ids("train") == ["a", "b", "c"]


def test_voc_lists_may_hold_paths(voc_root: Path):
    assert build_source("voc12", voc_root).ids("train_aug") == ["a", "b", "c", "d"]


def test_lines_of_a_list_that_hold_nothing_visible_are_passed_over(source: DataSource, tmp_path: Path):
    (tmp_path / "list.txt").write_text("a\n\u200b\nb\n\ufeff\n", encoding="utf-8")
    source.splits["train"] = tmp_path / "list.txt"
    assert source.ids("train") == ["a", "b"]


def test_folder_without_splits_is_one_domain(folder_copy: Path):
    for path in (folder_copy / "splits").iterdir():
        path.unlink()
    source = build_source("folder", folder_copy)
    assert source.domains() == ["train"]
    assert source.ids("train") == ["a", "b", "c", "d"]


def test_images_in_folders_have_the_folder_in_their_id(folder_copy: Path):
    images, masks = folder_copy / "images", folder_copy / "masks"
    for suffix, folder in ((".jpg", images), (".png", masks)):
        (folder / "2024 summer" / "x").mkdir(parents=True)
        (folder / f"a{suffix}").rename(folder / "2024 summer" / "x" / f"a{suffix}")
    for name in ("._b.png", ".cache/c.png", "notes.txt"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).touch()
    (folder_copy / "labels.csv").write_text("id,labels\n2024 summer/x/a,cat\nb,cat;dog\nc,dog\n")
    (folder_copy / "splits" / "train.txt").write_text("2024 summer/x/a\nb\nc\n")
    source = build_source("folder", folder_copy)
    assert source.ids("train") == ["2024 summer/x/a", "b", "c"]
    assert source.mask("2024 summer/x/a").shape == source.image("2024 summer/x/a").shape[:2] == (24, 40)
    np.testing.assert_array_equal(source.image_labels(source.ids("train")), [[1, 0], [1, 1], [0, 1]])


def sorted_by_class(root: Path, *files: str) -> Path:
    """Small images, sorted into folders."""
    for name in files:
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path)
    return root


def test_a_folder_per_class_is_the_label(tmp_path: Path):
    source = build_source("folder", sorted_by_class(tmp_path, "robin/1.jpg", "house sparrow/1.png", "background/2.jpg"))
    assert source.info.classes == ("background", "house sparrow", "robin")
    assert source.ids("train") == ["background/2", "house sparrow/1", "robin/1"]
    np.testing.assert_array_equal(source.image_labels(source.ids("train")), [[0, 0], [1, 0], [0, 1]])
    assert all(map(source.has_label, source.ids("train")))


def test_classes_txt_orders_the_folders_of_classes(tmp_path: Path):
    root = sorted_by_class(tmp_path, "robin/1.jpg", "robin/spring/2.jpg", "cow/1.jpg")
    (root / "classes.txt").write_text("background\nrobin\nhouse sparrow\n")
    source = build_source("folder", root)
    np.testing.assert_array_equal(source.image_labels(["robin/1", "robin/spring/2"]), [[1, 0], [1, 0]])
    with pytest.raises(UserError, match=r"images/cow: unknown class 'cow'\. Known: robin, house sparrow\. Rename it"):
        source.image_label("cow/1")


def test_labels_in_json_are_those_in_csv(folder_copy: Path):
    expected = build_source("folder", folder_copy).image_labels(list(OBJECTS))
    (folder_copy / "labels.csv").unlink()
    (folder_copy / "labels.json").write_text(json.dumps(OBJECTS))
    source = build_source("folder", folder_copy)
    np.testing.assert_array_equal(source.image_labels(list(OBJECTS)), expected)
    assert source.has_label("a") and not source.has_label("e")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": ["cat"], "a": ["dog"]}', r"labels\.json, id 'a': id 'a' is labelled already"),
        ('{"a": ["cow"]}', r"labels\.json, id 'a': unknown class 'cow'. Known: cat, dog"),
        ('{"a": "cat"}', r"labels\.json, id 'a': expected a list of class names"),
        ('{"a": {"cat": 1}}', r"labels\.json, id 'a': expected a list of class names"),
        ('["cat"]', r"labels\.json: expected \{"),
        ("3", r"labels\.json: expected \{"),
        ('{"a": ["cat"]', r"labels\.json: not a readable table"),
    ],
)
def test_mistakes_in_labels_json(folder_copy: Path, content: str, message: str):
    (folder_copy / "labels.csv").unlink()
    (folder_copy / "labels.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build_source("folder", folder_copy).image_label("a")
    assert "\n" not in str(caught.value)


def test_two_tables_of_labels_are_refused(folder_copy: Path):
    (folder_copy / "labels.json").write_text("{}")
    with pytest.raises(UserError, match=r"labels\.csv: there is a labels\.json too"):
        build_source("folder", folder_copy)


def test_class_names_with_blanks(folder_copy: Path):
    (folder_copy / "classes.txt").write_text("background\ntabby cat\ndog, wild\n")
    (folder_copy / "labels.csv").write_text('id,labels\na,tabby cat\nb,"tabby cat;dog, wild"\nc,"dog, wild"\n')
    source = build_source("folder", folder_copy)
    np.testing.assert_array_equal(source.image_labels(["a", "b", "c"]), [[1, 0], [1, 1], [0, 1]])


def test_masks_of_sbd_stand_in_where_voc_has_none(voc_copy: Path, tmp_path: Path):
    (voc_copy / "SegmentationClassAug").mkdir()
    for name, value in (("a", 3), ("d", 5)):
        size = {"a": (24, 40), "d": (20, 20)}[name]
        Image.fromarray(np.full(size, value, np.uint8)).save(voc_copy / "SegmentationClassAug" / f"{name}.png")
    (voc_copy / "SegmentationClass" / "d.png").unlink()
    source = build_source("voc12", voc_copy)
    assert (source.mask("d") == 5).all() and 8 in source.mask("a")
    other = build_source("voc12", voc_copy, voc_copy / "SegmentationClass")  # masks given by name are these only
    with pytest.raises(UserError, match=r"SegmentationClass/d\.png: no such mask"):
        other.mask("d")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_every_turn_of_every_format_stands_upright(folder_copy: Path, suffix: str, orientation: int):
    """The size found without decoding is that of the decoded image, and a corner ends where it belongs."""
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:12, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    (folder_copy / "images" / "a.jpg").unlink()
    Image.fromarray(stored).save(folder_copy / "images" / f"a.{suffix}", exif=exif)
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    shape = (24, 40) if orientation < 5 else (40, 24)
    Image.fromarray(np.zeros(shape, np.uint8)).save(folder_copy / "masks" / "a.png")
    source = build_source("folder", folder_copy)
    image = source.image("a")
    assert image.shape[:2] == source.mask("a").shape == shape
    assert image[corner[orientation]].mean() > 250
    assert sum(image[y, x].mean() > 250 for y in (0, -1) for x in (0, -1)) == 1


def test_test_images_need_neither_labels_nor_masks(folder_copy: Path):
    (folder_copy / "labels.csv").unlink()
    for path in (folder_copy / "masks").iterdir():
        path.unlink()
    (folder_copy / "masks").rmdir()
    source = build_source("folder", folder_copy)
    assert source.mask_path("a") is None
    item = ImageDataset(source, source.ids("val"), with_labels=False)[0]
    assert set(item) == {"id", "image"}


def test_coco_reads_both_image_folders(folder_copy: Path):
    (folder_copy / "images").rename(folder_copy / "train2014")
    (folder_copy / "val2014").mkdir()
    (folder_copy / "train2014" / "d.webp").rename(folder_copy / "val2014" / "d.webp")
    source = build_source("coco14", folder_copy)
    assert [source.image_path(i).parent.name for i in ("a", "d")] == ["train2014", "val2014"]


def test_masks_dir_replaces_the_masks(folder_root: Path, tmp_path: Path):
    Image.fromarray(np.full((24, 40), 2, np.uint8)).save(tmp_path / "a.png")
    source = build_source("folder", folder_root, tmp_path)
    assert (source.mask("a") == 2).all()
    with pytest.raises(UserError, match=r"b\.png: no such mask \(2 of 3 are missing\)"):
        source.check_masks(["a", "b", "c"])


def test_exif_turned_photograph_fits_its_upright_mask(folder_copy: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: stored 40x24, shown 24x40
    Image.new("RGB", (40, 24)).save(folder_copy / "images" / "a.jpg", exif=exif)
    Image.fromarray(np.zeros((40, 24), np.uint8)).save(folder_copy / "masks" / "a.png")
    source = build_source("folder", folder_copy)
    assert source.image("a").shape[:2] == source.mask("a").shape == (40, 24)


def test_palette_is_the_voc_colour_map():
    palette = voc_palette()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: tuple(palette[index].tolist()) for index in known} == known
    assert len({tuple(colour) for colour in palette.tolist()}) == 256


def test_info_counts_classes():
    info = DatasetInfo(("background", "cat", "dog"))
    assert (info.num_classes, info.num_foreground) == (3, 2)


def test_dataset_items(folder_root: Path):
    source = build_source("folder", folder_root)
    item = ImageDataset(source, ["b", "a"], with_masks=True)[1]
    assert item["id"] == "a"
    assert type(item["image"]) is type(item["mask"]) is torch.Tensor
    assert item["image"].dtype == torch.uint8 and item["mask"].dtype == torch.int64
    np.testing.assert_array_equal(item["image"].permute(1, 2, 0), source.image("a"))
    np.testing.assert_array_equal(item["mask"], source.mask("a"))
    np.testing.assert_array_equal(item["label"], [1, 0])


def append(name: str, text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        with (root / name).open("a") as file:
            file.write(text)

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content)


def save(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda root: Image.fromarray(array).save(root / name)


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


MISTAKES = {
    "class in labels.csv": (
        append("labels.csv", "\ne,cat;cow\n"),
        r"labels\.csv, line 7: unknown class 'cow'.*cat, dog",
    ),
    "id labelled twice": (append("labels.csv", "a,dog\n"), r"labels\.csv, line 6: id 'a'"),
    "fields in a row": (append("labels.csv", "e,cat,dog\n"), r"labels\.csv, line 6: .*3 fields"),
    "header": (write("labels.csv", b"a,cat\n"), r"labels\.csv, line 1: .*id,labels"),
    "labels not text": (write("labels.csv", b"id,labels\n\xff\xfe,cat\n"), r"labels\.csv: not UTF-8 text"),
    "no labels.csv": (remove("labels.csv"), r"labels\.csv: no such file"),
    "no label of an id": (write("labels.csv", b"id,labels\na,cat\n"), r"labels\.csv: no row for id 'b'"),
    "id listed twice": (append("splits/train.txt", "a\n"), r"train\.txt: id 'a' is listed twice"),
    "id without an image": (append("splits/train.txt", "e\nf\n"), r"2 of 5 ids have no image.*'e'\. Remove them from"),
    "empty split": (write("splits/train.txt", b"\n"), r"train\.txt: an empty list"),
    "no images": (lambda root: (root / "images").rename(root / "photos"), r"images: no readable folder"),
    "two images of an id": (save("images/a.png", np.zeros((9, 9, 3), np.uint8)), r"a\.(png|jpg): has the same id as"),
    "no classes.txt": (remove("classes.txt"), r"classes\.txt: no such file"),
    "one class": (write("classes.txt", b"background\n"), r"classes\.txt: 1 classes"),
    "class with a semicolon": (append("classes.txt", "a;b\n"), r"classes\.txt: class 'a;b' holds ';'"),
    "class listed twice": (append("classes.txt", "cat\n"), r"classes\.txt: class 'cat' is listed twice"),
    "no mask": (remove("masks/b.png"), r"b\.png: no such mask"),
    "mask of another size": (save("masks/b.png", np.zeros((30, 31), np.uint8)), r"b\.png: 31x30 pixels.*31x31"),
    "mask index": (save("masks/b.png", np.full((31, 31), 3, np.uint8)), r"b\.png: holds the value 3.*0\.\.2 or 255"),
    "colour mask": (save("masks/b.png", np.zeros((31, 31, 3), np.uint8)), r"b\.png: holds RGB colours"),
    "broken image": (write("images/b.png", b"\x89PNG no more"), r"b\.png: not a readable image"),
    "broken mask": (write("masks/b.png", b"\x89PNG no more"), r"b\.png: not a readable mask"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_a_folder_is_one_clear_line(mistake: str, folder_copy: Path):
    change, message = MISTAKES[mistake]
    change(folder_copy)
    with pytest.raises(UserError, match=message) as caught:
        source = build_source("folder", folder_copy)
        dataset = ImageDataset(source, source.ids("train"), with_masks=True)
        for index in range(len(dataset)):
            dataset[index]
    assert "\n" not in str(caught.value)


def test_unreadable_image_is_named_when_only_its_mask_is_asked_for(folder_copy: Path):
    write("images/b.png", b"no image")(folder_copy)
    with pytest.raises(UserError, match=r"images/b\.png: not a readable image"):
        build_source("folder", folder_copy).mask("b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("Annotations/b.xml"), r"b\.xml: no such annotation"),
        (write("Annotations/b.xml", b"<annotation>"), r"b\.xml: not a readable annotation"),
        (
            write("Annotations/b.xml", b"<a><object><name>cow boy</name></object></a>"),
            r"b\.xml: unknown class 'cow boy'",
        ),
    ],
)
def test_mistake_in_an_annotation(change: Callable[[Path], None], message: str, voc_copy: Path):
    change(voc_copy)
    source = build_source("voc12", voc_copy)
    with pytest.raises(UserError, match=message):
        ImageDataset(source, source.ids("train"))
    assert len(ImageDataset(source, ["a", "c"])) == 2  # only the ids asked for are read


def test_voc_without_lists(voc_copy: Path):
    for path in (voc_copy / "ImageSets" / "Segmentation").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no lists of ids"):
        build_source("voc12", voc_copy)


def test_unknown_domain_lists_those_there_are(source: DataSource):
    with pytest.raises(UserError, match=re.escape(f"no domain 'dev'. Choose one of: {', '.join(source.domains())}.")):
        source.ids("dev")


@pytest.mark.parametrize("dataset", ["voc12", "coco14", "folder"])
def test_missing_folder_says_what_was_looked_for(dataset: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"{tmp_path / 'nowhere'}: no .*(JPEGImages|train2014|images)/.*--data_dir"):
        build_source(dataset, tmp_path / "nowhere")


@pytest.mark.parametrize("dataset", ["coco14", "deepglobe"])
def test_official_files_that_are_not_converted(dataset: str, folder_copy: Path):
    (folder_copy / "classes.txt").unlink()
    with pytest.raises(UserError, match=f"{folder_copy}: not converted.*--dataset {dataset} --data_dir"):
        build_source(dataset, folder_copy)


def test_missing_masks_dir_and_unknown_dataset(folder_root: Path, tmp_path: Path):
    with pytest.raises(UserError, match="pseudo: no such folder of masks .*pass another"):
        build_source("folder", folder_root, tmp_path / "pseudo")
    with pytest.raises(UserError, match="unknown. Choose one of: voc12, coco14, folder, shapes"):
        build_source("imagenet", folder_root)


def test_no_masks_at_all(folder_copy: Path):
    (folder_copy / "masks").rename(folder_copy / "truth")
    source = build_source("folder", folder_copy)
    for ask in (lambda: source.mask("a"), lambda: source.check_masks([])):
        with pytest.raises(UserError, match="has no masks"):
            ask()
