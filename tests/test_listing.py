"""Files and names as people have them: what is found, what is passed over, what is refused in which line."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from command import data_flags, refusal
from PIL import Image

from datasets import build_source
from datasets.class_names import check_classes
from datasets.listing import FileIndex, clean_id, index_images, index_splits
from datasets.verify import verify
from tools.errors import UserError


def photographs(root: Path, *names: str) -> Path:
    """Tiny images in root/images, each of its own colour."""
    for number, name in enumerate(names):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (25 * number, 0, 99)).save(path, format="JPEG")
    return root


def dataset(root: Path, *names: str, labels: str | bytes = "", classes: str | bytes = "background\ncat\ndog\n") -> Path:
    """A folder with these photographs, this table and these classes."""
    photographs(root, *names)
    for name, text in (("labels.csv", labels), ("classes.txt", classes)):
        if text:
            (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def findings(root: Path, **options) -> dict[str, list[str]]:
    """What `verify` says, kinds without findings left out."""
    found = verify(build_source("folder", root), {}, workers=0, **options)[1]
    return {kind: texts for kind, texts in found.items() if texts}


def labels(root: Path) -> dict[str, list[str]]:
    """The class names of every photograph."""
    source = build_source("folder", root)
    classes = source.info.classes
    return {i: [classes[k + 1] for k in np.flatnonzero(source.image_label(i))] for i in source.images.files}


# Classes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog"], "must begin with 'background' .it begins with 'cat'."),
        (["apple", "background", "dog"], "must begin with 'background' .it begins with 'apple'."),
        (["__ignore__", "_background_", "cat"], "'__ignore__' is no class: ignored pixels are 255"),
        (["background", "cat", "_ignore_"], "'_ignore_' is no class"),
        (["# label:color_rgb:parts:actions", "background:0,0,0::", "cat:1,2,3::"], "begins with '# label"),
        (["0 background", "1 cat"], "begins with '0 background'"),
        (["background,cat,dog"], "begins with 'background,cat,dog'"),
        (["background", "_Background_", "cat"], "class '_Background_' is too much like 'background'"),
        (["background", "cat", "Cat"], "class 'Cat' is too much like 'cat'"),
        (["background", "wild dog", "wild \N{NO-BREAK SPACE}dog"], "class 'wild dog' is listed twice"),
        (["background", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"], "listed twice"),
        (["background", "cat", "cat\N{ZERO WIDTH SPACE}"], "class 'cat' is listed twice"),
        (["background", "# animals", "cat"], "class '# animals' looks like a comment"),
        (["background", "a;b"], "holds ';'"),
        (["background"], "1 classes"),
        ([], "0 classes"),
        (["background", *map(str, range(255))], "256 classes"),
    ],
)
def test_names_that_cannot_be_the_classes(names, message):
    with pytest.raises(UserError, match=f"^classes.txt: .*{message}"):
        check_classes(Path("classes.txt"), names)


@pytest.mark.parametrize("first", ["background", "Background", "_background_", "__background__", "BACKGROUND"])
def test_background_has_many_spellings_and_one_name(first):
    assert check_classes(Path("x"), [first, "wild  dog", "_cat"]) == ("background", "wild dog", "_cat")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_classes_and_lists_as_windows_writes_them(tmp_path, encoding):
    root = dataset(
        tmp_path, "a.jpg", labels="id,labels\na,caf\u00e9\n", classes="background\r\ncafé \r\n".encode(encoding)
    )
    (root / "splits").mkdir()
    (root / "splits" / "train.txt").write_bytes("a\r\n\r\n".encode(encoding))
    source = build_source("folder", root)
    assert source.info.classes == ("background", "caf\u00e9") and source.ids("train") == ["a"]


@pytest.mark.parametrize("content", ["background\ncafé\n".encode("latin-1"), "background\ncat\n".encode("utf-16-le")])
def test_text_in_no_known_encoding_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"classes\.txt: not UTF-8 text\. Save it as UTF-8\."):
        build_source("folder", dataset(tmp_path, "a.jpg", labels="id,labels\n", classes=content))


def test_the_first_line_is_asked_for_before_anything_is_trained(tmp_path, capsys):
    root = dataset(tmp_path, "cat/a.jpg", "dog/b.jpg", classes="cat\ndog\n")
    for script, *flags in (("datasets.verify",), ("train_classifier", "--tag", "a"), ("inference", "--tag", "a")):
        assert "classes.txt: must begin with 'background'" in refusal(capsys, script, *data_flags(root), *flags)


# Folders of classes and of splits


def test_a_folder_called_background_is_no_class(tmp_path):
    root = photographs(tmp_path, "Background/a.jpg", "cat/b.jpg", "dog/c.jpg")
    assert build_source("folder", root).info.classes == ("background", "cat", "dog")
    assert labels(root) == {"Background/a": [], "cat/b": ["cat"], "dog/c": ["dog"]}
    (root / "classes.txt").write_text("_background_\ndog\ncat\n")
    assert labels(root) == {"Background/a": [], "cat/b": ["cat"], "dog/c": ["dog"]}


def test_a_class_has_single_blanks_though_its_folder_has_two(tmp_path):
    root = photographs(tmp_path, "house  sparrow/a.jpg", "robin/b.jpg")
    assert labels(root) == {"house  sparrow/a": ["house sparrow"], "robin/b": ["robin"]}


@pytest.mark.parametrize(
    "names",
    [("train", "val"), ("Train", "valid", "test"), ("training", "validation", "testing"), ("train", "training")],
)
def test_folders_of_splits_are_the_splits(tmp_path, names):
    """torchvision's ImageFolder: images/train/CLASS, images/val/CLASS."""
    root = photographs(
        tmp_path, *(f"{name}/{kind}/{kind}.jpg" for name in names for kind in ("cat", "dog", "background"))
    )
    source = build_source("folder", root)
    assert source.info.classes == ("background", "cat", "dog") and source.domains() == sorted(names)
    for name in names:
        assert source.ids(name) == [f"{name}/{kind}/{kind}" for kind in ("background", "cat", "dog")]
    assert labels(root)[f"{names[0]}/cat/cat"] == ["cat"] and labels(root)[f"{names[1]}/background/background"] == []
    assert findings(root).keys() <= {"copies"}


