"""Where the parts of a script meet: that each is given what the flags and the stage before say. By values."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command import DECODER, TRAINING, data_flags, parse, run
from conftest import SIZES, SPLITS
from PIL import Image
from test_cli import write_checkpoint
from test_crf import GOLDEN, golden_image
from test_train_csrm import NUM_CLASSES, Step
from torch import nn

import inference
import refine_sam
import report
import train_classifier
import train_csrm
import train_segmentation
from datasets import build_source
from datasets.base import DatasetInfo, voc_palette
from tools import losses, options, training
from tools.cam_files import load_cams, save_cams
from tools.crf import CAM_SETTINGS, mean_field, unary_from_labels
from tools.ema import Teacher
from tools.files import load_mask, save_mask
from tools.optim import Update
from tools.options import CRF, Optimization, Views
from tools.priors import Opponent, PriorCriterion
from tools.proposals.files import mask_file
from tools.pseudo_labels import mutual_promotion_labels, reliable_cam_labels
from tools.seeds import label_files
from train_segmentation import Segmentation

MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet
LABELS, SOFTMAX = GOLDEN["labels_0"], torch.from_numpy(GOLDEN["softmax_0"])
WHOLE = Views((1.0,), False, (0, 10**6))
MAX_STEPS = ["--max_steps", 2]
DECODED = ("segmentation.4.weight", "segmentation.4.bias")  # have a row for each class


def normalized(images: torch.Tensor) -> torch.Tensor:
    return (images / 255 - MEAN[:, None, None]) / DEVIATION[:, None, None]


def agreement(found, expected) -> float:
    return float((np.asarray(found) == np.asarray(expected)).mean())


# -- the last model ------------------------------------------------------------------------------------------------
class Segmenter(nn.Module):
    """Segmentation logits at half size that one can follow by hand; or always the same ones."""

    config = {"kind": "segmentation"}

    def __init__(self, logits: torch.Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.logits = nn.Conv2d(3, 3, 2, stride=2), logits

    def forward(self, x):
        return {"seg_logits": self.conv(x) if self.logits is None else self.logits.expand(len(x), -1, -1, -1)}


def test_a_training_step_is_the_smoothed_cross_entropy_on_normalised_photographs():
    model = Segmenter()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    masks = torch.randint(0, 3, (2, 8, 8)).index_fill(1, torch.tensor([0]), 255)
    loss = train_segmentation.train_step(model, {"image": images, "mask": masks}, torch.device("cpu"), 0.1)["loss"]
    logits = F.interpolate(model.conv(normalized(images)), (8, 8), mode="bilinear", align_corners=True)
    torch.testing.assert_close(loss, F.cross_entropy(logits, masks, ignore_index=255, label_smoothing=0.1))


@torch.no_grad()
def test_a_prediction_is_refined_as_the_golden_segmentations():
    model = Segmenter(SOFTMAX.log()[None])
    mask, _ = train_segmentation.segment(model, golden_image(0), Segmentation(WHOLE, CRF(iterations=10)))
    expected = GOLDEN["q_softmax_g1-3_b67-3-4_t10_0"].argmax(axis=0)
    assert agreement(mask, expected) > 0.9999 > agreement(SOFTMAX.argmax(dim=0), expected)


@torch.no_grad()
def test_a_network_sees_normalised_photographs_in_prediction():
    model, photograph = Segmenter(), torch.randint(0, 256, (1, 3, 17, 33), dtype=torch.uint8)
    mask, _ = train_segmentation.segment(model, photograph, Segmentation(WHOLE, CRF(iterations=0)))
    logits = F.interpolate(model.conv(normalized(photograph)), (17, 33), mode="bilinear", align_corners=True)
    np.testing.assert_array_equal(mask, logits[0].argmax(dim=0))


def test_views_and_crf_of_a_prediction_are_those_of_the_flags_and_of_the_training(folder_root, folder, monkeypatch):
    folder("prediction")
    write_checkpoint("t", "segmentation")
    seen, blank = [], np.zeros(SIZES["a"], np.uint8)
    monkeypatch.setattr(
        train_segmentation, "segment", lambda model, photograph, how: seen.append(how) or (blank, blank)
    )
    flags = ["--scales", "0.5,1", "--hflip", "false", "--crf_t", 3, "--num_workers", 0, "--max_images", 1]
    flags += ["--tile", 99, "--save_confidence"]
    run("train_segmentation", *data_flags(folder_root), "--tag", "t", "--predict", "--domain", "train", *flags)
    assert seen == [Segmentation(Views((0.5, 1.0), False, (32, 64)), CRF(3, gt_prob=0.9), tile=99, confidence=True)]


def test_epochs_smoothing_and_validation_of_the_last_model(folder_root, folder, tmp_path, monkeypatch):
    """Two passes over three images in three epochs of two: each image twice. Pseudo masks are learnt, not scored."""
    folder("segmentation")
    for image_id in SIZES:
        save_mask(tmp_path / "pseudo" / f"{image_id}.png", np.full(SIZES[image_id], 1), voc_palette())
    smoothing, ids, scored = [], [], []

    def step(model, batch, device, label_smoothing):
        assert model.training, "also after validation"
        smoothing.append(label_smoothing)
        ids.extend(batch["id"])
        return {"loss": sum(p.sum() for p in model.parameters() if p.requires_grad)}

    monkeypatch.setattr(train_segmentation, "train_step", step)

    def validate(model, source, domain, device, long_side):
        assert long_side == (32, 48)
        model.eval()
        scored.append(source.mask("b"))
        return {}

    monkeypatch.setattr(train_segmentation, "validate", validate)
    flags = [*data_flags(folder_root), *TRAINING, *DECODER, "--max_epoch", 3, "--label_smoothing", 0.3]
    run("train_segmentation", "--tag", "t", *flags, "--masks_dir", tmp_path / "pseudo", "--domain_valid", "val")
    assert smoothing == [0.3] * 3 and sorted(ids) == sorted([*SPLITS["train"]] * 2)
    np.testing.assert_array_equal(scored[0], load_mask(folder_root / "masks" / "b.png"))


# -- pseudo masks --------------------------------------------------------------------------------------------------
class OnePhotograph:
    """A source of the golden photograph."""

    info = DatasetInfo(classes=("background", *"abcdefgh"[: len(SOFTMAX) - 1]))

    def photograph(self, image_id: str) -> torch.Tensor:
        return golden_image(0)

    def has_label(self, image_id: str) -> bool:
        return False

    def fingerprints(self, ids, *, labels: bool = False) -> dict[str, dict]:
        return {"photographs": {}}


def pseudo_mask(tmp_path, iterations: int, **crf) -> np.ndarray:
    """The pseudo mask at threshold .6 of CAMs that are .9 on the golden labels and .5 elsewhere."""
    keys = np.arange(len(SOFTMAX))
    cams = np.where(keys[1:, None, None] == LABELS, 0.9, 0.5)
    save_cams(tmp_path / "cams" / "a.npz", keys, cams[:, ::4, ::4], cams)
    wanted = ("cams", "pseudos")
    settings = CRF(iterations=iterations, **crf)
    outputs = inference.Outputs(wanted, "npz", WHOLE, "present", True, "cams", 0.6, False, settings)
    predict = inference.Predictor(nn.Linear(1, 1), OnePhotograph(), tmp_path, outputs)
    predict("a")
    return load_mask(predict.path("pseudos", "a"))


def test_pseudo_masks_are_refined_as_the_golden_labels(tmp_path):
    expected = GOLDEN["q_labels_gt0.7_g3-3_b50-5-10_t10_0"].argmax(axis=0)
    assert agreement(pseudo_mask(tmp_path, 10), expected) > 0.9999 > agreement(LABELS, expected)


def test_pseudo_masks_are_refined_with_the_confidence_of_the_flag(tmp_path):
    unary = unary_from_labels(torch.from_numpy(LABELS)[None].long(), len(SOFTMAX), 0.97)
    expected = mean_field(golden_image(0), unary, CAM_SETTINGS, 10)[0].argmax(dim=0)
    assert agreement(pseudo_mask(tmp_path, 10, gt_prob=0.97), expected) > 0.9999
    assert agreement(pseudo_mask(tmp_path / "default", 10), expected) < 0.999


def test_a_large_photograph_is_reduced_for_network_and_crf_and_its_pseudo_mask_enlarged(tmp_path, monkeypatch):
    """To half its size."""
    height, width = LABELS.shape
    monkeypatch.setattr("tools.cam.WORKING_SIDE", max(height, width) // 2)
    monkeypatch.setattr("test_joints.WHOLE", Views((1.0,), False, (0, 1)))
    small = (height // 2, width // 2)
    photograph = F.interpolate(golden_image(0), small, mode="bilinear", antialias=True)
    maps = torch.from_numpy(np.where(np.arange(1, len(SOFTMAX))[:, None, None] == LABELS, 0.9, 0.5)).half().float()
    maps = F.interpolate(maps[None], small, mode="bilinear", align_corners=True)
    labels = F.pad(maps, (0, 0, 0, 0, 1, 0), value=0.6).argmax(dim=1)
    q = mean_field(photograph, unary_from_labels(labels, len(SOFTMAX)), CAM_SETTINGS, 10)
    expected = F.interpolate(q, (height, width), mode="bilinear", align_corners=True)[0].argmax(dim=0)
    assert agreement(pseudo_mask(tmp_path, 10), expected) > 0.999
    seen = []
    monkeypatch.setattr(inference, "multi_scale_cams", lambda forward, image, *rest, size: seen.append((image, size)))
    monkeypatch.setattr(inference, "cam_forward", lambda model: None)
    monkeypatch.setattr(OnePhotograph, "image_label", lambda self, image_id: np.ones(2, np.float32), raising=False)
    outputs = inference.Outputs((), "npz", WHOLE, "present", True, "cams", 0.6, False, CRF())
    inference.Predictor(nn.Linear(1, 1), OnePhotograph(), tmp_path, outputs)._maps("cams", golden_image(0), "a")
    ((image, size),) = seen
    assert size == (height, width)
    torch.testing.assert_close(image, normalized(photograph.float()))


def test_pseudo_masks_are_cut_at_the_threshold(tmp_path):
    assert agreement(pseudo_mask(tmp_path, 0), LABELS) == 1


@pytest.mark.parametrize("wanted", [("pseudos",), ("cams", "pseudos")])
def test_pseudo_masks_are_the_same_whether_their_maps_are_written(tmp_path, monkeypatch, wanted):
    """The CAM is above the threshold, but not as float16, which files hold."""
    cams = np.full((1, 3, 4), 0.40001, np.float32)
    monkeypatch.setattr(inference.Predictor, "_maps", lambda *args: (np.arange(2), cams, cams))
    outputs = inference.Outputs(wanted, "npz", WHOLE, "present", True, "cams", 0.4, False, CRF(iterations=0))
    predict = inference.Predictor(nn.Linear(1, 1), OnePhotograph(), tmp_path, outputs)
    predict("a")
    assert not load_mask(predict.path("pseudos", "a")).any()


def test_pseudo_masks_are_cut_at_the_threshold_of_the_flag(folder_root, folder):
    folder("pseudos")
    torch.manual_seed(0)
    write_checkpoint("t", "classifier")
    flags = ["--domain", "train", "--scales", 1, "--crf_t", 0, "--threshold", 0.8, "--num_workers", 0]
    run("inference", *data_flags(folder_root), "--tag", "t", *flags)
    shares = []
    for image_id in SPLITS["train"]:
        keys, _, cams = load_cams(f"experiments/predictions/t@train/cams/{image_id}.npz")
        best, mask = cams.max(axis=0), load_mask(f"experiments/predictions/t@train/pseudos-t0.8-c0/{image_id}.png")
        np.testing.assert_array_equal(mask, np.where(best > 0.8, keys[1:][cams.argmax(axis=0)], 0))
        shares.append(((best > 0.4) & (best < 0.8)).mean())
    assert max(shares) > 0.1  # another threshold would be another mask


def test_what_is_kept_of_an_inference_follows_the_flags(folder_root, folder, monkeypatch):
    folder("outputs")
    write_checkpoint("t", "csrm")
    seen, sample = [], []
    monkeypatch.setattr(inference.Predictor, "__call__", lambda self, image_id: seen.append(self.outputs) or False)
    monkeypatch.setattr(inference, "auto_threshold", lambda cams_of, ids, skip: sample.append(ids) or 0.25)
    flags = ["--scales", "0.5,1", "--hflip", "false", "--crf_t", 3, "--crf_gt_prob", 0.9, "--num_workers", 0]
    flags += ["--save_masks", "--cam_format", "npy", "--threshold", "auto"]
    run("inference", *data_flags(folder_root), "--tag", "t", "--domain", "val", *flags)
    assert sample == [SPLITS["val"]]
    views, crf = Views((0.5, 1.0), False, (32, 64)), CRF(iterations=3, gt_prob=0.9)
    assert seen[0] == inference.Outputs(
        ("cams", "masks", "pseudos"), "npy", views, "present", True, "cams", 0.25, True, crf
    )


def test_only_pseudo_masks_are_to_be_refined_next(folder_root, folder, capsys):
    """A run that makes none names no folder of them."""
    folder("next")
    write_checkpoint("t", "classifier")
    flags = ["--domain", "val", "--scales", 1, "--crf_t", 0, "--num_workers", 0]
    run("inference", *data_flags(folder_root), "--tag", "t", *flags, "--save_pseudos", "false")
    printed = capsys.readouterr().out
    assert "cams: experiments/predictions/t@val/cams" in printed and "Next" not in printed and "pseudos" not in printed
    run("inference", *data_flags(folder_root), "--tag", "t", *flags)
    folder = "experiments/predictions/t@val/pseudos-t0.4-c0"
    assert (
        f"Next: python refine_sam.py --tag t --domain val --pseudo_dir {folder} --proposals regions --d"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("reading", options.READINGS)
def test_an_image_without_classes_has_no_maps_of_the_segmentation_branch(reading):
    keys, low, high = inference.segmentation_maps(torch.randn(1, 4, 5, 6), torch.zeros(3), (9, 8), reading)
    assert keys.tolist() == [0] and low.shape == (0, 3, 2) and high.shape == (0, 9, 8)


@pytest.mark.parametrize("reading", ["present", "foreground"])
def test_maps_of_the_segmentation_branch_pixel_by_pixel(reading):
    """An image of classes 1 and 3 of three; the sum of what is not background is shared by the two."""
    logits, label = torch.randn(1, 4, 5, 6), torch.tensor([1.0, 0, 1])
    keys, low, high = inference.segmentation_maps(logits, label, (5, 6), reading)
    assert keys.tolist() == [0, 1, 3] and low.shape == (2, 2, 2)
    for y, x in itertools.product(range(5), range(6)):
        odds = logits[0, :, y, x].double().exp()
        shares = odds[[1, 3]] / odds[[1, 3]].sum()
        foreground = odds[[1, 3]].sum() / odds[[0, 1, 3]].sum() if reading == "present" else odds[1:].sum() / odds.sum()
        np.testing.assert_allclose(high[:, y, x], shares * foreground, atol=1e-5)


@pytest.mark.parametrize("graded", [False, True])
def test_relative_maps_are_divided_each_by_its_maximum(graded):
    maps = np.zeros((2, 4, 9), np.float16)
    maps[0, :, 3:6], maps[1, :, 6:] = 0.1, 0.9
    labels = inference.segmentation_labels(maps, "relative", graded=graded)
    np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], 3)[None].repeat(4, axis=0))


def test_the_reading_is_that_of_the_training():
    csrm, segmentation = {"kind": "csrm"}, {"kind": "segmentation"}
    assert inference.reading({"config": csrm, "args": {"teacher_labels": "foreground"}}) == "foreground"
    assert inference.reading({"config": csrm, "args": {}}) == "present"
    assert inference.reading({"config": segmentation, "args": {}}) == "relative"


# -- CSRM ----------------------------------------------------------------------------------------------------------
def test_the_losses_get_the_image_labels_after_mixing(monkeypatch):
    """Masks of one class each: what is pasted covers all, so the mask's class is the partner's, and a label too.

    The signals of `health` are of the class logits before mixing, and so of those labels.
    """
    step = Step("--c2s_mode", "gt", "--augment", "classmix", "--cutmix_prob", 1)
    step.batch.masks.copy_(torch.tensor([1, 2, 3, 1])[:, None, None])
    step.batch.image_labels.copy_(torch.eye(NUM_CLASSES - 1)[[0, 1, 2, 0]])
    taught, observed = [], []
    step.criterion.register_forward_pre_hook(lambda module, inputs: taught.append(inputs[2]))
    monkeypatch.setattr(step.criterion, "observe", lambda targets, logits, labels: observed.append(labels))
    step()
    (targets,) = taught
    assert torch.equal(observed[0], step.batch.image_labels)
    painted = targets.cam_labels[:, 0, 0]
    assert (targets.image_labels[torch.arange(2), painted - 1] == 1).all()
    assert (targets.image_labels.sum(dim=1) == 2).any()


def test_student_and_teacher_see_the_mixed_images():
    """Masks of one class each, or of none: an image gets all of its partner, or is its own."""
    step = Step("--c2s_mode", "gt", "--augment", "classmix", "--cutmix_prob", 1)
    classes = torch.tensor([1, 2, 3, 0])
    step.batch.masks.copy_(classes[:, None, None])
    seen, taught = {"student": [], "teacher": []}, []
    for name, module in (("student", step.student), ("teacher", step.teacher.module)):
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen[name].append(inputs[0]))
    step.criterion.register_forward_pre_hook(lambda module, inputs: taught.append(inputs[2]))
    step()
    (targets,) = taught
    partners = [int((classes == c).nonzero()) for c in targets.cam_labels[:, 0, 0]]
    assert partners != [0, 1]
    images = normalized(step.batch.images.float())
    torch.testing.assert_close(seen["student"][0][:2], images[partners])
    torch.testing.assert_close(seen["teacher"][0], images)
    torch.testing.assert_close(seen["teacher"][1], seen["student"][0])
    with torch.no_grad():
        logits = F.interpolate(step.teacher(images)["seg_logits"], (48, 48), mode="bilinear", align_corners=True)
    absent = F.pad(targets.image_labels[:2], (1, 0), value=1) == 0
    probabilities = logits[partners].masked_fill(absent[:, :, None, None], -torch.inf).softmax(dim=1)
    assert agreement(targets.teacher_labels[:2], probabilities.argmax(dim=1)) > 0.999
    torch.testing.assert_close(targets.confidence[:2], probabilities.amax(dim=1), atol=1e-4, rtol=0)


def test_cam_labels_follow_the_flags():
    step = Step("--c2s_bg", 0.2, "--c2s_fg", 0.5, "--crf_t", 2, "--crf_gt_prob", 0.9)
    cams = torch.rand(4, NUM_CLASSES - 1, 6, 6)
    found = train_csrm.pixel_labels(step.batch, {"cams": cams}, slice(None), step.labels)
    images, labels = step.batch.images, step.batch.image_labels
    expected = reliable_cam_labels(images, cams, labels, 0.2, 0.5, gt_prob=0.9, crf_iterations=2)
    assert torch.equal(found, expected) and len(expected.unique()) > 2
    assert not torch.equal(expected, reliable_cam_labels(images, cams, labels, 0.2, 0.5, crf_iterations=2))


def test_labels_against_the_background_follow_the_flag():
    step = Step("--c2s_mode", "mp", "--c2s_sigma", 0.4)
    cams, logits = torch.rand(4, NUM_CLASSES - 1, 6, 6), torch.randn(4, NUM_CLASSES, 12, 12)
    found = train_csrm.pixel_labels(step.batch, {"cams": cams, "seg_logits": logits}, slice(1, 3), step.labels)
    background = F.interpolate(logits, (48, 48), mode="bilinear", align_corners=True).softmax(dim=1)[1:3, 0]
    expected = mutual_promotion_labels(background, cams[1:3], step.batch.image_labels[1:3], 0.4)
    assert torch.equal(found, expected) and len(expected.unique()) > 2


@pytest.fixture
def gradients(tmp_path):
    """A `folder` dataset of two photographs that get brighter from left to right: one of 48 pixels, one of 96."""
    (tmp_path / "gradients" / "images").mkdir(parents=True)
    for name, side in (("small", 48), ("large", 96)):
        picture = np.linspace(0, 255, side).astype(np.uint8)[None, :, None].repeat(side, 0).repeat(3, 2)
        Image.fromarray(picture).save(tmp_path / "gradients" / "images" / f"{name}.png")
    (tmp_path / "gradients" / "labels.csv").write_text("id,labels\nsmall,cat\nlarge,cat\n")
    (tmp_path / "gradients" / "classes.txt").write_text("background\ncat\n")
    return tmp_path / "gradients"


def test_geometry_of_the_two_halves(gradients):
    """Crops of 48 pixels. Labeled: scaled and mirrored. Unlabeled: as it is, if need be reduced."""
    args = parse("train_csrm", "--tag", "t", *data_flags(gradients), *TRAINING, "--max_steps", 20)
    halves = train_csrm.build_loaders(build_source("folder", gradients), args)
    labeled, unlabeled = (torch.cat([batch["image"] for batch in half])[:, 0].float() for half in halves)
    plain = torch.linspace(0, 255, 48).expand(48, 48)
    assert all((image - plain).abs().max() < 6 for image in unlabeled)
    rising = (labeled.diff(dim=2).mean(dim=(1, 2)) > 0).float().mean()
    assert 0.2 < rising < 0.8
    steepness = labeled.diff(dim=2).abs().mean(dim=(1, 2)) / plain.diff(dim=1).mean()
    assert steepness.min() < 0.85 and steepness.max() > 1.2


def test_small_photographs_are_enlarged_to_the_smallest_size_first(gradients):
    """From 16 to 32 pixels, --min_image_size. The labeled half is then scaled by 2/3 to 4/3; crops are padded."""
    args = parse("train_csrm", "--tag", "t", *data_flags(gradients), *TRAINING, "--max_steps", 20)
    for name in ("small", "large"):
        picture = np.linspace(0, 255, 16).astype(np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2)
        Image.fromarray(picture).save(gradients / "images" / f"{name}.png")
    halves = train_csrm.build_loaders(build_source("folder", gradients), args)
    labeled, unlabeled = (torch.cat([batch["image"] for batch in half])[:, 0].float() for half in halves)
    steps = [half.diff(dim=2).abs().mean(dim=1).median(dim=1).values * 32 / 255 for half in (labeled, unlabeled)]
    assert 0.7 < steps[0].min() < 0.9 and 1.2 < steps[0].max() < 1.6
    assert (steps[1] - 1).abs().max() < 0.1


def test_geometry_of_the_last_model(gradients):
    """The long side becomes 32 to 64 pixels; a crop of 48 is mirrored."""
    for name, side in (("small", 48), ("large", 96)):
        save_mask(gradients / "masks" / f"{name}.png", np.ones((side, side)), voc_palette())
    args = parse("train_segmentation", "--tag", "t", *data_flags(gradients), *TRAINING)
    dataset, _ = train_segmentation.training_data(build_source("folder", gradients), args)
    torch.manual_seed(0)
    images = torch.stack([dataset[index % 2]["image"][0].float() for index in range(40)])
    rising = (images.diff(dim=2).mean(dim=(1, 2)) > 0).float().mean()
    assert 0.2 < rising < 0.8
    steepness = images.diff(dim=2).abs().mean(dim=(1, 2)) * 48 / 255
    assert 0.7 < steepness.min() < 0.85 and 1.2 < steepness.max() < 1.55


class Recorded:
    """What the steps of a run were given, in place of the steps."""

    def __init__(self) -> None:
        self.steps, self.decays, self.validated, self.observed = [], [], [], []

    def step(self, batch, student, teacher, criterion, labels, epoch, observed):
        self.steps.append((batch, labels, criterion.options, epoch))
        self.observed.append(observed)
        self.teacher = teacher.module
        return {"loss": sum(p.sum() for p in student.parameters() if p.requires_grad)}


@pytest.fixture
def csrm(folder_root, folder, tmp_path, monkeypatch):
    """Three epochs of two images of three, and of one update, on labels from elsewhere that are all of class 2."""
    folder("csrm")
    for image_id in SPLITS["train"]:
        save_mask(tmp_path / "labels" / f"{image_id}.png", np.full(SIZES[image_id], 2), voc_palette())
    recorded = Recorded()
    monkeypatch.setattr(train_csrm, "PhotometricAugmentation", lambda: lambda images: torch.full_like(images, 7))
    monkeypatch.setattr(train_csrm, "train_step", recorded.step)
    monkeypatch.setattr(train_csrm.Health, "add_gradients", lambda self, losses, backbone: None)
    monkeypatch.setattr(train_csrm, "report_health", lambda health, trainer, epoch: None)
    monkeypatch.setattr(train_csrm, "validate", lambda model, *rest: recorded.validated.append((model, *rest)) or {})
    monkeypatch.setattr(Teacher, "update", lambda self, student, decay: recorded.decays.append(decay))
    flags = [*TRAINING, *DECODER, "--max_epoch", 3, *MAX_STEPS, "--accumulate_steps", 2, "--domain_valid", "val"]
    flags += [
        "--c2s_labels",
        tmp_path / "labels",
        "--c2s_bg",
        0.2,
        "--c2s_fg",
        0.6,
        "--seed",
        1,
        "--contra_low_rank",
        2,
    ]
    run("train_csrm", *data_flags(folder_root), "--tag", "t", *flags)
    return recorded


def test_batches_of_csrm(csrm):
    """Six steps of two: each half four passes over the three images, in its own order."""
    ids = [[i for batch, *_ in csrm.steps for i in batch.ids[half]] for half in (slice(2), slice(2, 4))]
    assert all(sorted(half) == sorted([*SPLITS["train"]] * 4) for half in ids) and ids[0] != ids[1]
    assert all((batch.images[:2] == 7).all() and (batch.images[2:] != 7).any() for batch, *_ in csrm.steps)
    assert all(set(batch.masks.unique().tolist()) <= {2, 255} for batch, *_ in csrm.steps)
    assert [epoch for *_, epoch in csrm.steps] == [0, 0, 1, 1, 2, 2]
    assert csrm.observed == [True, False] * 3, "every fifth batch of an epoch"


def test_options_of_csrm_and_its_teacher(csrm, folder_root):
    _, labels, criterion, _ = csrm.steps[0]
    assert (labels.c2s_thresholds, labels.c2s_mode) == (None, "gt")
    assert (criterion.contra_low_rank, criterion.contra_high_rank) == (2, 6)
    assert (criterion.warmup_epochs, criterion.max_epoch) == (1, 3)
    assert csrm.decays == [0, 0, pytest.approx(1 - 1 / (1 + 2))], "two updates after the warm-up of one"
    model, source, domain, _, size = csrm.validated[0]
    assert model is csrm.teacher and (domain, size) == ("val", (32, 48))
    assert source.mask_path("b") == folder_root / "masks" / "b.png", "not the labels that are learnt"


# -- the prior -----------------------------------------------------------------------------------------------------
def test_progress_and_average_of_a_classifier(folder_root, folder, monkeypatch):
    folder("prior")
    progress, ids, decays, validated = [], [], [], []

    def step(criterion, model, sample, at):
        assert (criterion.w_re, criterion.label_smoothing) == (3, 0.2)
        assert torch.equal(sample.hidden.sum(dim=1), sample.labels.amax(dim=1)), "one class of each image"
        progress.append(at)
        return {"loss": sum(p.sum() for p in model.parameters() if p.requires_grad)}

    note = training.Trainer.batches
    monkeypatch.setattr(PriorCriterion, "__call__", step)
    monkeypatch.setattr(
        training.Trainer, "batches", lambda *args: (ids.extend(batch["id"]) or batch for batch in note(*args))
    )
    monkeypatch.setattr(train_classifier, "validate", lambda model, *rest: validated.append(model) or {})
    monkeypatch.setattr(Teacher, "update", lambda self, student, decay: decays.append((self.module, decay)))
    flags = [*TRAINING, "--max_epoch", 3, *MAX_STEPS, "--ema", 0.6, "--domain_valid", "val"]
    flags += ["--w_re", 3, "--label_smoothing", 0.2]
    run("train_classifier", *data_flags(folder_root), "--tag", "t", *flags)
    assert progress == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert sorted(ids) == sorted([*SPLITS["train"]] * 4)
    assert [decay for _, decay in decays] == [0.5, *[0.6] * 5] and validated[0] is decays[0][0]


def test_the_balanced_sampler_draws_classes_not_images(folder_root):
    """Cat: a, b; dog: b, c."""
    args = parse("train_classifier", "--tag", "t", *data_flags(folder_root), *TRAINING, "--sampler", "balanced")
    loader = train_classifier.build_training_loader(build_source("folder", folder_root), args)
    assert loader.sampler.weights.tolist() == [0.25, 0.5, 0.25]


def test_colour_jitter_changes_colours_and_only_on_request():
    images, labels = torch.full((16, 3, 9, 9), 100, dtype=torch.uint8), torch.ones(16, 1)
    images[:, 0], images[..., 5:] = 180, 60
    plain = train_classifier.augmented(images, labels, [], 1.0).images
    torch.testing.assert_close(plain, normalized(images))
    jittered = train_classifier.augmented(images, labels, ["colorjitter"], 1.0).images
    assert ((jittered - plain).abs().amax(dim=(1, 2, 3)) > 0.02).sum() >= 6
    for half in (jittered[..., :5], jittered[..., 5:]):  # nothing is blurred
        assert torch.equal(half, half[..., :1, :1].expand_as(half))


@pytest.mark.parametrize("names", ["none", "colorjitter,cutmix", "randaugment"])
def test_randaugment_only_on_request(gradients, names):
    for path in (gradients / "images").iterdir():
        Image.new("RGB", (64, 64), (100, 100, 100)).save(path)
    args = parse("train_classifier", "--tag", "t", *data_flags(gradients), *TRAINING, "--max_steps", 8)
    args.augment = train_classifier.augmentations(names)
    loader = train_classifier.build_training_loader(build_source("folder", gradients), args)
    assert all((batch["image"] == 100).all() for batch in loader) == (names != "randaugment")


def test_cutmix_pastes_a_rectangle_and_mixup_blends():
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 32, 32)
    labels, levels = torch.eye(2), normalized(images.float())[:, :, 0, 0]
    torch.manual_seed(0)
    for name, number in (("cutmix", 2), ("mixup", 1)):
        sample = train_classifier.augmented(images, labels, [name], 1.0)
        assert [len(image[0].unique()) for image in sample.images] == [number, number]
        shares = (sample.images.mean(dim=(2, 3)) - levels[0]) / (levels[1] - levels[0])  # of the second image
        torch.testing.assert_close(shares, sample.labels[:, 1:].expand(2, 3), atol=1e-5, rtol=0)
    plain = train_classifier.augmented(images, labels, ["cutmix", "mixup"], 0.0)
    assert torch.equal(plain.labels, labels)
    torch.testing.assert_close(plain.images, normalized(images.float()))


# -- gradients and weights -----------------------------------------------------------------------------------------
class Weight(nn.Module):
    """One weight and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.pretrained = {"layer"}

    def step(self, update: Update) -> None:
        self.requires_grad_()
        update.backward(self.layer.weight.sum())
        update.step()


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_long_gradient_is_cut_and_batches_are_averaged(dtype):
    model = Weight()
    before = model.layer.weight.item()
    run = Optimization("sgd", 0.1, 0.0, momentum=0.0, nesterov=False, grad_max_norm=3.0, accumulate_steps=2)
    update = Update(model, run, updates=10, dtype=dtype)
    for factor in (3, 1):  # a mean of 2
        update.backward(factor * model.layer.weight.sum())
    update.step()
    assert model.layer.weight.item() == pytest.approx(before - 0.1 * 2, abs=1e-4)
    for factor in (30, 10):
        update.backward(factor * model.layer.weight.sum())
    update.step()
    assert model.layer.weight.item() == pytest.approx(before - 0.1 * 2 - 0.1 * 0.9**0.9 * 3, abs=1e-4)


