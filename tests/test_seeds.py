"""Thresholds without masks against a plain Otsu; labels from elsewhere, which move with their photographs."""

from __future__ import annotations

import argparse
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command import DECODER, TRAINING, data_flags, parse, refusal, run
from conftest import OBJECTS, SIZES, SPLITS
from PIL import Image
from test_cli import write_checkpoint
from torch import nn

import train_csrm
import train_segmentation
from datasets import build_source
from datasets.base import voc_palette
from models import cam_forward
from tools.cam import multi_scale_cams
from tools.cam_files import save_cams
from tools.errors import UserError
from tools.files import load_mask, save_mask
from tools.maps import normalize
from tools.options import CRF, Views
from tools.pseudo_labels import reliable_cam_labels
from tools.seeds import auto_threshold, cams_of_file, label_files, network_cams, write_labels

VIEWS = Views(scales=(1.0,), hflip=False, long_side=(0, 64))


def plain_otsu(values: np.ndarray) -> float:
    """The value that parts the rest into two groups of least variance within, of 256 in the middle of equal bins."""
    low, high = values.min(), values.max()
    middles = low + (np.arange(256) + 0.5) * (high - low) / 256
    nearest = np.abs(values.ravel()[:, None] - middles).argmin(axis=1)
    within = []
    for cut in range(255):
        groups = [middles[nearest[nearest <= cut]], middles[nearest[nearest > cut]]]
        within.append(sum(group.var() * len(group) for group in groups if len(group)))
    return float(middles[int(np.argmin(within))])


@pytest.fixture
def forward():
    torch.manual_seed(0)
    return nn.Conv2d(3, 2, 3, stride=4, padding=1).requires_grad_(False)


def test_a_threshold_is_the_mean_of_otsus(folder_root, forward):
    source = build_source("folder", folder_root)
    ids = SPLITS["train"]
    expected = []
    for image_id in ids:
        image, label = normalize(source.photograph(image_id)), torch.from_numpy(source.image_label(image_id))
        _, _, cams = multi_scale_cams(forward, image, label, Views((1,), hflip=False, long_side=(0, 64)))
        if len(cams) and cams.any():
            expected.append(plain_otsu(cams.max(axis=0)))
    threshold = auto_threshold(network_cams(forward, source, VIEWS, torch.device("cpu")), ids)
    assert threshold == pytest.approx(np.mean(expected), abs=0.01) and len(expected) > 0


def test_without_any_cam_the_usual_threshold(folder_root):
    dead = lambda images: -torch.ones(len(images), 2, 3, 3)  # noqa: E731
    source = build_source("folder", folder_root)
    cams_of = network_cams(dead, source, VIEWS, torch.device("cpu"))
    assert auto_threshold(cams_of, SPLITS["train"]) == 0.4