def test_folders_of_splits_with_a_table_are_the_splits_too(tmp_path):
    root = dataset(tmp_path, "train/a.jpg", "val/b.jpg", labels="id,labels\ntrain/a,cat\nval/b,dog\n")
    source = build_source("folder", root)
    assert source.ids("train") == ["train/a"] and source.ids("val") == ["val/b"]
    (root / "splits").mkdir()
    (root / "splits" / "all.txt").write_text("train/a\nval/b\n")  # lists come first
    assert build_source("folder", root).domains() == ["all"]


def test_folders_of_splits_may_hold_photographs_without_labels(tmp_path):
    source = build_source("folder", dataset(tmp_path, "train/a.jpg", "val/b.jpg"))
    assert source.domains() == ["train", "val"] and not source.has_label("train/a")


def test_one_folder_of_a_split_with_a_table_is_that_split(tmp_path):
    root = dataset(tmp_path, "val/a.jpg", labels="id,labels\nval/a,cat\n")
    assert build_source("folder", root).domains() == ["val"]


@pytest.mark.parametrize(
    "names",
    [
        ("images", "masks"),
        ("JPEGImages", "SegmentationClass"),
        ("train", "train_masks"),
        ("annotations", "img"),
        ("groundtruth", "imgs"),
        ("gt", "photos"),
        ("image", "labels"),
    ],
)
def test_folders_of_photographs_and_masks_are_no_classes(tmp_path, names):
    root = photographs(tmp_path, *(f"{name}/a.jpg" for name in names))
    with pytest.raises(
        UserError, match=f"images: holds folders called {names[0]} and {names[1]}, which are no classes"
    ):
        build_source("folder", root)
    assert labels(photographs(tmp_path / "faces", "mask/a.jpg", "no_mask/b.jpg"))["mask/a"] == ["mask"]


@pytest.mark.parametrize("name", ["Masks", "mask", "labels", "SegmentationClass"])
def test_masks_in_another_folder_are_not_passed_over(folder_copy, name):
    (folder_copy / "masks").rename(folder_copy / name)
    with pytest.raises(UserError, match=rf"{name}: not read\. Rename it: masks are read from masks/"):
        build_source("folder", folder_copy)
    assert build_source("folder", folder_copy, folder_copy / name).has_mask("a")
    for path in (folder_copy / name).iterdir():
        path.rename(path.with_suffix(".txt"))  # boxes of YOLO, or the like
    assert not build_source("folder", folder_copy).has_mask("a")
    deep = folder_copy / name / "cat" / "2024"
    deep.mkdir(parents=True)
    (deep / "._a.png").touch()
    assert not build_source("folder", folder_copy).has_mask("a")
    (deep / "a.PNG").touch()
    with pytest.raises(UserError, match=rf"{name}: not read\. Rename it: masks are read from masks/"):
        build_source("folder", folder_copy)


