"""The losses against golden values, against plain loops, and where no pixel counts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from tools import losses
from tools.maps import resize_maps

GOLDEN = Path(__file__).parent / "golden"


def assert_zero_with_gradient(loss, leaf):
    loss.backward()
    assert loss == 0
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_multilabel_loss_is_mean_binary_cross_entropy_with_smoothed_labels():
    logits, labels = torch.randn(3, 5), (torch.rand(3, 5) > 0.5).float()
    targets = labels * 0.9 + 0.05
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(losses.multilabel_loss(logits, labels, 0.1), expected)


def test_c2s_uses_only_images_with_a_foreground_pixel():
    logits, labels = torch.randn(4, 3, 5, 7), torch.zeros(4, 5, 7, dtype=torch.long)
    labels[1, 0, 0] = 2
    labels[2, 1:] = 255
    labels[3, 2:, 3] = 1
    labels[3, 0] = 255
    expected = F.cross_entropy(logits[[1, 3]], labels[[1, 3]], ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(losses.c2s_loss(logits, labels, 0.1), expected)


@pytest.mark.parametrize("value", [0, 255])
def test_c2s_is_zero_without_foreground(value):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert_zero_with_gradient(losses.c2s_loss(logits, torch.full((2, 4, 4), value), 0.1), logits)


def test_s2c_trains_the_cams_and_not_the_segmentation_branch():
    cams = torch.randn(2, 3, 2, 2, requires_grad=True)
    seg_logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    labels = torch.randint(0, 4, (2, 5, 5))
    loss = losses.s2c_loss(cams, seg_logits, labels, 0.1)
    loss.backward()
    assert seg_logits.grad is None and cams.grad.abs().sum() > 0
    maps = [F.interpolate(x, (5, 5), mode="bilinear", align_corners=True) for x in (seg_logits[:, :1], cams)]
    torch.testing.assert_close(loss, F.cross_entropy(torch.cat(maps, 1), labels, label_smoothing=0.1))


def test_s2c_saliency_takes_the_place_of_the_background_and_learns():
    cams, seg_logits, labels = torch.randn(2, 3, 2, 2), torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 5, 5))
    saliency = torch.randn(2, 1, 3, 3, requires_grad=True)
    losses.s2c_loss(cams, seg_logits, labels, saliency=saliency).backward()
    assert saliency.grad.abs().sum() > 0
    as_background = torch.cat([saliency.detach(), seg_logits[:, 1:]], dim=1)
    expected = losses.s2c_loss(cams, as_background, labels)
    torch.testing.assert_close(losses.s2c_loss(cams, seg_logits, labels, saliency=saliency), expected)


@pytest.mark.parametrize("percentile", [80.0, 86.7, 93.3])
def test_unsupervised_loss_golden(percentile):
    data = np.load(GOLDEN / "unsupervised_loss.npz")
    logits, entropy = torch.from_numpy(data["logits"]), torch.from_numpy(data["teacher_entropy"])
    loss = losses.unsupervised_loss(logits, torch.from_numpy(data["targets"]).long(), entropy, percentile)
    assert loss.item() == pytest.approx(data[f"loss_percent_{percentile}"].item(), abs=1e-5)


@pytest.mark.parametrize("labels", [torch.full((2, 3, 3), 255), torch.zeros(2, 3, 3, dtype=torch.long)])
def test_unsupervised_loss_is_zero_where_nothing_is_kept(labels):
    logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    constant = torch.ones(2, 3, 3)  # no pixel lies below the percentile
    assert_zero_with_gradient(losses.unsupervised_loss(logits, labels, constant, 80.0), logits)


def test_cross_entropy_of_half_precision_logits_is_float32():
    logits = torch.randn(1, 3, 2, 2).half().requires_grad_()
    loss = losses.cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.long))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad.dtype == torch.half


@pytest.mark.parametrize("images_at_once", [1, 2, 5])
def test_cross_entropy_in_chunks_is_torchs_with_its_gradients(monkeypatch, images_at_once):
    """Maps of different sizes, each of some classes, are all enlarged to 9 x 8."""
    monkeypatch.setattr(losses, "CHUNK_VALUES", images_at_once * 5 * 9 * 8)
    maps = [torch.randn(5, 2, 3, 3, requires_grad=True), torch.randn(5, 3, 9, 8, requires_grad=True)]
    labels = torch.randint(0, 5, (5, 9, 8))
    labels[0], labels[3, :4] = 255, 255
    theirs = [m.detach().clone().requires_grad_() for m in maps]
    enlarged = [F.interpolate(m, (9, 8), mode="bilinear", align_corners=True) for m in theirs]
    expected = F.cross_entropy(torch.cat(enlarged, 1), labels, ignore_index=255, label_smoothing=0.1)
    loss = losses.cross_entropy(maps, labels, 0.1)
    torch.testing.assert_close(loss, expected)
    torch.autograd.backward([3 * loss, 3 * expected])
    for ours, other in zip(maps, theirs, strict=True):
        torch.testing.assert_close(ours.grad, other.grad)
    torch.testing.assert_close(losses.entropy(maps[1]), losses.entropy(maps[1].repeat(2, 1, 1, 1))[5:])


def test_cross_entropy_keeps_nothing_of_full_size(monkeypatch):
    """Where a batch needs several parts, the backward pass keeps the maps and the labels, nothing larger."""
    monkeypatch.setattr(losses, "CHUNK_VALUES", 3 * 64 * 64)
    maps, labels = torch.randn(4, 3, 2, 2, requires_grad=True), torch.zeros(4, 64, 64, dtype=torch.long)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses.cross_entropy(maps, labels, 0.1)
    assert not [t.shape for t in kept if t.is_floating_point() and t.numel() > maps.numel()]
    assert not losses.cross_entropy(maps.detach(), labels).requires_grad


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.booleans()), min_size=1, max_size=30), st.floats(0, 100))
def test_masked_percentile_is_numpys(entries, percentile):
    values, mask = (np.array(column) for column in zip(*entries, strict=True))
    ours = losses.masked_percentile(torch.from_numpy(values).float(), torch.from_numpy(mask), percentile)
    if mask.any():
        assert ours.item() == pytest.approx(np.percentile(values[mask], percentile), abs=1e-4)
    else:
        assert ours.isnan()


def test_entropy_of_uniform_and_certain_pixels():
    logits = torch.zeros(1, 4, 1, 2)
    logits[0, 1, 0, 1] = 200
    torch.testing.assert_close(losses.entropy(logits), torch.tensor([[[math.log(4), 0.0]]]))


def test_resize_maps_aligns_corners():
    maps = torch.tensor([[[[0.0, 2.0]]]]).half()
    assert resize_maps(maps, (1, 5)).tolist() == [[[[0.0, 0.5, 1.0, 1.5, 2.0]]]]


def test_s2c_weight_golden_and_warmup():
    expected = np.load(GOLDEN / "poly_lr.npz")["linear_schedule"]
    np.testing.assert_allclose([losses.s2c_weight(e, 15) for e in range(1, 15)], expected, atol=1e-7)
    assert losses.s2c_weight(0, 15) == 0 and losses.s2c_weight(2, 5, warmup_epochs=3) == 0
    assert losses.s2c_weight(3, 5, warmup_epochs=3) == pytest.approx(0.1)
    assert losses.s2c_weight(20, 15) == 1


def test_unreliable_percent_falls_from_20():
    assert losses.unreliable_percent(0, 15) == 20
    assert losses.unreliable_percent(3, 15) == pytest.approx(16)


def test_nothing_is_read_back_to_the_host():
    """Fake tensors have no values: whatever would make the host wait for the device raises."""
    with FakeTensorMode():
        cams, seg_logits = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 4, 3, 3, requires_grad=True)
        labels = torch.randint(0, 4, (2, 5, 5))
        loss = losses.c2s_loss(seg_logits, labels, 0.1) + losses.s2c_loss(cams, seg_logits, labels, 0.1)
        (loss + losses.unsupervised_loss(seg_logits, labels, torch.rand(2, 5, 5), 80.0)).backward()
