"""One step of CSRM: the criterion against golden vectors, its switches, and every way to make and mix labels."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from command import DECODER, TRAINING, data_flags, parse, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_csrm
from models import build_model
from tools import optim, options, pseudo_labels, training
from tools.ema import Teacher
from tools.losses import c2s_loss, multilabel_loss, s2c_loss, s2c_weight
from tools.memory_bank import MemoryBank
from tools.pseudo_labels import reliable_cam_labels, teacher_labels
from train_csrm import Batch, Criterion, Targets, batches, label_options, loss_options, teacher_decay, train_step

ALL = {"loss", "c", "c2s", "s2c", "u", "contra"}
NUM_CLASSES = 4


# -- the criterion -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    data = np.load(Path(__file__).parent / "golden" / "training_step.npz")
    return {name: torch.from_numpy(data[name]) for name in data.files}


@pytest.fixture(scope="module")
def golden_inputs(golden):
    """What the networks gave, and the targets made of it as `train_step` makes them."""
    images = golden["images_u8"].permute(0, 3, 1, 2).contiguous()
    image_labels = golden["image_labels"]
    cam_labels = reliable_cam_labels(images[:2], golden["teacher_cam_logits"][:2], image_labels[:2])
    student = {
        "class_logits": golden["student_class_logits"],
        "cams": golden["student_cam_logits"],
        "seg_logits": golden["student_seg_logits"],
        "representations": golden["student_rep"],
    }
    teacher = {"seg_logits": golden["teacher_seg_logits_for_uncertainty"], "representations": golden["teacher_rep"]}
    logits = golden["teacher_seg_logits_for_labels"]
    return student, teacher, Targets(image_labels, cam_labels, *teacher_labels(logits, image_labels, images.shape[-2:]))


def golden_criterion(golden, *flags) -> Criterion:
    ranks = "--contra_low_rank", golden["low_rank"].item(), "--contra_high_rank", golden["high_rank"].item()
    args = parse("train_csrm", "--tag", "t", *ranks, *flags)
    criterion = Criterion(loss_options(args), num_classes=5, dim=16)
    criterion.bank = MemoryBank(num_classes=5, dim=16, queue_size=3000, background_queue_size=3000)
    return criterion


def test_cam_labels_of_the_labeled_half(golden, golden_inputs):
    cam_labels = golden_inputs[-1].cam_labels
    assert (cam_labels == golden["pseudo_masks_of_labeled_half"]).float().mean() >= 0.999


@pytest.mark.parametrize("epoch", [0, 1, 3, 10])
def test_losses_golden(golden, golden_inputs, epoch):
    losses = golden_criterion(golden)(*golden_inputs, epoch)
    for name in ALL - {"loss"}:
        expected = golden[f"loss_{name}_at_epoch_{epoch}"].item()
        assert float(losses.get(name, 0)) == pytest.approx(expected, abs=1e-4), name
    assert losses["loss"].item() == pytest.approx(golden[f"loss_at_epoch_{epoch}"].item(), abs=1e-4)


def test_warm_up_has_two_losses_and_needs_no_teacher(golden, golden_inputs):
    student, _, targets = golden_inputs
    criterion = golden_criterion(golden, "--warmup_epochs", 2)
    assert [criterion.has_any(epoch, "u", "contra") for epoch in range(4)] == [False, False, True, True]
    assert criterion(student, {}, targets, 1).keys() == {"loss", "c", "c2s"}
    losses = criterion(*golden_inputs, 4)
    rest = losses["loss"] - losses["c"] - losses["c2s"] - losses["u"] - losses["contra"]
    assert rest.item() == pytest.approx((0.1 + 0.9 * 2 / 13) * losses["s2c"].item(), abs=1e-4), "linear from there"


def test_smoothing_threshold_and_ranks_are_those_of_the_flags(golden, golden_inputs, monkeypatch):
    """Besides those of the golden vectors, .1, .5, 3 and 6."""
    student, _, targets = golden_inputs
    flags, ranks = ["--label_smoothing", 0.3, "--s2c_sigma", 0.9], []
    monkeypatch.setattr(train_csrm, "contrastive_loss", lambda *args, **given: ranks.append(given) or torch.zeros(()))
    criterion = golden_criterion(golden, *flags, "--contra_low_rank", 2, "--contra_high_rank", 4)
    losses = criterion(*golden_inputs, 3)
    sure = targets.teacher_labels.where(targets.confidence > 0.9, 255)
    expected = {
        "c": multilabel_loss(student["class_logits"], targets.image_labels, 0.3),
        "c2s": c2s_loss(student["seg_logits"][:2], targets.cam_labels, 0.3),
        "s2c": s2c_loss(student["cams"], student["seg_logits"], sure, 0.3),
    }
    assert {name: losses[name].item() for name in expected} == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}, abs=1e-5
    )
    assert ranks == [{"low_rank": 2, "high_rank": 4}]


@pytest.mark.parametrize("name", sorted(ALL - {"loss"}))
def test_weights_scale_and_zero_switches_off(golden, golden_inputs, name):
    whole = golden_criterion(golden)(*golden_inputs, 3)
    factor = s2c_weight(3, 15) if name == "s2c" else 1
    without = golden_criterion(golden, f"--w_{name}", 0)(*golden_inputs, 3)
    assert without.keys() == ALL - {name}
    assert without["loss"].item() == pytest.approx((whole["loss"] - factor * whole[name]).item(), abs=1e-4)
    double = golden_criterion(golden, f"--w_{name}", 2)(*golden_inputs, 3)
    assert double["loss"].item() == pytest.approx((whole["loss"] + factor * whole[name]).item(), abs=1e-4)


def test_without_the_losses_that_ask_it_the_teacher_is_not_needed(golden, golden_inputs):
    student, _, targets = golden_inputs
    criterion = golden_criterion(golden, "--w_u", 0, "--use_rep_head", "false")
    assert not criterion.has_any(3, "u", "contra")
    assert criterion(student, {}, targets, 3).keys() == {"loss", "c", "c2s", "s2c"}


def test_a_memory_bank_is_kept_only_for_its_loss():
    without = (["--w_contra", 0], ["--use_rep_head", "false"], ["--self_training", "off"])
    for flags, kept in (([], True), *((flags, False) for flags in without)):
        criterion = Criterion(loss_options(parse("train_csrm", "--tag", "t", *flags)), num_classes=5, dim=4)
        assert (criterion.bank is not None) == kept


# -- one step ------------------------------------------------------------------------------------------------------


class Step:
    """A tiny student and teacher, and `train_step` on random images of 48 pixels."""

    def __init__(self, *flags, half: int = 2) -> None:
        self.args = parse("train_csrm", "--tag", "t", *TRAINING, *DECODER, "--max_epoch", 15, "--crf_t", 1, *flags)
        torch.manual_seed(0)
        heads = {"use_sal_head": self.args.use_sal_head, "use_rep_head": self.args.use_rep_head}
        network = {"architecture": "test_resnet", "decoder_channels": 8, "batch_norm": "fix"}
        self.student = build_model("csrm", num_classes=NUM_CLASSES, **network, **heads)
        self.teacher = Teacher(self.student)
        self.criterion = Criterion(loss_options(self.args), num_classes=NUM_CLASSES, dim=8)
        self.labels = label_options(self.args, (self.args.c2s_bg, self.args.c2s_fg))
        labels = torch.zeros(2 * half, NUM_CLASSES - 1)
        labels[torch.arange(2 * half), torch.arange(2 * half) % (NUM_CLASSES - 1)] = 1
        images = torch.randint(0, 256, (2 * half, 3, 48, 48), dtype=torch.uint8)
        self.batch = Batch(images, labels, 1, torch.randint(0, NUM_CLASSES, (2 * half, 48, 48)))

    def __call__(self, epoch: int = 1, observed: bool = True) -> dict[str, torch.Tensor]:
        losses = train_step(self.batch, self.student, self.teacher, self.criterion, self.labels, epoch, observed)
        losses["loss"].backward()
        return losses


@pytest.mark.parametrize("mode", ["cam", "mp", "gt"])
@pytest.mark.parametrize("augment", ["classmix", "cutmix", "none"])
def test_every_source_of_labels_and_every_mix(monkeypatch, mode, augment):
    mixes = []
    for name in ("classmix", "cutmix"):
        mix = getattr(train_csrm, name)
        monkeypatch.setattr(train_csrm, name, lambda *args, name=name, mix=mix: mixes.append(name) or mix(*args))
    step = Step("--c2s_mode", mode, "--augment", augment, "--cutmix_prob", 1, "--c2s_sigma", 0.3)
    losses = step()
    assert mixes == ([] if augment == "none" else [augment])
    assert losses.keys() == ALL and all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in step.student.parameters() if p.grad is not None)
    assert all(p.grad is None for p in step.teacher.parameters())


class NoReadBack(TorchDispatchMode):
    """Refuses operations whose result, or its shape, the host must know: on a GPU it would wait for them."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        by_mask = name == "index" and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in leaves[1:])
        assert not by_mask and name not in self.WAITING, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["cam", "mp", "gt"])