def test_a_class_may_be_called_train(tmp_path):
    root = photographs(tmp_path, "train/a.jpg", "boat/b.jpg")
    assert labels(root) == {"train/a": ["train"], "boat/b": ["boat"]}
    assert labels(photographs(tmp_path / "one", "train/a.jpg")) == {"train/a": ["train"]}


@pytest.mark.parametrize("names", [("train/cat/a.jpg", "val/cat/b.jpg", "cat/c.jpg"), ("train/a.jpg", "test/b.jpg")])
def test_folders_half_of_splits_are_refused(tmp_path, names):
    with pytest.raises(
        UserError, match=r"images: holds folders called \w+ and \w+, which are no classes|classes\.txt: no such file"
    ):
        build_source("folder", photographs(tmp_path, *names))


def test_a_folder_around_the_classes_is_no_class(tmp_path):
    root = photographs(tmp_path, "animals/cat/a.jpg", "animals/dog/b.jpg")
    message = "images: its folder animals holds others, such as cat, and the outer folders would be the classes"
    for beside in ((), ("animals/stray.jpg",)):
        with pytest.raises(UserError, match=message):
            build_source("folder", photographs(root, *beside))
    assert labels(photographs(tmp_path / "one", "cat/a.jpg", "cat/2024/b.jpg")) == {
        "cat/a": ["cat"],
        "cat/2024/b": ["cat"],
    }


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (("test_set", "training_set"), ("cats", "dogs")),
        (("dev", "train"), ("cat", "dog")),
        (("train2017", "val2017"), ("background", "cat")),
        (("color", "grayscale", "segmented"), ("apple", "grape", "peach")),
    ],
)
def test_folders_of_parts_around_the_classes_are_no_classes(tmp_path, capsys, outer, inner):
    root = photographs(tmp_path, *(f"{part}/{kind}/{kind}.jpg" for part in outer for kind in inner))
    photographs(root, f"{outer[-1]}/other/a.jpg", f"{outer[-1]}/{inner[0]}/deep/er.jpg")
    line = refusal(capsys, "datasets.verify", *data_flags(root), "--output_dir", tmp_path / "report")
    assert f"images: its folder {outer[0]} holds others, such as {inner[0]}, and the outer folders would be" in line
    assert "call the outer ones train, val and test, if they are splits; or write a classes.txt." in line
    (root / "classes.txt").write_text("\n".join(["background", *outer]))
    assert labels(root)[f"{outer[0]}/{inner[0]}/{inner[0]}"] == [outer[0]]  # said to be the classes


def test_a_folder_called_train_with_folders_only_is_no_class(tmp_path):
    root = photographs(tmp_path, "Train/cat/a.jpg", "Train/dog/b.jpg", "unlabelled/c.jpg")
    with pytest.raises(UserError, match=r"images: its folder Train holds others, such as cat, and the outer"):
        build_source("folder", root)
    assert labels(photographs(tmp_path / "cars", "Train/a.jpg", "Train/2024/b.jpg", "boat/2024/c.jpg")) == {
        "Train/a": ["Train"],
        "Train/2024/b": ["Train"],
        "boat/2024/c": ["boat"],
    }


@pytest.mark.parametrize(
    "names",
    [
        ("robin/2021/a.jpg", "jay/2021/b.jpg"),
        ("robin/2021/a.jpg", "robin/2022/b.jpg", "jay/2022/c.jpg", "jay/2023/d.jpg"),
        ("robin/2021/a.jpg", "robin/2022/b.jpg", "jay/2021/c.jpg", "jay/2022/d.jpg", "jay/e.jpg"),
        ("train/robin/2021/a.jpg", "train/jay/2021/b.jpg", "val/robin/2021/c.jpg", "val/jay/2022/d.jpg"),
    ],
)
def test_classes_may_hold_folders_of_sessions(tmp_path, names):
    root = photographs(tmp_path, *names)
    assert build_source("folder", root).info.classes == ("background", "jay", "robin")


# What is found, and what is passed over


def test_a_link_that_leads_back_is_not_followed(tmp_path):
    photos = photographs(tmp_path, "cat/0.jpg", "cat/1.jpg", "dog/2.jpg") / "images"
    (photos / "photos").symlink_to(photos)
    (photos / "cat" / "up").symlink_to(tmp_path)
    (photos / "dog" / "again").symlink_to("../dog", target_is_directory=True)
    (photos / "dog" / "cats").symlink_to("../cat", target_is_directory=True)  # they are found as cats
    (photos / "self").symlink_to("self")
    root = tmp_path / "data"
    root.mkdir()
    (root / "images").symlink_to(photos)
    source = build_source("folder", root)
    assert sorted(source.images.files) == ["cat/0", "cat/1", "dog/2"] and source.info.classes[1:] == ("cat", "dog")


