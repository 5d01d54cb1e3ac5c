"""A run's health: signals against plain loops, decisions against tables, and a run that is killed and goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command import DECODER, TRAINING, data_flags, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import Killed, change_steps, kill_at
from torch import nn

from tools import health as health_module
from tools.health import Health
from tools.history import SIGNALS
from train_csrm import Criterion, Targets, loss_options

CHECKPOINT, REPORT = Path("experiments/models/a.pth"), Path("experiments/models/a.health.json")


def criterion(*flags: object) -> Criterion:
    return Criterion(loss_options(parse("train_csrm", "--tag", "t", *flags)), num_classes=4, dim=4)


def epochs(logits, vanished=None, ratios=None) -> list[dict]:
    """Records with these class logits, and per cent of vanished classes (default: none)."""
    number = len(logits)
    columns = zip(logits, vanished or [0.0] * number, ratios or [None] * number, strict=True)
    return [{"class_logit": a, "vanished": b, "s2c_to_c2s": c} for a, b, c in columns]


# -- signals -------------------------------------------------------------------------------------------------------


def plain_signals(y, cam_labels, teacher_labels, confidence, sigma):
    """Per cent, by loops over images, classes and pixels."""
    count = dict.fromkeys(("vanished", "labelled", "both", "either", "reliable", "confident"), 0)
    for i, k in np.ndindex(*y.shape):
        count["labelled"] += y[i, k] > 0
        count["vanished"] += y[i, k] > 0 and k + 1 not in teacher_labels[i]
    for i, v, u in np.ndindex(*cam_labels.shape):
        cam, label = cam_labels[i, v, u], teacher_labels[i, v, u]
        count["reliable"] += cam != 255
        count["both"] += cam != 255 and cam > 0 and label > 0
        count["either"] += cam != 255 and (cam > 0 or label > 0)
    count["confident"] = sum(value > sigma for value in confidence.ravel())
    return {
        "vanished": 100 * count["vanished"] / count["labelled"] if count["labelled"] else None,
        "agreement": 100 * count["both"] / count["either"] if count["either"] else None,
        "reliable": 100 * count["reliable"] / cam_labels.size,
        "confident": 100 * count["confident"] / confidence.size,
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_signals_of_labels_are_those_of_plain_loops(seed, half):
    rng = np.random.default_rng(seed)
    y = rng.choice([0.0, 0.4, 1.0], (2 * half, 3))
    cam_labels = rng.choice([0, 1, 2, 3, 255], (half, 3, 4))
    labels, confidence = rng.integers(0, 4, (2 * half, 3, 4)), rng.random((2 * half, 3, 4)).astype(np.float32)
    logits = rng.normal(size=(2 * half, 3))
    tensors = map(torch.from_numpy, (y, cam_labels, labels, confidence))
    observer = criterion("--s2c_sigma", 0.6)
    observer.observe(Targets(*tensors), torch.from_numpy(logits), torch.from_numpy(y))
    record = observer.health.close()
    for name, expected in plain_signals(y, cam_labels, labels, confidence, 0.6).items():
        assert record[name] == (None if expected is None else pytest.approx(expected, abs=1e-3)), name
    present = logits[y > 0]
    assert record["class_logit"] == (pytest.approx(present.mean(), abs=1e-4) if present.size else None)
    assert record["kept"] is None and record["s2c_to_c2s"] is None


def test_an_epoch_is_the_mean_over_its_pixels_not_over_its_steps():
    health = Health("on", warmup_epochs=1, max_epoch=3)
    health.add("reliable", torch.tensor([True, True, False]), 3)
    health.add("reliable", torch.zeros(7, dtype=torch.bool), torch.ones(7))
    assert health.close()["reliable"] == 20
    health.add("reliable", torch.tensor([True]), 1)
    assert health.close()["reliable"] == 100, "begins anew"
    assert [record["reliable"] for record in health.history] == [20, 100]


def test_logits_in_half_precision_are_added_in_full():
    health = Health("on", warmup_epochs=1, max_epoch=3)
    health.add("class_logit", torch.full((1000,), 1 + 2**-7, dtype=torch.bfloat16), 1000)
    assert health.close()["class_logit"] == round(1 + 2**-7, 4)


def test_processes_that_share_an_epoch_go_on_with_halves(monkeypatch):
    """Of two processes; the other has 1 of 7 pixels, this one 2 of 3, and later each 5 of 5: 13 of 20 in all."""
    monkeypatch.setattr(health_module, "world_size", lambda: 2)
    monkeypatch.setattr(health_module, "all_reduce_sum", lambda own: own + torch.tensor([1.0, 7.0]))
    health = Health("on", warmup_epochs=1, max_epoch=3)
    health.add("reliable", torch.tensor([True, True, False]), 3)
    health.share()
    health.add("reliable", torch.ones(5), 5)
    monkeypatch.setattr(health_module, "all_reduce_sum", lambda own: 2 * own)
    assert health.close()["reliable"] == 65


def test_kept_is_the_part_of_the_objects_that_the_entropy_leaves():
    """Two of three object pixels have the highest entropy; a fifth of all pixels is dropped at epoch 0 of many."""
    observer = criterion("--warmup_epochs", 0, "--max_epoch", 10**6)
    logits = torch.zeros(2, 4, 1, 10)
    logits[1, 0] = torch.linspace(8, 1, 10)  # the entropy grows to the right
    labels = torch.zeros(2, 1, 10, dtype=torch.long)
    labels[1, 0, [0, 8, 9]] = 1
    targets = Targets(torch.ones(2, 3), labels[:1], labels, torch.ones(2, 1, 10))
    observer.unsupervised({"seg_logits": logits}, {"seg_logits": logits}, targets, epoch=0)
    assert observer.health.close()["kept"] == pytest.approx(100 / 3, abs=1e-3)


def test_the_ratio_of_gradients_is_that_of_the_whole_batch(monkeypatch):
    """Of two processes; the other's gradient of L_s2c is the opposite, but for one weight, of L_c2s the same."""
    layer = nn.Linear(2, 1, bias=False)
    losses = {"s2c": (layer.weight * torch.tensor([3.0, 4.0])).sum(), "c2s": layer.weight.sum()}
    other = [torch.tensor([[-3.0, 4.0]]), torch.ones(1, 2)]
    monkeypatch.setattr("tools.health.world_size", lambda: 2)
    monkeypatch.setattr("tools.health.all_reduce_sum", lambda own: own + other.pop(0) if own.dim() == 2 else own)
    health = Health("on", warmup_epochs=0, max_epoch=1)
    health.add_gradients(losses, layer)
    assert health.close()["s2c_to_c2s"] == pytest.approx(4 / 2**0.5, abs=1e-3)


