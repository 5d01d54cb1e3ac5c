"""One whole step of the method from given network outputs: labels, five losses, their sum. Reads like the method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tools.losses import (
    IGNORE_INDEX,
    c2s_loss,
    entropy,
    multilabel_loss,
    resize_maps,
    s2c_loss,
    s2c_weight,
    unreliable_percent,
    unsupervised_loss,
)
from tools.memory_bank import MemoryBank, contrastive_loss, entropy_masks
from tools.pseudo_labels import reliable_cam_labels, teacher_labels

SMOOTHING = 0.1


@pytest.fixture(scope="module")
def golden():
    data = np.load(Path(__file__).parent / "golden" / "training_step.npz")
    return {name: torch.from_numpy(data[name]) for name in data.files}


@pytest.fixture(scope="module")
def cam_labels(golden):
    images = golden["images_u8"][:2].permute(0, 3, 1, 2).contiguous()
    return reliable_cam_labels(images, golden["teacher_cam_logits"][:2], golden["image_labels"][:2])


def test_cam_labels_of_the_labeled_half(golden, cam_labels):
    assert (cam_labels == golden["pseudo_masks_of_labeled_half"]).float().mean() >= 0.999


def losses_of_one_step(golden, cam_labels, epoch, max_epoch=15, warmup_epochs=1):
    half, size = 2, cam_labels.shape[-2:]
    image_labels, seg_logits = golden["image_labels"], golden["student_seg_logits"]
    losses = {
        "c": multilabel_loss(golden["student_class_logits"], image_labels, SMOOTHING),
        "c2s": c2s_loss(seg_logits[:half], cam_labels, SMOOTHING),
    }
    if epoch < warmup_epochs:
        return losses

    labels, confidence = teacher_labels(resize_maps(golden["teacher_seg_logits_for_labels"], size), image_labels)
    confident = labels.where(confidence > golden["s2c_sigma"], IGNORE_INDEX)
    losses["s2c"] = s2c_loss(golden["student_cam_logits"], seg_logits, confident, SMOOTHING)

    alpha = unreliable_percent(epoch, max_epoch)
    uncertain_logits = golden["teacher_seg_logits_for_uncertainty"]
    uncertainty = entropy(resize_maps(uncertain_logits[half:], size))
    losses["u"] = unsupervised_loss(seg_logits[half:], labels[half:], uncertainty, 100 - alpha)

    both = torch.cat([cam_labels, labels[half:]])
    small = F.interpolate(both[:, None].float(), uncertain_logits.shape[-2:])[:, 0].long()
    losses["contra"] = contrastive_loss(
        MemoryBank(num_classes=5, dim=16, queue_size=3000, background_queue_size=3000),
        golden["student_rep"],
        golden["teacher_rep"],
        small,
        uncertain_logits.softmax(dim=1),
        image_labels,
        *entropy_masks(entropy(uncertain_logits[half:]), small[half:], alpha),
        low_rank=golden["low_rank"].item(),
        high_rank=golden["high_rank"].item(),
    )
    return losses


@pytest.mark.parametrize("epoch", [0, 1, 3, 10])
def test_losses_golden(golden, cam_labels, epoch):
    losses = losses_of_one_step(golden, cam_labels, epoch)
    for name in ("c", "c2s", "s2c", "u", "contra"):
        assert float(losses.get(name, 0)) == pytest.approx(golden[f"loss_{name}_at_epoch_{epoch}"].item(), abs=1e-4)
    total = sum(loss * (s2c_weight(epoch, 15) if name == "s2c" else 1) for name, loss in losses.items())
    assert total.item() == pytest.approx(golden[f"loss_at_epoch_{epoch}"].item(), abs=1e-4)