@pytest.mark.parametrize("augment", ["classmix", "cutmix", "none"])
def test_a_step_reads_nothing_back(monkeypatch, mode, augment):
    """From images to gradients, but for the dense CRF, whose lattices have as many vertices as the images give them."""
    monkeypatch.setattr(pseudo_labels, "mean_field", lambda images, unary, *args, **kwargs: (-unary).softmax(dim=2))
    step = Step("--c2s_mode", mode, "--augment", augment, "--cutmix_prob", 1, "--use_sal_head")
    with NoReadBack():
        step()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            step.batch.image_labels.sum().item()


@pytest.mark.parametrize("flags, names", [
    (["--use_sal_head"], ALL),
    (["--use_rep_head", "false"], ALL - {"contra"}),
    (["--use_gn", "false"], ALL),
])  # fmt: skip
def test_heads(flags, names):
    step = Step(*flags)
    assert step().keys() == names
    if step.args.use_sal_head:
        assert step.student.saliency.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("augment", ["classmix", "cutmix"])
def test_a_batch_of_one(augment):
    assert all(loss.isfinite() for loss in Step("--augment", augment, "--cutmix_prob", 1, half=1)().values())


def test_images_without_any_label():
    step = Step("--cutmix_prob", 1)
    step.batch.image_labels.zero_()
    losses = step()
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["c2s"] == 0 and losses["contra"] == 0
    assert all(p.grad.isfinite().all() for p in step.student.parameters() if p.grad is not None)