def test_half_precision_scales_its_losses_and_goes_on_with_the_scale():
    """A gradient of 2^-30 is 0 in half precision; a scale that is too large is halved."""
    run = Optimization("sgd", 2.0**30, 0.0, momentum=0.0, nesterov=False, lr_poly_power=0.0, grad_max_norm=0.0)
    model = Weight()
    first, resumed = (Update(model, run, updates=10, dtype=torch.float16) for _ in range(2))
    before = model.layer.weight.item()
    first.backward(model.layer.weight.half().sum().float() * 2.0**-30)
    first.step()
    assert model.layer.weight.item() == pytest.approx(before - 1, abs=1e-4)
    scale = first.scaler.get_scale()
    first.backward(model.layer.weight.sum() * torch.inf)
    first.step()
    resumed.load_state_dict(first.state_dict())
    assert resumed.scaler.get_scale() == first.scaler.get_scale() == scale / 2


def test_the_ordinary_classifier_of_pnoc_goes_on_at_its_learning_rate():
    options = Optimization("sgd", 0.1, 0.0)
    first, resumed = (Opponent(Weight(), options, label_smoothing=0.1, updates=4, dtype=None) for _ in range(2))
    for _ in range(3):
        first.model.step(first.update)
    resumed.load_state_dict(first.state_dict())
    assert resumed.update.schedule.get_last_lr()[0] == pytest.approx(0.1 * 0.25**0.9)
    for each in (first, resumed):
        each.model.step(each.update)
    assert resumed.update.schedule.get_last_lr() == first.update.schedule.get_last_lr()