def test_the_ratio_of_gradients_is_that_of_the_whole_trained_backbone():
    backbone = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(1, 1))
    backbone[2].requires_grad_(False)
    health = Health("on", warmup_epochs=1, max_epoch=3)
    first, second = backbone(torch.randn(4, 2)).pow(2).mean(), backbone(torch.randn(4, 2)).mean()
    health.add_gradients({"c2s": second}, backbone)
    assert not health.sums
    health.add_gradients({"s2c": first, "c2s": second}, backbone)
    norms = []
    for loss in (first, second):
        backbone.zero_grad()
        loss.backward()
        norms.append(sum(p.grad.pow(2).sum() for p in backbone[:2].parameters()).sqrt().item())
    assert health.close()["s2c_to_c2s"] == pytest.approx(norms[0] / norms[1], abs=1e-3)
    backbone.requires_grad_(False)
    health.add_gradients({"s2c": first, "c2s": second}, backbone)
    assert not health.sums


# -- decisions -----------------------------------------------------------------------------------------------------

LOW = 0.7 * 3.0 - 0.01
SOME, FEW = 10.1, 10.0


@pytest.mark.parametrize("mode, history, expected", [
    ("off", epochs([3, 3, 3]), (6, 6)),
    ("on", [], (2, 6)),
    ("on", epochs([3, 3, LOW, LOW]), (2, 6)),
    ("auto", [], (6, 6)),
    ("auto", epochs([3]), (6, 6)),  # the warm-up is not over
    ("auto", epochs([3, 3]), (2, 6)),
    ("auto", epochs([3, 3, 3], [SOME, SOME, FEW]), (3, 6)),
    ("auto", epochs([3, 3, 3], [FEW, SOME, SOME]), (6, 6)),
    ("auto", epochs([3, 3, 3], [None, None, None]), (6, 6)),
    ("auto", epochs([3, 3, LOW]), (2, 3)),
    ("auto", epochs([3, 3, 0.7 * 3.0, 3, LOW, 3]), (2, 5)),
    ("auto", epochs([1, 1, LOW, 1], [SOME, SOME, SOME, FEW]), (4, 6)),
    ("auto", epochs([-1, -1, -1]), (2, 6)),  # nothing to fall from
])  # fmt: skip
def test_when_all_losses_teach(mode, history, expected):
    health = Health(mode, warmup_epochs=2, max_epoch=6)
    health.history = history
    assert health.teaching_epochs() == expected


def test_the_signals_of_the_first_epoch_are_waited_for():
    health = Health("auto", warmup_epochs=0, max_epoch=6)
    assert health.teaching_epochs() == (6, 6)
    health.history = epochs([3, 3], [SOME, FEW])
    assert health.teaching_epochs() == (2, 6)
    health.history = epochs([3, 3], [FEW, FEW])
    assert health.teaching_epochs() == (1, 6)