def test_a_link_to_elsewhere_is_followed(tmp_path):
    photographs(tmp_path / "elsewhere", "0.jpg", "1/2.jpg")
    photographs(tmp_path, "dog/3.jpg")
    (tmp_path / "images" / "cat").symlink_to(tmp_path / "elsewhere" / "images")
    assert labels(tmp_path) == {"cat/0": ["cat"], "cat/1/2": ["cat"], "dog/3": ["dog"]}


def test_a_link_that_leads_back_from_elsewhere_is_not_followed(tmp_path):
    elsewhere = photographs(tmp_path / "elsewhere", "0.jpg", "1/2.jpg") / "images"
    (elsewhere / "1" / "up").symlink_to(elsewhere)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat").symlink_to(elsewhere)
    assert sorted(index_images([tmp_path / "images"]).files) == ["cat/0", "cat/1/2"]


def test_links_in_a_ring_are_followed_once(tmp_path):
    first, second = (photographs(tmp_path / name, f"{name}.jpg") / "images" for name in ("first", "second"))
    (first / "on").symlink_to(second)
    (second / "back").symlink_to(first)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat").symlink_to(first)
    assert sorted(index_images([tmp_path / "images"]).files) == ["cat/first", "cat/on/second"]


def test_blanks_around_names_are_no_part_of_the_id(tmp_path):
    root = dataset(tmp_path, "a .jpg", "2024 /b.jpg", labels="id,labels\na ,cat\n2024 /b,dog\n")
    assert sorted(build_source("folder", root).images.files) == ["2024/b", "a"]
    assert labels(root) == {"a": ["cat"], "2024/b": ["dog"]}
    with pytest.raises(UserError, match="has the same id as"):
        build_source("folder", photographs(root, "a.jpg"))


def test_files_of_systems_are_passed_over(folder_copy):
    for name in ("images/.DS_Store", "images/Thumbs.db", "images/desktop.ini", "images/._a.jpg", "masks/._a.png",
                 "splits/._train.txt", "splits/.DS_Store", "splits/Thumbs.db", "images/__MACOSX/x.jpg",
                 "images/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "images/$RECYCLE.BIN/gone.jpg",
                 "images/lost+found/1.jpg", "images/ehthumbs.db"):  # fmt: skip
        (folder_copy / name).parent.mkdir(parents=True, exist_ok=True)
        (folder_copy / name).write_bytes(b"\x00\x05\x16\x07\xff")
    source = build_source("folder", folder_copy)
    assert source.domains() == ["train", "val"] and sorted(source.images.files) == ["a", "b", "c", "d"]
    assert findings(folder_copy).keys() == {"overlap"}


def test_files_of_systems_are_passed_over_in_the_devkit(voc_copy):
    lists = voc_copy / "ImageSets" / "Segmentation"
    for path in (
        lists / "._train.txt",
        voc_copy / "Annotations" / "._a.xml",
        voc_copy / "SegmentationClass" / "._a.png",
    ):
        path.write_bytes(b"\x00\x05\x16\x07\xff")
    source = build_source("voc12", voc_copy)
    assert source.domains() == ["train", "train_aug", "val"] and list(source.labelled_ids()) == ["a", "b", "c", "d"]
    assert list(source.stray_masks()) == []


def test_photographs_of_every_suffix(tmp_path):
    names = ["a.jpg", "b.JPEG", "c.jfif", "d.jpe", "e.png", "f.WebP", "g.bmp", "h.tif", "i.TIFF"]
    for name in names:
        Image.new("RGB", (3, 2)).save(tmp_path / "x.bin", format="BMP")
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "x.bin").rename(tmp_path / "images" / name)
    (tmp_path / "images" / "k.heic").touch()
    (tmp_path / "images" / "l").touch()
    index = index_images([tmp_path / "images"])
    assert list(index.files) == list("abcdefghi") and [path.name for path in index.others] == ["k.heic", "l"]