def test_labels_are_made_of_the_unlabeled_half_only_to_be_mixed(monkeypatch):
    numbers = []

    def counting(images, *args, **kwargs):
        numbers.append(len(images))
        return reliable_cam_labels(images, *args, **kwargs)

    monkeypatch.setattr(train_csrm, "reliable_cam_labels", counting)
    for probability in (0, 1):
        Step("--cutmix_prob", probability)()
    assert numbers == [2, 4]


def test_the_teacher_looks_at_the_mixed_images_after_warm_up_only():
    step, calls = Step("--cutmix_prob", 1), []
    step.teacher.module.register_forward_hook(lambda *call: calls.append(call))
    step(epoch=0)
    assert len(calls) == 1
    step(epoch=1)
    assert len(calls) == 3


@pytest.mark.parametrize("reading", options.READINGS)
def test_teacher_labels_are_read_as_asked(monkeypatch, reading):
    readings = []

    def noting(logits, image_labels, size, reading):
        readings.append(reading)
        return teacher_labels(logits, image_labels, size, reading)

    monkeypatch.setattr(train_csrm, "teacher_labels", noting)
    Step("--teacher_labels", reading)()
    assert readings == [reading]


def test_auto_limits_the_gradient_of_l_s2c_to_that_of_l_c2s(golden, golden_inputs):
    """Weights 1 and .5: the ramp of epoch 3 is above .5 / 4, and below .5 / .5."""
    totals = []
    for ratio in (4.0, 0.5):
        criterion = golden_criterion(golden, "--self_training", "auto", "--w_contra", 0, "--w_c2s", 0.5)
        criterion.health.history = [{"class_logit": 3.0, "vanished": 0.0, "s2c_to_c2s": ratio}] * 3
        losses = criterion(*golden_inputs, 3)
        totals.append((losses["loss"] - losses["c"] - losses["u"] - 0.5 * losses["c2s"]).item())
    expected = torch.tensor([0.5 / 4, s2c_weight(3, 15)]) * losses["s2c"].item()
    torch.testing.assert_close(torch.tensor(totals), expected, atol=1e-4, rtol=0)


def test_l_s2c_teaches_the_cams_alone():
    step = Step(*("--w_c", 0, "--w_c2s", 0, "--w_u", 0, "--w_contra", 0, "--s2c_sigma", 0))
    step()
    assert step.student.classifier.weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in step.student.segmentation.parameters())


# -- around the step -----------------------------------------------------------------------------------------------


def test_batches_put_the_augmented_half_first():
    def half(value):
        images = torch.full((2, 3, 4, 4), value, dtype=torch.uint8)
        return {"id": ["a", "b"], "image": images, "label": torch.full((2, 3), value / 100)}

    (batch,) = batches([half(100)], [half(50)], lambda images: images + 1, torch.device("cpu"))
    assert batch.images[:, 0, 0, 0].tolist() == [101, 101, 50, 50] and batch.images.dtype == torch.uint8
    assert batch.image_labels[:, 0].tolist() == [1, 1, 0.5, 0.5] and batch.masks is None
    assert batch.max_classes == 3


def test_the_teacher_copies_through_the_epoch_after_warm_up_then_averages():
    warmup = {"warmup_epochs": 1, "updates_per_epoch": 4}
    assert [teacher_decay(epoch, 4 * epoch + 1, **warmup) for epoch in (0, 1)] == [0, 0]
    t = 2 * 4 + 1 - 4  # optimiser steps since warm-up ended
    assert teacher_decay(2, 2 * 4 + 1, **warmup) == pytest.approx(1 - 1 / (1 + t))
    assert teacher_decay(9, 4000, **warmup) == 0.99