def write_cams(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for image_id in SPLITS["train"]:
        keys = np.array([0, *(["cat", "dog"].index(name) + 1 for name in OBJECTS[image_id])])
        maps = rng.random((len(keys) - 1, *SIZES[image_id])).astype(np.float16)
        save_cams(folder / f"{image_id}.npz", keys, maps[:, ::4, ::4], maps)


def maps_of(source, folder: Path, image_id: str) -> torch.Tensor:
    """The CAM file as f32[1,K,H,W]."""
    with np.load(folder / f"{image_id}.npz") as file:
        cams = torch.zeros(1, 2, *SIZES[image_id])
        for key, cam in zip(file["keys"][1:], file["hr_cam"], strict=True):
            cams[0, key - 1] = torch.from_numpy(cam.astype(np.float32))
    return cams


def test_cam_files_become_reliable_labels(folder_root, tmp_path):
    source, made = build_source("folder", folder_root), tmp_path / "made"
    write_cams(tmp_path / "cams")
    files, options = label_files(tmp_path / "cams", SPLITS["train"]), {"crf": CRF(iterations=2), "views": VIEWS}
    write_labels(source, files, made, thresholds=(0.3, 0.6), **options)
    for image_id in SPLITS["train"]:
        cams, label = maps_of(source, tmp_path / "cams", image_id), torch.from_numpy(source.image_label(image_id))[None]
        expected = reliable_cam_labels(source.photograph(image_id), cams, label, 0.3, 0.6, crf_iterations=2)[0]
        assert np.array_equal(load_mask(made / f"{image_id}.png"), expected.numpy())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"thresholds": (0.2, 0.6)}, "--c2s_bg 0.3, not 0.2"),
        ({"thresholds": (0.3, 0.7)}, "--c2s_fg 0.6, not 0.7"),
        ({"crf": CRF(iterations=3)}, "--crf_t 2, not 3"),
        ({"crf": CRF(2, gt_prob=0.9)}, "--crf_gt_prob 0.7, not 0.9"),
        ({"crf": CRF(2, backend="pydensecrf")}, "--crf_backend torch, not pydensecrf"),
        ({"views": Views((1.0,), False, (32, 64))}, r"--long_side \[0, 64\], not \[32, 64\]"),
    ],
)
def test_labels_of_cam_files_of_other_settings_do_not_mix(folder_root, tmp_path, change, told):
    source, files = cam_files(folder_root, tmp_path)
    options = {"thresholds": (0.3, 0.6), "crf": CRF(2), "views": VIEWS}
    write_labels(source, files, tmp_path / "made", **options)
    with pytest.raises(UserError, match=f"made: made with {told}"):
        write_labels(source, files, tmp_path / "made", **options | change)


def test_nor_do_those_of_other_classes_image_labels_or_cam_files(folder_copy, tmp_path):
    source, files = cam_files(folder_copy, tmp_path)
    options = {"thresholds": (0.3, 0.6), "crf": CRF(2), "views": VIEWS}
    write_labels(source, files, tmp_path / "made", **options)
    table, classes = folder_copy / "labels.csv", folder_copy / "classes.txt"
    classes.write_text("background\ndog\ncat\n")
    with pytest.raises(UserError, match=r"made: made with classes \['cat', 'dog'\], not \['dog', 'cat'\]"):
        write_labels(build_source("folder", folder_copy), files, tmp_path / "made", **options)
    classes.write_text("background\ncat\ndog\n")
    table.write_text(table.read_text().replace("c,dog", "c,cat"))
    with pytest.raises(UserError, match="made: made with other labels of 1 images, the first is c"):
        write_labels(build_source("folder", folder_copy), files, tmp_path / "made", **options)
    files["a"].write_bytes(files["c"].read_bytes())
    with pytest.raises(UserError, match="made: made with other CAM files of 1 images, the first is a"):
        write_labels(source, files, tmp_path / "made", **options)


def cam_files(root: Path, tmp_path: Path):
    """The source of a dataset, and the CAM files of its images."""
    write_cams(tmp_path / "cams")
    return build_source("folder", root), label_files(tmp_path / "cams", SPLITS["train"])


def test_labels_of_a_large_photograph_are_made_of_a_reduced_one(folder_root, tmp_path, monkeypatch):
    """At half the size; then each pixel stands for four."""
    source, image_id = build_source("folder", folder_root), SPLITS["train"][0]
    write_cams(tmp_path / "cams")
    height, width = SIZES[image_id]
    monkeypatch.setattr("tools.cam.WORKING_SIDE", max(height, width) / 2)
    views = Views(scales=(1.0,), hflip=False, long_side=(0, 1))
    files = {image_id: tmp_path / "cams" / f"{image_id}.npz"}
    options = {"thresholds": (0.3, 0.6), "crf": CRF(iterations=2), "views": views}
    write_labels(source, files, tmp_path / "made", **options)
    small = (round(height / 2), round(width / 2))
    photograph = F.interpolate(source.photograph(image_id), small, mode="bilinear", antialias=True)
    cams = F.interpolate(maps_of(source, tmp_path / "cams", image_id), small, mode="bilinear", align_corners=True)
    label = torch.from_numpy(source.image_label(image_id))[None]
    expected = reliable_cam_labels(photograph, cams, label, 0.3, 0.6, crf_iterations=2)[0].numpy()
    rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), small, strict=True))
    assert np.array_equal(load_mask(tmp_path / "made" / f"{image_id}.png"), expected[np.ix_(rows, columns)])