@pytest.mark.parametrize("mode, history, expected", [
    ("off", epochs([3] * 4), []),
    ("on", epochs([3] * 4), [3, 4]),
    ("auto", epochs([3] * 4, [SOME] * 4), []),
    ("auto", epochs([3] * 4, [SOME, SOME, FEW, FEW]), [4, 4]),
    ("auto", epochs([3, 3, LOW, 3]), [3, 3]),
])  # fmt: skip
def test_the_report_says_which_epochs_taught(mode, history, expected):
    health = Health(mode, warmup_epochs=2, max_epoch=4)
    health.history = [{**dict.fromkeys(SIGNALS), **record} for record in history]
    assert health.report()["teaches_itself"] == expected


def test_warm_up_lasts_until_self_training_starts_and_comes_back_when_it_stops():
    health = Health("auto", warmup_epochs=1, max_epoch=8)
    health.history = epochs([3, 3, 3, 3, 1, 3, 3], [SOME, SOME, FEW, 0, 0, 0, 0])
    assert [health.warmup_epochs(epoch) for epoch in range(8)] == [8, 8, 8, 3, 3, 6, 7, 8]
    without = Health("off", warmup_epochs=1, max_epoch=3)
    assert [without.warmup_epochs(epoch) for epoch in range(3)] == [3, 3, 3]


def test_auto_limits_the_weight_of_l_s2c_by_the_last_ratio():
    health = Health("auto", warmup_epochs=0, max_epoch=5)
    health.history = epochs([3, 3, 3], ratios=[None, 4.0, 0.5])
    assert [health.s2c_limit(epoch, 0.5) for epoch in (0, 1, 2, 3)] == [math.inf, math.inf, 0.125, 1]
    health.mode = "on"
    assert health.s2c_limit(2, 0.5) == math.inf


@pytest.mark.parametrize("mode, history, expected", [
    ("on", epochs([3, 3, 3]), None),
    ("on", epochs([3, 3, LOW]), "Warning: class logits have fallen below 0.7 of what they were"),
    ("on", epochs([3, 3, LOW, LOW]), None),  # said once
    ("auto", epochs([3, 3]), "self-training starts after epoch 2."),
    ("auto", epochs([3, 3, 3]), None),
    ("auto", epochs([3, 3, LOW]), "stops, since class logits have fallen, after epoch 3."),
    ("auto", epochs([3] * 6, [SOME] * 6), None),
    ("off", epochs([3, 3, LOW]), None),
])  # fmt: skip
def test_news(mode, history, expected):
    health = Health(mode, warmup_epochs=2, max_epoch=6)
    health.history = history
    assert expected in health.news() if expected else health.news() is None


# -- runs ----------------------------------------------------------------------------------------------------------

FLAGS = ["--tag", "a", *TRAINING, *DECODER, "--max_steps", 2, "--max_epoch", 4, "--cutmix_prob", 0.7, "--crf_t", 1]


def test_a_killed_run_decides_as_one_without_a_break(folder_root, folder, monkeypatch):
    monkeypatch.setattr(health_module, "READY_VANISHED", 100.0)
    monkeypatch.setattr(health_module, "HARM", -1.0)
    flags = [*data_flags(folder_root), *FLAGS, "--self_training", "auto", "--teacher_labels", "foreground"]
    folder("whole")
    run("train_csrm", *flags)
    expected = CHECKPOINT.read_bytes(), REPORT.read_bytes()
    folder("killed")
    for step in (1, 5):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            change_steps(patch, "train_csrm", kill_at(step))
            run("train_csrm", *flags)
    run("train_csrm", *flags)
    assert (CHECKPOINT.read_bytes(), REPORT.read_bytes()) == expected


def test_the_report_and_the_line_of_each_epoch(folder_root, folder, capsys):
    folder("run")
    run("train_csrm", *data_flags(folder_root), *FLAGS, "--warmup_epochs", 2)
    report, lines = json.loads(REPORT.read_text()), capsys.readouterr().out.splitlines()
    assert report["self_training"] == "on" and report["teaches_itself"] == [3, 4]
    assert all(len(report[name]) == 4 for name in SIGNALS)
    assert [value is None for value in report["s2c_to_c2s"]] == [True, True, False, False]
    assert sum(line.startswith("health  class_logit ") for line in lines) == 4


def test_off_is_warm_up_to_the_end(folder_root, folder):
    weights = []
    for name, flags in (("off", ["--self_training", "off"]), ("long", ["--warmup_epochs", 4])):
        folder(name)
        run("train_csrm", *data_flags(folder_root), *FLAGS, *flags)
        weights.append(torch.load(CHECKPOINT, weights_only=True)["teacher"])
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
