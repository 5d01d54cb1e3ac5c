"""Thresholds without masks against a plain Otsu; labels from elsewhere, which move with their photographs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command import DECODER, TRAINING, data_flags, parse, refusal, run
from conftest import OBJECTS, SIZES, SPLITS
from PIL import Image
from torch import nn

import train_csrm
from datasets import build_source
from datasets.base import voc_palette
from tools.cam import multi_scale_cams, save_cams
from tools.errors import UserError
from tools.files import load_mask, save_mask
from tools.maps import normalize
from tools.options import CRF, Views
from tools.pseudo_labels import reliable_cam_labels
from tools.seeds import auto_threshold, label_folder

VIEWS = Views(scales=(1.0,), hflip=False, long_side=64)


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
        _, _, cams = multi_scale_cams(forward, image, label, scales=[1], hflip=False, long_side=64)
        if len(cams) and cams.any():
            expected.append(plain_otsu(cams.max(axis=0)))
    threshold = auto_threshold(forward, source, ids, VIEWS, torch.device("cpu"))
    assert threshold == pytest.approx(np.mean(expected), abs=0.01) and len(expected) > 0


def test_without_any_cam_the_usual_threshold(folder_root):
    dead = lambda images: -torch.ones(len(images), 2, 3, 3)  # noqa: E731
    source = build_source("folder", folder_root)
    assert auto_threshold(dead, source, SPLITS["train"], VIEWS, torch.device("cpu")) == 0.4


def write_cams(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for image_id in SPLITS["train"]:
        keys = np.array([0, *(["cat", "dog"].index(name) + 1 for name in OBJECTS[image_id])])
        maps = rng.random((len(keys) - 1, *SIZES[image_id])).astype(np.float16)
        save_cams(folder / f"{image_id}.npz", keys, maps[:, ::4, ::4], maps)


def test_cam_files_become_reliable_labels(folder_root, tmp_path):
    source = build_source("folder", folder_root)
    write_cams(tmp_path / "cams")
    options = {"thresholds": (0.3, 0.6), "crf": CRF(iterations=2)}
    made = label_folder(source, SPLITS["train"], tmp_path / "cams", tmp_path / "made", **options)
    assert made == tmp_path / "made"
    for image_id in SPLITS["train"]:
        with np.load(tmp_path / "cams" / f"{image_id}.npz") as file:
            cams = torch.zeros(1, 2, *SIZES[image_id])
            for key, cam in zip(file["keys"][1:], file["hr_cam"], strict=True):
                cams[0, key - 1] = torch.from_numpy(cam.astype(np.float32))
        label = torch.from_numpy(source.image_label(image_id))[None]
        expected = reliable_cam_labels(source.photograph(image_id), cams, label, 0.3, 0.6, crf_iterations=2)[0]
        assert np.array_equal(load_mask(made / f"{image_id}.png"), expected.numpy())
    with pytest.raises(UserError, match="made: made with --c2s_bg 0.3, not 0.2"):
        label_folder(source, SPLITS["train"], tmp_path / "cams", made, thresholds=(0.2, 0.6), crf=CRF(iterations=2))


def test_masks_are_taken_as_they_are_and_none_may_be_missing(folder_root, tmp_path):
    source = build_source("folder", folder_root)
    options = {"thresholds": (0.05, 0.3), "crf": CRF()}
    for image_id in SPLITS["train"]:
        save_mask(tmp_path / "masks" / f"{image_id}.png", np.zeros(SIZES[image_id], np.uint8), voc_palette())
    assert label_folder(source, SPLITS["train"], tmp_path / "masks", tmp_path, **options) == tmp_path / "masks"
    (tmp_path / "masks" / f"{SPLITS['train'][-1]}.png").unlink()
    with pytest.raises(UserError, match=f"{SPLITS['train'][-1]}.png is missing .1 of "):
        label_folder(source, SPLITS["train"], tmp_path / "masks", tmp_path, **options)
    with pytest.raises(UserError, match="a.png is missing .3 of 3 are.. --c2s_labels needs ID.png or ID.npz"):
        label_folder(source, SPLITS["train"], tmp_path / "none", tmp_path, **options)


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
    source = train_csrm.labelled_source(build_source("folder", root), args)
    labeled, unlabeled = train_csrm.build_loaders(source, args)
    options = train_csrm.label_options(args, 0.05, 0.3)
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
    assert "--c2s_fg auto: no CAMs to read it from" in refusal(capsys, "train_csrm", *flags, "--c2s_fg", "auto")
    line = refusal(capsys, "train_csrm", *flags, "--c2s_labels", folder_root / "masks", "--c2s_bg", "auto")
    assert "Give numbers with --c2s_labels" in line


def test_auto_thresholds_in_training_and_inference(folder_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = data_flags(folder_root)
    run("train_classifier", *data, "--tag", "p", *TRAINING)
    restore = ["--restore", "experiments/models/p.pth", "--c2s_fg", "auto", "--c2s_bg", "auto"]
    run("train_csrm", *data, "--tag", "c", *TRAINING, *DECODER, *restore)
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
