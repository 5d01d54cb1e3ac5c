"""From official archives on a local server to a dataset that is read and verified, as a user does it."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from command import refusal, run
from official import (
    COCO_CLASSES,
    SBD_SPLITS,
    VOC_OTHERS,
    VOC_SPLITS,
    VOC_TEST,
    Server,
    coco_archives,
    coco_name,
    deepglobe_archive,
    describe,
    half_mask,
    sbd_archive,
    sbd_mat,
    voc_archives,
)
from PIL import Image

from datasets import build_source, verify
from datasets.prepare import __main__ as prepare
from datasets.prepare import deepglobe, download
from datasets.prepare.sbd import read_mat
from datasets.verify import Published
from tools.errors import UserError
from tools.files import load_mask, locked, read_lines

TRAIN_AUG = sorted({*VOC_SPLITS["train"], *VOC_OTHERS})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Work in an empty folder, and do not wait between connections."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "PAUSE", 0)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory):
    with Server(tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def voc(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with VOC and SBD in miniature, and the numbers of these in place of the official ones."""
    trainval, test = voc_archives(server.folder)
    for name, path in (("VOC12", trainval), ("VOC12_TEST", test), ("SBD", sbd_archive(server.folder))):
        monkeypatch.setattr(prepare, name, describe(getattr(prepare, name), path, server.url))
    counts = {"train_aug": 4, "train": 2, "val": 1, "test": 2}
    official = verify.PUBLISHED["voc12"]
    mine = {name: Published(count, official[name].labels, official[name].masks) for name, count in counts.items()}
    monkeypatch.setitem(verify.PUBLISHED, "voc12", mine)
    return server


