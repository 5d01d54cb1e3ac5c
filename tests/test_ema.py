"""The mean teacher: the average itself, what is copied, and that it never trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import build_model
from tools.ema import Teacher, ema_decay


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_update_is_the_weighted_mean_of_parameters_and_a_copy_of_buffers():
    student = network()
    teacher = Teacher(student)
    old = student[0].weight.detach().clone()
    with torch.no_grad():
        student[0].weight.add_(1.0)
    student[1].running_mean.fill_(3.0)
    student[1].num_batches_tracked.fill_(7)
    teacher.update(student, 0.75)
    torch.testing.assert_close(teacher.module[0].weight, old + 0.25)
    assert torch.equal(teacher.module[1].running_mean, student[1].running_mean)
    assert teacher.module[1].num_batches_tracked == 7


def test_decay_zero_copies_and_shares_nothing():
    student, teacher = network(), Teacher(network())
    teacher.update(student, 0.0)
    for mine, theirs in zip(teacher.module.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def test_a_teacher_forgets_what_its_network_has_kept():
    """TinyViT keeps, in evaluation mode, biases that it has looked up in its weights."""
    student = build_model("classifier", architecture="tiny_vit_5m_224", weights="none", num_classes=3).eval()
    teacher, image = Teacher(student), torch.randn(1, 3, 64, 64)
    teacher(image)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_()
    teacher.update(student, 0.0)
    torch.testing.assert_close(teacher(image)["cams"], Teacher(student)(image)["cams"])


def test_teacher_never_trains():
    student = network().train()
    teacher = Teacher(student).train()
    assert not any(module.training for module in teacher.modules())
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(teacher(x), teacher(x)) and not teacher(x).requires_grad


def test_decay_grows_to_its_maximum():
    assert [ema_decay(t) for t in (0, 1, 3)] == pytest.approx([0.0, 0.5, 0.75])
    assert ema_decay(98) == pytest.approx(0.98989898) and ema_decay(99) == ema_decay(10_000) == 0.99


class Keeping(nn.Linear):
    """Like some of timm's layers: it keeps what it has computed from its weights until it trains."""

    kept = None

    def train(self, mode: bool = True) -> Keeping:
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = 2 * self.weight if self.kept is None else self.kept
        return x @ self.kept.T


def test_what_layers_keep_is_computed_again_from_new_weights():
    student, x = Keeping(3, 2), torch.eye(3)
    teacher = Teacher(student)
    teacher(x)
    with torch.no_grad():
        student.weight.fill_(1.0)
    teacher.update(student, 0.0)
    assert torch.equal(teacher(x), torch.full((3, 2), 2.0)) and not teacher.module.training