@pytest.mark.parametrize("long_side, large", [((99, 99), 1000), ((0, 1), 10)])
def test_labels_of_an_image_without_a_class_whatever_its_size(folder_root, tmp_path, monkeypatch, long_side, large):
    """It is enlarged to 99 pixels, or reduced to 10."""
    source, height, width = build_source("folder", folder_root), *SIZES["d"]
    none = np.zeros((0, height, width))
    save_cams(tmp_path / "cams" / "d.npz", np.array([0]), none, none)
    monkeypatch.setattr("tools.cam.WORKING_SIDE", large)
    views = Views(scales=(1.0,), hflip=False, long_side=long_side)
    files, options = {"d": tmp_path / "cams" / "d.npz"}, {"thresholds": (0.3, 0.6), "crf": CRF(), "views": views}
    write_labels(source, files, tmp_path / "made", **options)
    mask = load_mask(tmp_path / "made" / "d.png")
    assert mask.shape == (height, width) and not mask.any()


@pytest.mark.parametrize("number", [1, 99, 100, 101, 150, 199, 200, 399, 1234])
def test_a_threshold_looks_at_images_from_the_whole_list(number):
    seen = []
    auto_threshold(lambda i: seen.append(i) or np.zeros((0, 2, 2)), list(range(number)))
    assert len(seen) == min(number, 100) and seen[0] == 0
    assert np.diff([*seen, number]).max() <= -(-number // len(seen)), "evenly"


def test_a_computed_threshold_of_the_foreground_can_be_exceeded():
    args = argparse.Namespace(c2s_bg="auto", c2s_fg="auto")
    cams = np.concatenate([np.full((1, 4, 4), 0.85), np.full((1, 4, 4), 0.97)], axis=2)
    low, high = train_csrm.cam_thresholds(args, lambda image_id: cams, ["a"])
    assert 0.4 < low < 0.5 and high == 0.99


@pytest.mark.parametrize("low, high, message", [(0.3, 0.05, "0.3: above --c2s_fg 0.05"), ("auto", 0.08, "0.1: above")])
def test_a_background_threshold_above_that_of_the_foreground_is_refused(low, high, message):
    """Else no pixel is ignored, and the lower of the two counts for nothing."""
    args = argparse.Namespace(c2s_bg=low, c2s_fg=high)
    cams = np.concatenate([np.full((1, 4, 4), 0.2), np.full((1, 4, 4), 0.8)], axis=2)
    with pytest.raises(UserError, match=f"--c2s_bg .*{message}"):
        train_csrm.cam_thresholds(args, lambda image_id: cams, ["a"])


def test_classes_that_the_label_lacks_are_left_out_of_a_cam_file(folder_root, tmp_path):
    source, image_id = build_source("folder", folder_root), next(i for i in SPLITS["train"] if len(OBJECTS[i]) == 1)
    (present,) = np.flatnonzero(source.image_label(image_id))
    maps = np.stack([np.full(SIZES[image_id], value, np.float16) for value in (0.25, 0.75)])
    save_cams(tmp_path / "a.npz", np.array([0, 1, 2]), maps[:, ::4, ::4], maps)
    classes, cams = cams_of_file(tmp_path / "a.npz", source.image_label(image_id), SIZES[image_id])
    assert classes.tolist() == [present] and cams.dtype == np.float32
    assert np.array_equal(cams, maps[[present]])


@pytest.mark.parametrize("keys, absent", [([0, 1], 2), ([0], 1)])
def test_a_cam_file_without_a_class_of_the_label_is_refused(tmp_path, keys, absent):
    """It is of an older label, or counts classes from 0: the object would be learnt as background."""
    maps = np.ones((len(keys) - 1, 4, 4))
    save_cams(tmp_path / "a.npz", np.array(keys), maps, maps)
    with pytest.raises(UserError, match=f"a.npz: no CAM of class {absent} .0 is background., which the label"):
        cams_of_file(tmp_path / "a.npz", np.ones(2, np.float32), (4, 4))


def test_masks_are_taken_as_they_are_and_none_may_be_missing(folder_root, tmp_path):
    for image_id in SPLITS["train"]:
        save_mask(tmp_path / "masks" / f"{image_id}.png", np.zeros(SIZES[image_id], np.uint8), voc_palette())
    files = label_files(tmp_path / "masks", SPLITS["train"])
    assert files == {image_id: tmp_path / "masks" / f"{image_id}.png" for image_id in SPLITS["train"]}
    (tmp_path / "masks" / f"{SPLITS['train'][-1]}.png").unlink()
    with pytest.raises(UserError, match=f"{SPLITS['train'][-1]}.png is missing .1 of "):
        label_files(tmp_path / "masks", SPLITS["train"])
    with pytest.raises(UserError, match="a.png is missing .3 of 3 are.. --c2s_labels needs ID.png or ID.npz"):
        label_files(tmp_path / "none", SPLITS["train"])


@pytest.mark.parametrize("shown, is_refused", [("22220", True), ("21110", False), ("00020", False), ("22211", True)])
def test_masks_of_classes_in_another_order_are_refused(tmp_path, shown, is_refused):
    """Five photographs of cats, class 1. Masks without a class say nothing."""
    for name, value in zip("abcde", shown, strict=True):
        save_mask(tmp_path / "seeds" / f"{name}.png", np.full((8, 8), int(value)), voc_palette())
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    (tmp_path / "labels.csv").write_text("id,labels\n" + "".join(f"{name},cat\n" for name in "abcde"))
    refused = pytest.raises(UserError, match="a.png: one of . masks .* that show none")
    args = parse("train_csrm", "--tag", "t", *data_flags(tmp_path), *TRAINING, "--c2s_labels", tmp_path / "seeds")
    with refused if is_refused else nullcontext():
        train_csrm.labelled_source(build_source("folder", tmp_path), args, VIEWS)
    args = parse(
        "train_segmentation", "--tag", "t", *data_flags(tmp_path), *TRAINING, "--masks_dir", tmp_path / "seeds"
    )
    with refused if is_refused else nullcontext():
        train_segmentation.training_data(build_source("folder", tmp_path, args.masks_dir), args)
    (tmp_path / "labels.csv").unlink()  # masks are learnt without labels, too
    train_segmentation.training_data(build_source("folder", tmp_path, args.masks_dir), args)


def test_photograph_and_label_take_the_same_crop_flip_and_mixing(folder_root, tmp_path):
    """Photographs that are white just where their label is 1."""
    rng, root = np.random.default_rng(0), tmp_path / "data"
    for folder in ("images", "seeds"):
        (root / folder).mkdir(parents=True)
    for name in "abcd":
        mask = np.kron(rng.integers(0, 2, (3, 4)), np.ones((16, 16), int)).astype(np.uint8)
        Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=2)).save(root / "images" / f"{name}.png")
        save_mask(root / "seeds" / f"{name}.png", mask, voc_palette())
    (root / "classes.txt").write_text("background\ncat\n")
    (root / "labels.csv").write_text("id,labels\na,cat\nb,cat\nc,cat\nd,cat\n")
    flags = ["--c2s_labels", root / "seeds", "--augment", "classmix", "--cutmix_prob", 1, "--max_steps", 4]
    args = parse("train_csrm", "--tag", "t", *data_flags(root), *TRAINING, *flags)
    source = train_csrm.labelled_source(build_source("folder", root), args, VIEWS)
    labeled, unlabeled = train_csrm.build_loaders(source, args)
    options = train_csrm.label_options(args, None)
    for batch in train_csrm.batches(labeled, unlabeled, nn.Identity(), torch.device("cpu")):
        labels = train_csrm.pixel_labels(batch, {}, slice(None), options)
        logits = torch.zeros(len(labels), 2, 12, 12)
        images, labels, *_ = train_csrm.classmix(batch.images, labels, logits, batch.image_labels)
        known = labels != 255
        agree = (images.float().mean(dim=1) > 127)[known] == (labels == 1)[known]
        assert known.float().mean() > 0.3 and agree.float().mean() > 0.95