def test_student_and_teacher_of_a_run(folder_root, tmp_path, monkeypatch):
    equal, save = [], training.save_checkpoint

    def comparing(path, **content):
        pairs = zip(content["model"].values(), content["teacher"].values(), strict=True)
        equal.append(all(torch.equal(mine, theirs) for mine, theirs in pairs))
        save(path, **content)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "save_checkpoint", comparing)
    flags = ["--max_epoch", 4, "--warmup_epochs", 1, "--crf_t", 1]
    run("train_csrm", *data_flags(folder_root), "--tag", "t", *TRAINING, *DECODER, *flags)
    assert equal == [True, True, False, False]


def test_the_classifier_is_new_unless_the_prior_brings_it(folder_root, tmp_path, monkeypatch):
    rates, build_optimizer = [], optim.build_optimizer

    def noting(model, *args, **kwargs):
        optimizer = build_optimizer(model, *args, **kwargs)
        of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        rates.append(of[id(model.classifier.weight)] / of[id(model.backbone.net.layer1[0].conv1.weight)])
        return optimizer

    monkeypatch.chdir(tmp_path)
    data = data_flags(folder_root)
    run("train_classifier", *data, "--tag", "prior", *TRAINING)
    weights = torch.load("experiments/models/prior.pth", weights_only=True)["model"]
    torch.save({name: tensor for name, tensor in weights.items() if name != "classifier.weight"}, "backbone.pth")
    monkeypatch.setattr(optim, "build_optimizer", noting)
    for tag, source in (("a", None), ("b", "backbone.pth"), ("c", "experiments/models/prior.pth")):
        restored = ["--restore", source] if source else []
        run("train_csrm", *data, "--tag", tag, *TRAINING, *DECODER, "--crf_t", 1, *restored)
    assert rates == [pytest.approx(10), pytest.approx(10), pytest.approx(1)]


@pytest.mark.parametrize(
    "probability, flags, epoch, of_teacher, of_student",
    [
        (0, [], 1, [True], [True]),  # one pass serves labels and losses; its outputs are those of a second look
        (1, [], 1, [False, True], [True]),
        (1, ["--w_contra", 0], 1, [False, False], [False]),
        (1, ["--w_contra", 0, "--w_u", 0], 1, [False], [False]),
        (1, [], 0, [False], [False]),  # warm-up
    ],
)
def test_passes_of_a_step_and_whether_they_give_representations(
    monkeypatch, probability, flags, epoch, of_teacher, of_student
):
    step = Step("--cutmix_prob", probability, *flags)
    forwards = [mock.Mock(side_effect=network.forward) for network in (step.teacher.module, step.student)]
    for network, forward in zip((step.teacher.module, step.student), forwards, strict=True):
        monkeypatch.setattr(network, "forward", forward)
    step(epoch)
    asked = [[call.kwargs["representations"] for call in forward.call_args_list] for forward in forwards]
    assert asked == [of_teacher, of_student]


@pytest.mark.parametrize("augment", ["classmix", "none"])
def test_in_warm_up_the_student_segments_the_labeled_half_with_the_same_losses(monkeypatch, augment):
    step, losses = Step("--augment", augment, "--cutmix_prob", 1), []
    for layer in step.student.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0  # two passes of other sizes draw other masks
    forward = step.student.forward
    looks_at_all = lambda images, segmented, representations: forward(images, representations=representations)  # noqa: E731
    for of_student in (forward, looks_at_all):
        student = mock.Mock(side_effect=of_student)
        monkeypatch.setattr(step.student, "forward", student)
        training.seed_everything(0)
        losses.append(step(epoch=0))
        assert student.call_args.kwargs["segmented"] == 2
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0]["c2s"] > 0


@pytest.mark.parametrize("mode, needed", [("cam", 0), ("gt", "not at all"), ("mp", None)])
@pytest.mark.parametrize("augment", ["classmix", "cutmix", "none"])
def test_in_warm_up_the_teacher_segments_only_where_health_looks_with_the_same_losses(
    monkeypatch, mode, needed, augment
):
    step = Step("--c2s_mode", mode, "--augment", augment, "--cutmix_prob", 1, "--c2s_sigma", 0.3)
    forward, losses = step.teacher.module.forward, []
    for observed, epoch, segmented in ((True, 0, None), (False, 0, needed), (False, 1, None)):
        teacher = mock.Mock(side_effect=forward)
        monkeypatch.setattr(step.teacher.module, "forward", teacher)
        training.seed_everything(0)
        losses.append(step(epoch, observed))
        first = teacher.call_args_list[0].kwargs["segmented"] if teacher.called else "not at all"
        assert first == segmented
        seen = [name for name, value in step.criterion.health.close().items() if value is not None]
        assert bool(seen) == (segmented is None)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