def test_a_folder_of_unread_kinds_says_what_it_holds(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(UserError, match=r"no images \(\.jpg, .*\) in it, but 1 other files such as a\.heic"):
        index_images([tmp_path])


def test_photographs_that_differ_by_suffix_only_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.png: has the same id as .*a\.jfif\. Rename one"):
        index_images([photographs(tmp_path, "a.jfif", "a.png") / "images"])


def test_characters_that_nobody_sees_are_no_part_of_the_id():
    """Marks of order, direction and hyphenation, which texts bring along."""
    assert clean_id("\ufeffa\u200b/b\u200e\u200f \u2060c\u00ad") == "a/b c"


def test_unicode_forms_are_one_name(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café/né") for form in ("NFC", "NFD"))
    root = dataset(tmp_path, f"{decomposed}.jpg", labels=f"id,labels\n{composed},cat\n")
    (root / "masks" / decomposed).parent.mkdir(parents=True)
    (root / "masks" / decomposed).parent.joinpath(f"{Path(composed).name}.png").touch()
    Image.new("L", (8, 6)).save(root / "masks" / f"{decomposed.rpartition('/')[0]}" / f"{Path(composed).name}.png")
    (root / "splits").mkdir()
    (root / "splits" / "train.txt").write_text(decomposed)
    assert labels(root) == {composed: ["cat"]}
    source = build_source("folder", root)
    assert source.ids("train") == [composed] and source.mask(composed).shape == (6, 8)


def test_two_unicode_forms_of_a_name_are_refused(tmp_path):
    names = [f"{unicodedata.normalize(form, 'é')}.jpg" for form in ("NFC", "NFD")]
    with pytest.raises(UserError, match="has the same id as"):
        index_images([photographs(tmp_path, *names) / "images"])


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path, capsys):
    folder = os.fsencode(tmp_path) + b"/images/caf\xe9"
    os.makedirs(folder)
    Image.new("RGB", (3, 2)).save(tmp_path / "a.jpg")
    os.rename(os.fsencode(tmp_path / "a.jpg"), folder + b"/a.jpg")
    line = refusal(capsys, "datasets.verify", *data_flags(tmp_path))
    assert r"images/caf\udce9/a.jpg: the name is not UTF-8" in line.encode(errors="backslashreplace").decode()


# Lists of ids


def test_lists_in_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"train: not a list of ids\. Save one as train\.txt"):
        index_splits(tmp_path)
    (tmp_path / "dev.csv").touch()
    with pytest.raises(UserError, match=r"dev\.csv: not a list of ids\. Save one as dev\.txt"):
        index_splits(tmp_path)
    (tmp_path / "Val.TXT").touch()
    assert list(index_splits(tmp_path)) == ["Val"]
    assert index_splits(tmp_path / "nowhere") == {}


def test_lists_beside_the_folder_of_lists_are_refused(tmp_path):
    root = dataset(tmp_path, "a.jpg", labels="id,labels\na,cat\n")
    (root / "val.txt").write_text("a")
    with pytest.raises(
        UserError, match=r"val\.txt: not read\. Lists of ids are read from splits/: move the lists there"
    ):
        build_source("folder", root)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("Splits/train.txt", "Splits"),
        ("split/val.TXT", "split"),
        ("lists/mine/test.txt", "lists"),
        ("ImageSets/Segmentation/val.txt", "ImageSets"),
        ("val.csv", "val.csv"),
        ("Test.CSV", "Test.CSV"),
    ],
)
def test_lists_in_another_place_are_not_passed_over(tmp_path, name, place):
    """Without them, the only domain would be all photographs, those of val too."""
    root = dataset(tmp_path, "a.jpg", "b.jpg", labels="id,labels\na,cat\nb,dog\n")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("a\n")
    with pytest.raises(
        UserError, match=rf"{place}: not read\. Lists of ids are read from splits/: move the lists there, as \.txt"
    ):
        build_source("folder", root)
    (root / "splits").mkdir()
    (root / "splits" / "train.txt").write_text("b\n")
    source = build_source("folder", root)
    assert source.domains() == ["train"] and source.ids("train") == ["b"]


def test_other_files_beside_the_photographs_are_no_lists(tmp_path):
    root = dataset(tmp_path, "a.jpg", labels="id,labels\na,cat\n")
    (root / "lists").mkdir()
    for name in ("lists/todo.odt", "lists/._a.txt", "README.txt", "prices.csv", "train", "train.pdf"):
        (root / name).touch()
    assert build_source("folder", root).domains() == ["train"]


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("0001.jpg", ": write ids without suffix (0001)"),
        ("0001.JPG", ": write ids without suffix (0001)"),
        ("1", ": write leading zeros (have a spreadsheet take the column for text) (0001)"),
        ("images/0001.jpg", ": write ids without the folders above (0001)"),
        ("/data/birds/images/0001.jpg", ": write ids without the folders above (0001)"),
        ("C:\\birds\\images\\0001.jpg", ": write ids without the folders above (0001)"),
        ("2024\\Robin", ": write '/' between folders (2024/Robin)"),
        ("Robin", ": write ids with their folder (2024/Robin)"),
        ("2024/robin", ": write small and capital letters as in the file's name (2024/Robin)"),
        ("ROBIN.PNG", ": write ids as the files are called (2024/Robin)"),
        ("wren", ""),
        ("0003", ""),
        ('="0001"', ": write ids as the files are called (0001)"),
        ("'0001", ": write ids as the files are called (0001)"),
        ("1.0", ": write leading zeros (have a spreadsheet take the column for text) (0001)"),
        ("twin", ""),  # a/twin or b/twin
        ("", ""),
    ],
)
def test_advice_on_an_id_that_is_none(text, advice):
    ids = ("0000", "0001", "2024/Robin", "a/twin", "b/twin")
    assert FileIndex({image_id: Path(image_id) for image_id in ids}, []).advice(text) == advice