@pytest.fixture
def coco(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The same with COCO."""
    paths = coco_archives(server.folder)
    pairs = zip(prepare.COCO14, paths, strict=True)
    monkeypatch.setattr(prepare, "COCO14", tuple(describe(archive, path, server.url) for archive, path in pairs))
    monkeypatch.setitem(verify.PUBLISHED, "coco14", {"train2014": Published(3), "val2014": Published(1)})
    return server


def snapshot(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def prepare_and_verify(dataset: str, *flags: object) -> Path:
    run("datasets.prepare.__main__", "--dataset", dataset, "--num_workers", 0, *flags)
    run("datasets.verify", "--dataset", dataset, "--num_workers", 0)
    return Path("data") / dataset


def test_voc_from_its_archives(voc, capsys):
    voc.cut = 3000  # every connection breaks off
    root = prepare_and_verify("voc12")
    assert "they need a free account" in capsys.readouterr().out
    source = build_source("voc12", root)
    assert source.domains() == ["train", "train_aug", "trainval", "val"]
    assert source.ids("train_aug") == TRAIN_AUG and source.ids("train") == VOC_SPLITS["train"]
    labels = source.image_labels(TRAIN_AUG)
    assert [source.info.classes[i + 1] for i in np.flatnonzero(labels.any(axis=0))] == ["cat", "person"]
    assert not (root / "sbd" / "img").exists() and len({path for path, _ in voc.asked}) == 2 < len(voc.asked)


def test_masks_of_sbd_complete_those_of_voc(voc):
    root = prepare_and_verify("voc12") / "VOCdevkit" / "VOC2012"
    source = build_source("voc12", root)
    for image_id in TRAIN_AUG:
        mask = half_mask(15 if image_id == "2008_000005" else 8)
        expected = mask if image_id in VOC_SPLITS["train"] else np.where(mask == 255, 0, mask)  # VOC's own has a border
        np.testing.assert_array_equal(source.mask(image_id), expected)
        np.testing.assert_array_equal(load_mask(root / "SegmentationClassAug" / f"{image_id}.png"), expected)
    assert len(os.listdir(root / "SegmentationClassAug")) == 4  # none of val, although SBD has it
    assert set(SBD_SPLITS["val"]) - set(TRAIN_AUG) == set(VOC_SPLITS["val"])


def test_test_images_of_voc_are_taken_where_the_user_put_them(voc, capsys):
    root = prepare_and_verify("voc12")
    shutil.copy(voc.folder / "VOC2012test.tar", root / "downloads")
    prepare_and_verify("voc12")
    source = build_source("voc12", root)
    assert source.ids("test") == VOC_TEST and not any(map(source.has_label, VOC_TEST))
    assert "test            2      2        0           0       0      0" in capsys.readouterr().out


def test_what_is_there_is_skipped(voc, capsys):
    root = prepare_and_verify("voc12")
    shutil.rmtree(root / "downloads")
    before, asked = snapshot(root), len(voc.asked)
    capsys.readouterr()
    prepare_and_verify("voc12")
    assert snapshot(root) == before and len(voc.asked) == asked
    assert "has the files of VOCtrainval_11-May-2012.tar" in capsys.readouterr().out


def test_without_a_network_archives_are_taken_from_a_folder(voc):
    voc.status = 503
    shutil.copytree(voc.folder, "usb")
    root = prepare_and_verify("voc12", "--download_dir", "usb")
    assert voc.asked == [] and build_source("voc12", root).ids("train_aug") == TRAIN_AUG
    assert set(os.listdir("usb")) == {"VOCtrainval_11-May-2012.tar", "VOC2012test.tar", "benchmark.tgz"}


def test_a_devkit_unpacked_by_the_user_is_used_where_it_is(voc):
    shutil.unpack_archive(voc.folder / "VOCtrainval_11-May-2012.tar", "unpacked", filter="data")
    flags = ["--dataset", "voc12", "--data_dir", "unpacked/VOCdevkit/VOC2012", "--num_workers", "2"]
    run("datasets.prepare.__main__", *flags)
    run("datasets.verify", *flags)
    assert [path for path, _ in voc.asked] == ["/benchmark.tgz"]


def test_a_damaged_mask_of_sbd_is_one_line(voc, tmp_path):
    for content in (b"", b"no mat file", (voc.folder / "benchmark.tgz").read_bytes()):
        (tmp_path / "a.mat").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.mat: not a readable mask of SBD"):
            read_mat(tmp_path / "a.mat")
    with pytest.raises(UserError, match=r"b\.mat: no such mask of SBD"):
        read_mat(tmp_path / "b.mat")
    mask = np.arange(21, dtype=np.uint8)[None]
    for shift, fits in ((0, True), (1, False)):
        (tmp_path / "c.mat").write_bytes(sbd_mat(mask + np.uint8(shift)))
        with nullcontext() if fits else pytest.raises(UserError, match=r"c\.mat: not a mask of the 20 VOC classes"):
            np.testing.assert_array_equal(read_mat(tmp_path / "c.mat"), mask)


def test_a_conversion_that_was_interrupted_goes_on(voc, capsys):
    prepare_and_verify("voc12")
    lists = Path("data/voc12/VOCdevkit/VOC2012/ImageSets/Segmentation")
    (lists / "train_aug.txt").unlink()
    mat = Path("data/voc12/sbd/cls/2008_000004.mat")
    mask = lists.parents[1] / "SegmentationClassAug" / "2008_000004.png"
    mask.unlink()
    content = mat.read_bytes()
    mat.write_bytes(content[:100])
    assert "2008_000004.mat: not a readable mask" in refusal(
        capsys, "datasets.prepare.__main__", "--dataset", "voc12", "--num_workers", "2"
    )
    assert not mask.exists() and not (lists / "train_aug.txt").exists()
    mat.write_bytes(content)
    prepare_and_verify("voc12")
    assert mask.exists() and read_lines(lists / "train_aug.txt") == TRAIN_AUG


def test_coco_from_its_archives(coco):
    root = prepare_and_verify("coco14", "--mirror", coco.url)
    source = build_source("coco14", root)
    assert list(source.info.classes) == COCO_CLASSES
    assert source.ids("train2014") == [coco_name("train2014", n) for n in (9, 25, 30)]
    for image_id in source.ids("train2014") + source.ids("val2014"):
        shown = np.unique(source.mask(image_id))
        assert set(shown[shown > 0] - 1) <= set(np.flatnonzero(source.image_label(image_id)))
    assert sorted(os.listdir(root / "annotations")) == ["instances_train2014.json", "instances_val2014.json"]
    last = root / "splits" / "val2014.txt"
    content = last.read_bytes()
    last.unlink()  # as if stopped before it
    prepare_and_verify("coco14", "--mirror", coco.url)
    assert last.read_bytes() == content
    before, asked = snapshot(root), len(coco.asked)
    prepare_and_verify("coco14")
    assert snapshot(root) == before and len(coco.asked) == asked


def test_deepglobe_from_its_archive(tmp_path):
    Path("downloads").mkdir()
    deepglobe_archive(Path("downloads"))
    root = prepare_and_verify("deepglobe", "--download_dir", "downloads")
    source = build_source("deepglobe", root)
    assert source.info.classes == ("background", "urban", "agriculture", "rangeland", "forest", "water", "barren")
    assert source.ids("train") == ["1", "2", "3", "4", "6", "7", "8", "9"] and source.ids("val") == ["5", "10"]
    assert source.ids("test") == ["11", "12"] and source.image("11").shape == (32, 48, 3)
    for image_id in source.ids("train"):
        expected = np.repeat([1, 5 if int(image_id) % 2 else 1], 16)[:, None].repeat(48, axis=1)
        np.testing.assert_array_equal(source.mask(image_id), expected)
        assert set(np.flatnonzero(source.image_label(image_id)) + 1) == set(np.unique(expected).tolist())
    (root / "splits" / "val.txt").unlink()  # as if stopped before it
    prepare_and_verify("deepglobe", "--download_dir", "downloads")
    assert build_source("deepglobe", root).ids("val") == ["5", "10"]
    before = snapshot(root)
    prepare_and_verify("deepglobe", "--download_dir", "downloads")
    assert snapshot(root) == before


def test_deepglobe_partly_unpacked(tmp_path):
    """Photographs may lie in zip files, beside them, or in both; those beside are test images here."""
    downloads = tmp_path / "downloads"
    (downloads / "test").mkdir(parents=True)
    archive = deepglobe_archive(downloads)
    with zipfile.ZipFile(archive) as file:
        file.extractall(downloads / "unpacked")
    shutil.copy(next((downloads / "unpacked").rglob("11_sat.jpg")), downloads / "test" / "100_sat.jpg")
    source = build_source("deepglobe", prepare_and_verify("deepglobe", "--download_dir", downloads))
    assert source.ids("test") == ["11", "12", "100"] and source.ids("val") == ["5", "10"]
    np.testing.assert_array_equal(source.image("100"), source.image("11"))


def test_two_photographs_of_deepglobe_with_one_id_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1_sat.jpg").write_text(folder)
        os.utime(tmp_path / folder / "1_sat.jpg", (0, 0))  # as unpacked, of one size and time
    with pytest.raises(UserError, match=r"b/1_sat\.jpg: there is .*a/1_sat\.jpg too, another file\. Remove one"):
        deepglobe.convert([tmp_path], tmp_path / "out", workers=0)


def test_colours_of_deepglobe():
    colours = np.array([[*deepglobe.COLOURS.values(), (0, 0, 0), (255, 0, 0)]], np.uint8)
    np.testing.assert_array_equal(deepglobe.class_indices(colours), [[1, 2, 3, 4, 5, 6, 255, 255]])
    blurred = np.where(colours == 255, 128, 127).astype(np.uint8)
    np.testing.assert_array_equal(deepglobe.class_indices(blurred), [[1, 2, 3, 4, 5, 6, 255, 255]])


def test_deepglobe_unpacked_on_another_disk(tmp_path, monkeypatch):
    for number in range(1, 6):
        for ending, value in (("sat.jpg", 90), ("mask.png", 255)):
            Image.fromarray(np.full((33, 46, 3), value, np.uint8)).save(tmp_path / f"{number}_{ending}")

    def another_disk(*paths: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", another_disk)
    deepglobe.convert([tmp_path], tmp_path / "out", workers=0)
    source = build_source("deepglobe", tmp_path / "out")
    assert (source.image("5") == 90).all() and (source.mask("5") == 6).all()


def test_deepglobe_that_is_not_there_is_one_line(capsys):
    line = refusal(capsys, "datasets.prepare.__main__", "--dataset", "deepglobe")
    assert "data/deepglobe/downloads: 0 photographs with a mask" in line


def test_photographs_of_coco_in_another_folder_are_not_downloaded_again(coco, capsys):
    inside = Path("data/coco14/images/train2014")
    inside.mkdir(parents=True)
    line = refusal(capsys, "datasets.prepare.__main__", "--dataset", "coco14", "--mirror", coco.url)
    assert f"{inside}: photographs are read from data/coco14/train2014" in line and not coco.asked


@pytest.mark.parametrize("own", ["images/robin/1.jpg", "labels.csv"])
@pytest.mark.parametrize("dataset", ["voc12", "coco14"])
def test_nothing_is_downloaded_into_somebodys_own_photographs(voc, coco, capsys, dataset, own):
    """Whose owner forgot DATASET=folder: the runners' default is voc12."""
    (path := Path("birds", own)).parent.mkdir(parents=True)
    path.touch()
    line = refusal(capsys, "datasets.prepare.__main__", "--dataset", dataset, "--data_dir", "birds")
    assert f"birds: holds {own.partition('/')[0]}, so it is a data set of your own" in line
    assert [*snapshot(Path("birds"))] == [path] and not (voc.asked or coco.asked)


def test_mistakes_on_the_way_are_one_line(voc, coco, capsys):
    prepared = ["--num_workers", "0", "--mirror", f"{coco.url}/nowhere"]
    assert "404" in refusal(capsys, "datasets.prepare.__main__", "--dataset", "coco14", *prepared)
    (coco.folder / "val2014.zip").write_bytes(b"x" * (coco.folder / "val2014.zip").stat().st_size)
    line = refusal(capsys, "datasets.prepare.__main__", "--dataset", "coco14", "--num_workers", "0")
    assert "val2014.zip: not the official file: checksum" in line
    assert (Path("data/coco14/train2014")).is_dir() and not Path("data/coco14/val2014").exists()


def test_two_at_once_are_one(voc, capsys):
    Path("data/voc12").mkdir(parents=True)
    with locked(Path("data/voc12")):
        line = refusal(capsys, "datasets.prepare.__main__", "--dataset", "voc12")
    assert "data/voc12: another process prepares it. Wait for it" in line and voc.asked == []
    prepare_and_verify("voc12").rename("my voc")
    run("datasets.prepare.__main__", "--dataset", "voc12", "--data_dir", "my voc", "--num_workers", 0)
    assert "ready.\nNext: python -m datasets.verify --dataset voc12 --data_dir 'my voc'\n" in capsys.readouterr().out


def test_a_corrupt_image_and_a_wrong_count_are_found(voc, capsys):
    root = prepare_and_verify("voc12") / "VOCdevkit" / "VOC2012"
    photograph = root / "JPEGImages" / "2008_000004.jpg"
    photograph.write_bytes(photograph.read_bytes()[:-200])
    (root / "JPEGImages" / "2007_000001.jpg").unlink()
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run("datasets.verify", "--dataset", "voc12", "--num_workers", "0", "--output_dir", "report")
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "4 errors, listed in report/verify.json" in printed.err
    found = json.loads(Path("report/verify.json").read_text())["findings"]
    assert found["missing"] == ["2007_000001: no photograph"]
    assert "2008_000004.jpg: not a readable image" in found["unreadable"][0]
    assert found["list"] == ["split 'val' is empty", "split 'val' lists 0 images, the published list 1"]
    assert all(text in printed.out for texts in found.values() for text in texts)
