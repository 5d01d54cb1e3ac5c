"""One class and background, with images that show neither: negatives of L_c, which no other step may stumble over."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import DECODER, TRAINING, data_flags, run
from PIL import Image

import train_csrm
from datasets import build_source
from datasets.base import voc_palette
from models import load_model
from tools.cam_files import load_cams
from tools.files import load_mask, save_mask
from tools.maps import normalize

PREDICTIONS = Path("experiments/predictions")
CRF = ["--crf_t", "2", "--device", "cpu"]
VIEWS = ["--scales", "1", *CRF]
NEGATIVES = [f"background/{n}" for n in range(4)]
BIRDS = [f"bird/{n}" for n in range(4)]


def write_birds(root: Path) -> None:
    """Grey noise; a bird is a red square. Folders say what is in the photographs."""
    random = np.random.default_rng(0)
    for image_id in (*NEGATIVES, *BIRDS):
        image, mask = random.integers(90, 140, (40, 44, 3), dtype=np.uint8), np.zeros((40, 44), np.uint8)
        if image_id in BIRDS:
            image[10:26, 8:28], mask[10:26, 8:28] = (220, 60, 40), 1
        (root / "images" / image_id).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "images" / f"{image_id}.png")
        save_mask(root / "masks" / f"{image_id}.png", mask, voc_palette())


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """All stages, each as a user runs it; yields what CSRM's losses were given and gave, step by step."""
    steps = []
    forward = train_csrm.Criterion.forward

    def noted(self, student, teacher, targets, epoch):
        losses = forward(self, student, teacher, targets, epoch)
        steps.append((targets, {name: loss.item() for name, loss in losses.items()}))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("birds"))
        patch.setattr(train_csrm.Criterion, "forward", noted)
        write_birds(Path("data"))
        data, domain = data_flags(Path("data")), ["--domain", "train"]
        schedule = ["--optimizer", "adamw", "--lr_alpha_scratch", "1", "--trainable_stem", "--mode", "normal"]
        run("train_classifier", *data, "--tag", "prior", *TRAINING, *schedule, "--lr", "0.01", "--batch_size", "8",
            "--max_steps", "25", "--augment", "none")  # fmt: skip
        run("train_csrm", *data, "--tag", "csrm", *TRAINING, *DECODER, "--restore", "experiments/models/prior.pth",
            "--warmup_epochs", "0", "--max_steps", "12", "--batch_size", "1", "--lr", "0.0001")  # fmt: skip
        run("inference", *data, "--tag", "csrm", *domain, *VIEWS, "--save_masks", "--threshold", "auto")
        pseudos = PREDICTIONS / "csrm@train" / "pseudos-tauto-c2"
        run("refine_sam", *data, "--tag", "csrm", *domain, "--pseudo_dir", pseudos, "--proposals", "regions",
            "--num_workers", "0")  # fmt: skip
        refined = PREDICTIONS / "csrm@train" / "sam-regions-max_iou_imp2"
        run("train_segmentation", *data, "--tag", "deeplab", *TRAINING, *DECODER, "--masks_dir", refined)
        run("train_segmentation", *data, "--tag", "deeplab", "--predict", *domain, *VIEWS)
        for mode, folder in (("cams", "csrm@train/cams"), ("png", "deeplab@train/masks")):
            run("evaluate", *data, *domain, "--pred_dir", PREDICTIONS / folder, "--mode", mode,
                "--output", f"{mode}.json", "--num_workers", "0")  # fmt: skip
        run("report", *data, *domain, "--output_dir", "report", "--num_workers", "0", "--summary", "cams=cams.json",
            "--columns", f"CAM={PREDICTIONS}/csrm@train/cams:0.3", f"Refined={refined}")  # fmt: skip
        yield steps


def test_negatives_teach_the_prior_what_a_bird_is(chain):
    model, _ = load_model(Path("experiments/models/prior.pth"), torch.device("cpu"), kinds=["classifier"])
    source = build_source("folder", Path("data"))
    with torch.inference_mode():
        logit = {i: model(normalize(source.photograph(i)))["class_logits"].item() for i in source.ids("train")}
    assert min(logit[i] for i in BIRDS) > max(logit[i] for i in NEGATIVES)


def test_every_step_of_csrm_has_finite_losses_and_without_a_bird_no_c2s(chain):
    alone = 0
    for targets, losses in chain:
        assert np.isfinite(list(losses.values())).all() and set(losses) == {"loss", "c", "c2s", "s2c", "u", "contra"}
        bird = targets.image_labels[:, 0] > 0
        assert not targets.teacher_labels[~bird].any() and (targets.confidence[~bird] == 1).all()
        if not bird[0]:
            alone += 1
            assert not targets.cam_labels.any() and losses["c2s"] == 0
    assert 0 < alone < len(chain)
    assert any(not targets.image_labels.any() for targets, _ in chain), "a step with negatives only"


def test_negatives_get_no_maps_and_empty_masks_and_are_learnt_as_background(chain):
    for image_id in (*NEGATIVES, *BIRDS):
        keys, _, maps = load_cams(PREDICTIONS / "csrm@train" / "cams" / f"{image_id}.npz")
        assert keys.tolist() == ([0, 1] if image_id in BIRDS else [0]) and len(maps) == len(keys) - 1
        for folder in ("csrm@train/pseudos-tauto-c2", "csrm@train/sam-regions-max_iou_imp2"):
            assert load_mask(PREDICTIONS / folder / f"{image_id}.png").any() == (image_id in BIRDS)
    assert len(list((PREDICTIONS / "deeplab@train" / "masks").rglob("*.png"))) == 8


def test_scores_queue_and_page_have_them(chain):
    for name in ("cams", "png"):
        scores = json.loads(Path(f"{name}.json").read_text())
        assert list(scores["iou"]) == ["background", "bird"] and scores["images"] == 8
    painted_all_over = 100 * 320 / 1760  # a bird's photographs
    assert json.loads(Path("cams.json").read_text())["iou"]["bird"] > painted_all_over + 1
    with open("report/review.csv", newline="") as file:
        rows = {row["id"]: float(row["doubt"]) for row in csv.DictReader(file)}
    assert rows.keys() == {*NEGATIVES, *BIRDS} and all(rows[i] == 0 for i in NEGATIVES)
    assert "background/0</b> no class" in Path("report/report.html").read_text()