@pytest.mark.parametrize(("channels", "expected"), [(1, [6]), (2, [3, 3]), (3, [2, 2, 2]), (5, [1] * 6), (9, [1] * 6)])
def test_chunks_are_of_as_many_values_as_allowed(monkeypatch, channels, expected):
    monkeypatch.setattr(losses, "CHUNK_VALUES", 6 * 4 * 5)
    assert [len(range(6)[part]) for part in losses.chunks(6, channels, (4, 5))] == expected


@pytest.mark.parametrize("script", ["train_classifier", "train_csrm", "train_segmentation"])
def test_a_training_starts_from_the_weights_of_restore(folder_root, folder, script):
    """A step of no length keeps them. Those of a class go to the class of that name."""
    folder("restored")
    torch.manual_seed(0)
    kind = {"train_classifier": "classifier", "train_csrm": "csrm", "train_segmentation": "segmentation"}[script]
    path = write_checkpoint("start", kind, classes=["background", "dog", "cat"])
    weights = torch.load(path, weights_only=True)["model"]
    for output, rows in {"classifier.weight": [1, 0], **dict.fromkeys(DECODED, [0, 2, 1])}.items():
        if output in weights:
            weights[output] = weights[output][rows]
    decoder = [] if kind == "classifier" else DECODER
    flags = [*data_flags(folder_root), *TRAINING, *decoder, "--lr", 1e-30, "--crf_t", 0][: None if decoder else -2]
    run(script, *flags, "--tag", "t", "--restore", "experiments/models/start.pth", "--mode", "fix")
    trained = torch.load("experiments/models/t.pth", weights_only=True)["model"]
    assert all(torch.allclose(trained[name], tensor) for name, tensor in weights.items())