def test_ids_in_lists_and_tables_that_fit_no_photograph(tmp_path):
    root = dataset(tmp_path, "0000.jpg", "0001.jpg", "0002.jpg", labels="id,labels\n0000.jpg,cat\n0001,dog\n2,cat\n")
    (root / "splits").mkdir()
    (root / "splits" / "train.txt").write_text("0000.jpg\nnobody\n0001")
    source = build_source("folder", root)
    line = r"train\.txt: 2 of 3 ids have no image in .*, the first is '0000\.jpg': write ids without suffix \(0000\)\."
    with pytest.raises(UserError, match=line):
        source.ids("train")
    found = findings(root)
    assert found["missing"] == ["0000.jpg: no photograph: write ids without suffix (0000)", "nobody: no photograph"]
    assert found["rows"] == [
        "row '0000.jpg' belongs to no photograph: write ids without suffix (0000)",
        "row '2' belongs to no photograph: write leading zeros (have a spreadsheet take the column for text) (0002)",
    ]
    assert found["unlisted"] == [f"{root / 'images' / name}: in no list" for name in ("0000.jpg", "0002.jpg")]


# Tables of labels

TABLES = {
    "Excel, empty rows": "id,labels\r\na,cat\r\nb,cat;dog\r\nc,\r\n,\r\n,,,\r\n\r\n",
    "European Excel": 'id;labels\r\na;cat\r\nb;"cat;dog"\r\nc;\r\n;\r\n',
    "semicolons by hand": "id;labels\na;cat\nb;cat;dog\nc\n",
    "a column per class": "id;labels;;\na;cat;;\nb;cat;dog;\nc;;;\n",
    "tabs": "id\tlabels\na\tcat\nb\tcat; dog\nc\t\n",
    "quotes and blanks": 'ID , Labels\n "a" , cat \n"b","cat ; dog"\nc,\n'.replace(' "a" ', '"a"'),
    "empty columns": "id,labels,,\na,cat,,\nb,cat;dog,,\nc,,,\n",
    "line ends of old Macs": "id,labels\ra,cat\rb,cat;dog\rc,\r",
    "background is no class": "id,labels\na,background;cat\nb,cat;dog;Background\nc,_background_\n",
    "invisible marks": "id,labels\n\ufeffa,cat\u200b\n\u200eb,\ufeffcat;dog\nc,\u200b\n",
    "Excel's first line": "sep=;\r\nid;labels\r\na;cat\r\nb;cat;dog\r\nc;\r\n",
    "its first line for tabs": '"sep=\t"\nid\tlabels\na\tcat\nb\tcat;dog\nc\t\n',
    "empty lines first": "\r\n ,,\r\nid,labels,\r\na,cat,\r\nb,cat;dog,\r\nc,,\r\n",
    "a cell of two lines": 'id,labels\na,cat\nb,"cat;\ndog"\nc,\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("table", TABLES)
def test_tables_as_spreadsheets_write_them(tmp_path, table, encoding):
    root = dataset(tmp_path, "a.jpg", "b.jpg", "c.jpg", labels=TABLES[table].encode(encoding))
    assert labels(root) == {"a": ["cat"], "b": ["cat", "dog"], "c": []}
    assert findings(root) == {}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,labels\na,cat,dog\n", r"line 2: expected 'id,class;class', got 3 fields"),
        ("id\tlabels\na\tcat\tdog\n", r"line 2: expected 'id,class;class', got 3 fields"),
        ("id,labels\n\n,cat\n", r"line 3: no id before 'cat'"),
        ("id,labels\na,cat|dog\n", r"line 2: unknown class 'cat\|dog'"),
        ("id,labels\na,1\n", r"line 2: unknown class '1'"),
        ("id,labels\na,Cat\n", r"line 2: unknown class 'Cat'. Known: cat, dog"),
        ('id,labels\na,"cat\ndog"\n', r"line 3: unknown class 'cat dog'"),
        ('id,labels\na,"cat\nb,dog\n', r"not a readable table"),
        ("a,cat\nb,dog\n", r"line 1: the header must be 'id,labels'"),
        ("filename,cat,dog\na,1,0\n", r"line 1: the header must be 'id,labels'"),
        ("id,labels,width\na,cat,3\n", r"line 1: the header must be 'id,labels'"),
        ("\n", r"line 1: the header must be 'id,labels'"),
        ("\n\na,cat\n", r"line 3: the header must be 'id,labels'"),
        ("sep=;\n", r"line 1: the header must be 'id,labels'"),
        ("sep=;\n\nid;labels\na;cow\n", r"line 4: unknown class 'cow'"),
        ("sep=ab\nid,labels\n", r"line 1: the header must be 'id,labels'"),
        ("id,labels\na,cat\ncafé,dog\ncafe\u0301,dog\n", r"line 4: id 'café' is labelled already"),
    ],
)
def test_tables_that_are_refused(tmp_path, table, message):
    root = dataset(tmp_path, "a.jpg", labels=table)
    with pytest.raises(UserError, match=rf"labels\.csv(, |: ){message}") as caught:
        findings(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_a_table_in_no_known_encoding_is_refused(tmp_path, encoding):
    root = dataset(tmp_path, "a.jpg", labels="id,labels\ncafé,cat\n".encode(encoding))
    with pytest.raises(UserError, match=r"labels\.csv: not UTF-8 text\. Save it as UTF-8"):
        findings(root)


@pytest.mark.parametrize("name", ["labels.tsv", "labels.xlsx", "Labels.csv", "labels.CSV"])
def test_a_table_under_another_name_is_not_passed_over(tmp_path, name):
    """Without it, the folders would be taken for classes."""
    root = photographs(tmp_path, "2023/a.jpg", "2024/b.jpg")
    (root / name).touch()
    with pytest.raises(UserError, match=rf"{name}: not read\. Save it as labels\.csv"):
        build_source("folder", root)


@pytest.mark.parametrize("name", ["Classes.txt", "classes.csv", "CLASSES.TXT", "classes.xlsx", "labels.txt"])
def test_classes_under_another_name_are_not_passed_over(tmp_path, name):
    """Without them, the classes would be in alphabetical order, and masks are numbers."""
    root = photographs(tmp_path, "dog/a.jpg", "cat/b.jpg")
    (root / name).write_text("background\ndog\ncat\n")
    message = rf"{name}: not read\. Save it as classes\.txt, 'background' first \(or remove it, if it is something"
    with pytest.raises(UserError, match=message):
        build_source("folder", root)
    (root / "classes.txt").write_text("background\ndog\ncat\n")
    assert build_source("folder", root).info.classes == ("background", "dog", "cat")


def test_other_files_beside_folders_of_classes_are_no_classes(tmp_path):
    root = photographs(tmp_path, "dog/a.jpg", "cat/b.jpg")
    for name in ("classes.png", "labels.md", "notes.txt", "._classes.txt"):
        (root / name).touch()
    (root / "labels.txt").mkdir()
    assert build_source("folder", root).info.classes == ("background", "cat", "dog")


def test_images_without_a_row_are_named(tmp_path, capsys):
    root = dataset(tmp_path / "data", *(f"{i}.jpg" for i in range(9)), labels="id,labels\n1,cat\n2,dog\n")
    refusal(capsys, "datasets.verify", *data_flags(root), "--output_dir", tmp_path)
    report = json.loads((tmp_path / "verify.json").read_text())
    assert report["splits"]["train"]["without_labels"] == list("0345678")
    text = "split 'train': 2 of 9 images have labels, so it cannot be learnt from; the first without is '0'"
    assert report["findings"]["label"] == [text]


# What belongs to nothing


def test_lists_that_share_ids_are_named(tmp_path):
    root = dataset(tmp_path, "a.jpg", "b.jpg", "c.jpg", labels="id,labels\na,cat\nb,dog\nc,cat;dog\n")
    (root / "splits").mkdir()
    for name, ids in {"train": "abc", "train_aug": "abc", "trainval": "abc", "val": "bc", "test": "c"}.items():
        (root / "splits" / f"{name}.txt").write_text("\n".join(ids))
    assert findings(root)["overlap"] == [
        "1 of 1 ids of test are in train too, the first is 'c'",
        "1 of 1 ids of test are in train_aug too, the first is 'c'",
        "1 of 1 ids of test are in trainval too, the first is 'c'",
        "1 of 1 ids of test are in val too, the first is 'c'",
        "2 of 2 ids of val are in train too, the first is 'b'",
        "2 of 2 ids of val are in train_aug too, the first is 'b'",
    ]


def test_lists_named_after_each_other_may_share_ids(tmp_path):
    root = dataset(tmp_path, "a.jpg", labels="id,labels\na,cat\n")
    (root / "splits").mkdir()
    for name in ("spring", "spring_small"):
        (root / "splits" / f"{name}.txt").write_text("a")
    assert "overlap" not in findings(root)


def test_a_mask_may_be_what_is_photographed(tmp_path):
    assert findings(photographs(tmp_path, "cat/gas_mask.jpg", "dog/a.jpg")) == {}


def test_files_and_classes_that_belong_to_nothing_are_warned_of(tmp_path):
    root = dataset(tmp_path, "a.jpg", "b.heic", labels="id,labels\na,cat\nb,cat\n")
    (root / "masks").mkdir()
    for name in ("a.png", "b.png", "notes.txt"):
        Image.new("L", (8, 6), 1).save(root / "masks" / name, format="PNG")
    assert findings(root) == {
        "rows": ["row 'b' belongs to no photograph"],
        "unread": [f"{root / 'images' / 'b.heic'}: a kind that is not read (.heic). Convert photographs to JPEG"],
        "stray": [f"{root / 'masks' / name}: no ID.png of a photograph" for name in ("b.png", "notes.txt")],
        "unused": [
            "class 'cat' is in every training label, so labels cannot tell where it is. Add images without it",
            "class 'dog' is in no training label",
        ],
    }


def test_strays_beside_some_masks_are_no_error(folder_copy):
    (folder_copy / "masks" / "d.png").rename(folder_copy / "masks" / "x.png")
    found = findings(folder_copy)
    assert found["stray"] == [f"{folder_copy}/masks/x.png: no ID.png of a photograph"] and "mask" not in found


@pytest.mark.parametrize(
    "name",
    [
        *("a_mask.png", "a___fuse.png", "a.jpg___fuse.png", "a-seg.png", "a_labelIds.png", "a masks.png", "a_GT.png"),
        *("a.jpg___pixel.png", "a.jpg___save.png", "a_label.png", "a_labels.png", "a_segmentation.png"),
    ],
)
def test_masks_among_the_photographs_are_errors(tmp_path, name):
    found = findings(photographs(tmp_path, "cat/a.jpg", f"cat/{name}"))
    assert [text.split(".png:")[1] for text in found["disguised"]] == [
        " looks like the mask of cat/a. Move it to masks/ (ID.png) or rename it"
    ]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("{}_mask.png", ""),
        ("{}.jpg", ": masks are PNG"),
        ("{}.jpg.png", ": write ids without suffix (a)"),
        ("{}.jpg___fuse.png", ""),
        ("{}.tif", ": masks are PNG"),
        ("sub/{}.png", ": write ids without the folders above (a)"),
        ("{}_gt.PNG", ""),
    ],
)
def test_masks_under_other_names_are_an_error_before_anything_is_trained(folder_copy, name, advice):
    for path in sorted((folder_copy / "masks").iterdir()):
        new = folder_copy / "masks" / name.format(path.stem)
        new.parent.mkdir(exist_ok=True)
        path.rename(new)
    first = folder_copy / "masks" / name.format("a")
    text = f"holds 4 files, none is ID.png of a photograph, such as {first.name}. Rename them"
    found = findings(folder_copy)
    assert found["mask"] == [f"{first.parent}: {text}"]
    assert found["stray"][0] == f"{first}: no ID.png of a photograph{advice}" and len(found["stray"]) == 4


def test_suffixes_of_masks_may_be_capital(folder_copy):
    expected = build_source("folder", folder_copy).mask("b")
    for path in (folder_copy / "masks").iterdir():
        path.rename(path.with_suffix(".PNG"))
    source = build_source("folder", folder_copy)
    source.check_masks(["a", "b", "c", "d"])
    np.testing.assert_array_equal(source.mask("b"), expected)
    assert findings(folder_copy).keys() == {"overlap"}


def test_a_split_to_be_scored_must_have_all_its_masks(folder_copy, capsys):
    (folder_copy / "masks" / "d.png").unlink()
    text = "split 'val': 1 of 2 images have masks, so it cannot be scored; the first without is 'd'"
    assert findings(folder_copy)["partial"] == [text] and findings(folder_copy, scored=["val"])["mask"] == [text]
    for path in (folder_copy / "masks").iterdir():
        path.unlink()
    (folder_copy / "masks" / "d.png").touch()
    text = "split 'train': 0 of 3 images have masks, so it cannot be scored; the first without is 'a'"
    assert text in findings(folder_copy, scored=["train"])["mask"]
    refusal(capsys, "datasets.verify", *data_flags(folder_copy), "--scored", "train")