def test_auto_is_refused_where_there_is_nothing_to_read_it_from(folder_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*data_flags(folder_root), "--tag", "t", *TRAINING, *DECODER]
    others = write_checkpoint("p", "classifier", ["background", "bird", "fish"])
    for restore in ([], ["--restore", others]):  # of other classes nothing but the backbone is taken
        line = refusal(capsys, "train_csrm", *flags, "--c2s_fg", "auto", *restore)
        assert "--c2s_fg auto: no CAMs to read it from" in line


def test_auto_thresholds_in_training_and_inference(folder_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = data_flags(folder_root)
    run("train_classifier", *data, "--tag", "p", *TRAINING)
    restore = ["--restore", "experiments/models/p.pth", "--c2s_fg", "auto", "--c2s_bg", "auto", "--mode", "normal"]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(train_csrm, "cam_forward", lambda model: seen.append(model.training) or cam_forward(model))
        patch.setattr(train_csrm, "network_cams", lambda *args: seen.append(args[2]) or network_cams(*args))
        run("train_csrm", *data, "--tag", "c", *TRAINING, *DECODER, *restore)
    assert seen == [False, Views((1.0,), True, (32, 48))], "in evaluation mode, at the size of the training"
    found = dict(re.findall(r"--c2s_(bg|fg) auto: (\S+)", capsys.readouterr().out))
    assert float(found["fg"]) == pytest.approx(2.5 * float(found["bg"]), abs=0.002) and 0 < float(found["bg"]) < 0.5
    views = ["--scales", "1", "--crf_t", 0, "--device", "cpu", "--num_workers", 0]
    run("inference", *data, "--tag", "c", "--domain", "train", *views, "--threshold", "auto")
    folder = Path("experiments/predictions/c@train")
    threshold = float(capsys.readouterr().out.split("--threshold auto: ")[1].split()[0])
    run("inference", *data, "--tag", "c", "--domain", "train", *views, "--threshold", threshold)
    for image_id in SPLITS["train"]:
        pair = [load_mask(folder / f"pseudos-t{name}-c0" / f"{image_id}.png") for name in ("auto", f"{threshold:g}")]
        assert np.array_equal(*pair)


def test_auto_thresholds_are_those_of_the_cam_files(folder_root, tmp_path, monkeypatch, capsys):
    """One step: the labels are made before it."""
    monkeypatch.chdir(tmp_path)
    write_cams(tmp_path / "cams")
    source, ids = build_source("folder", folder_root), SPLITS["train"]
    middle = np.mean(
        [plain_otsu(maps_of(source, tmp_path / "cams", i).numpy()[0].max(axis=0)) for i in ids if OBJECTS[i]]
    )
    flags = ["--c2s_labels", tmp_path / "cams", "--c2s_fg", "auto", "--c2s_bg", "auto", "--max_steps", 1]
    flags += ["--crf_t", 2, "--crf_gt_prob", 0.9]
    run("train_csrm", *data_flags(folder_root), "--tag", "c", *TRAINING, *DECODER, *flags)
    found = dict(re.findall(r"--c2s_(bg|fg) auto: (\S+)", capsys.readouterr().out))
    assert float(found["bg"]) == pytest.approx(0.5 * middle, abs=0.01)
    assert float(found["fg"]) == pytest.approx(1.25 * middle, abs=0.015)
    thresholds = float(found["bg"]), float(found["fg"])
    views = Views(scales=(1.0,), hflip=True, long_side=(32, 48))
    files = label_files(tmp_path / "cams", ids)
    write_labels(source, files, tmp_path / "made", thresholds=thresholds, crf=CRF(2, 0.9), views=views)
    for image_id in ids:
        made = [load_mask(folder / f"{image_id}.png") for folder in (Path("experiments/labels/c"), tmp_path / "made")]
        assert np.array_equal(*made)