# -- flags ---------------------------------------------------------------------------------------------------------
def test_every_flag_of_the_optimisation_counts():
    flags = ["--optimizer", "momentum", "--lr", 0.5, "--wd", 0.2, "--momentum", 0.7, "--nesterov", "false"]
    flags += ["--lr_alpha_scratch", 3, "--lr_alpha_bias", 4, "--lr_poly_power", 0.6, "--grad_max_norm", 5]
    args = parse("train_classifier", "--tag", "t", *flags, "--accumulate_steps", 6)
    expected = Optimization("momentum", 0.5, 0.2, 0.7, False, 3.0, 4.0, 0.6, 5.0, 6)
    assert options.training(args, {}).optimization == expected
    model = Weight()
    update = Update(model, expected, updates=4, dtype=None)
    model.step(update)
    assert update.schedule.get_last_lr()[:2] == pytest.approx([0.5 * 0.75**0.6, 4 * 0.5 * 0.75**0.6])


def test_every_flag_of_the_network_counts():
    flags = ["--architecture", "resnet18", "--backbone_weights", "none", "--mode", "normal", "--dilated"]
    flags += ["--dilate_stage4", "false", "--trainable_stem", "--trainable_stage4", "false"]
    flags += ["--trainable_backbone", "false", "--use_gn", "false", "--dropout", 0.2, "--decoder_channels", 12]
    assert options.network_arguments(parse("train_csrm", "--tag", "t", *flags)) == {
        "architecture": "resnet18",
        "weights": "none",
        "batch_norm": "normal",
        "output_stride": 8,
        "dilate_stage4": False,
        "trainable_stem": True,
        "trainable_stage4": False,
        "trainable_backbone": False,
        "use_gn": False,
        "dropout": 0.2,
        "decoder_channels": 12,
    }
    assert options.network_arguments(parse("train_csrm", "--tag", "t"))["output_stride"] == 16


@pytest.mark.parametrize("proposals", ["sam", "sam2"])
def test_every_flag_of_sam_counts(monkeypatch, proposals):
    made = lambda *model, **running: lambda images: (*model, running)  # noqa: E731
    for name, load in (("MaskGenerator", "load_sam"), ("LaterMaskGenerator", "load_later_sam")):
        monkeypatch.setattr(refine_sam, name, made)
        monkeypatch.setattr(refine_sam, load, lambda *args: args)
    values = {"points_per_side": 3, "pred_iou_thresh": 0.4, "stability_score_thresh": 0.5, "box_nms_thresh": 0.6}
    values |= {"crop_n_layers": 1, "min_mask_region_area": 7}
    running = {"points_per_batch": 9, "images_per_batch": 8}
    flags = [part for name, value in {**values, **running}.items() for part in (f"--{name}", value)]
    flags += ["--checkpoint", "sam.pth", "--model_type", "vit_l", "--device", "cpu", "--mixed_precision", "bf16"]
    flags += ["--proposals", proposals]
    backend = refine_sam.select_backend(parse("refine_sam", "--tag", "t", *flags))
    *model, sought, given = backend.build()([], [])
    assert backend.images_per_call == 8 and vars(sought) == values
    running |= {"dtype": torch.bfloat16}
    if proposals == "sam":
        assert model == [(Path("sam.pth"), "vit_l", torch.device("cpu"))] and given == running | {"compile": False}
    else:
        assert model == ["sam.pth", "sam2", torch.device("cpu")] and given == running
    assert backend.settings.items() >= values.items()


def test_every_flag_of_merging_counts(monkeypatch):
    rules = []
    monkeypatch.setattr(refine_sam, "merge", lambda rule, *rest: rules.append(rule))
    for name in ("build_source", "check_present", "check_shown", "merged_identity"):
        monkeypatch.setattr(refine_sam, name, lambda *args, **kwargs: OnePhotograph())
    monkeypatch.setattr(refine_sam.identity, "claim_folder", lambda *args, **kwargs: None)
    monkeypatch.setattr(refine_sam.parallel, "share", lambda *args, **kwargs: [])
    monkeypatch.setattr(refine_sam.LeftOut, "finish", lambda *args: None)
    monkeypatch.setattr(OnePhotograph, "ids", lambda self, domain: [], raising=False)
    flags = ["--mode", "max_iou_imp", "--order", "largest_overlap", "--inside_threshold", 0.3]
    flags += ["--recall_threshold", 0.6, "--keep_ignore", "--stage", "merge", "--pseudo_dir", "pseudos"]
    refine_sam.main(parse("refine_sam", "--tag", "t", *flags))
    assert rules == [refine_sam.Rule("max_iou_imp", "largest_overlap", 0.3, 0.6, True)]


def test_labels_of_windows(folder_copy):
    """A byte order mark before the header of labels.csv."""
    table = folder_copy / "labels.csv"
    table.write_bytes(b"\xef\xbb\xbf" + re.sub("\n", "\r\n", table.read_text()).encode())
    source = build_source("folder", folder_copy)
    assert source.image_labels(["a", "b", "c", "d"]).tolist() == [[1, 0], [1, 1], [0, 1], [0, 0]]


def test_folders_that_a_mac_has_copied(folder_copy, tmp_path, monkeypatch):
    """An é is one character in the lists, and two in the names of files."""
    monkeypatch.chdir(tmp_path)
    one, two = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for path in folder_copy.glob("*/a.*"):
        path.rename(path.with_stem(two))
    for name, line in (("labels.csv", "\na,"), ("splits/train.txt", "a\n")):
        text = (folder_copy / name).read_text().replace(line, line.replace("a", one), 1)
        (folder_copy / name).write_text(text)
    copied = shutil.copytree(folder_copy / "masks", tmp_path / "copied")
    (copied / f"{two}.json").write_text("[]")
    flags = [*data_flags(folder_copy), "--domain", "train"]
    run("evaluate", *flags, "--pred_dir", copied, "--output", "scores.json")
    assert json.loads(Path("scores.json").read_text())["miou"] == 100
    flags += ["--proposals", "regions", "--num_workers", 0, "--pseudo_dir", copied]
    run("refine_sam", *flags, "--tag", "t")
    proposals = (tmp_path / "experiments/predictions/t@train/proposals-regions").rename(tmp_path / "proposals")
    (proposals / f"{one}.json").rename(proposals / f"{two}.json")
    run("refine_sam", *flags, "--tag", "u", "--stage", "merge", "--proposals_dir", proposals)
    merged = [f"experiments/predictions/{tag}@train/sam-regions-max_iou_imp2" for tag in "tu"]
    first, second = ({path.name: path.read_bytes() for path in Path(place).glob("*.png")} for place in merged)
    assert len(first) == 3 and first == second
    assert label_files(copied, [one]) == {one: copied / f"{two}.png"}
    assert mask_file(copied, one) == copied / f"{two}.json"
    column = report.Column("", ((copied, 0.4),))
    assert column.file(one) == (copied / f"{two}.png", 0.4)
    (copied / f"{one}.png").touch()  # made here afterwards
    assert column.file(one) == (copied / f"{one}.png", 0.4)
