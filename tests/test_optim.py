"""Parameter groups, learning rates against golden values, and every optimiser by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tools.errors import UserError
from tools.optim import Update, build_optimizer, parameter_groups, poly_schedule
from tools.options import OPTIMIZERS, Optimization


class Network(nn.Module):
    """A pretrained convolution with normalisation, a frozen stem and a new head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.stage = nn.Sequential(nn.Conv2d(4, 4, 1, bias=bias), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1, bias=bias)
        self.pretrained = {"stem", "stage"}

    def forward(self, x):
        return self.head(self.stage(self.stem(x)))


def test_groups_split_the_trainable_parameters_by_origin_and_kind():
    model = Network()
    groups = parameter_groups(model, Optimization("sgd", 1.0, 0.5, lr_alpha_scratch=10.0, lr_alpha_bias=2.0))
    conv, norm, head = *model.stage, model.head
    members = [[conv.weight, norm.weight], [conv.bias, norm.bias], [head.weight], [head.bias]]
    assert [[id(p) for p in g["params"]] for g in groups] == [[id(p) for p in m] for m in members]
    assert [g["lr"] for g in groups] == [1.0, 2.0, 10.0, 20.0]
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0, 0.5, 0.0]


def test_learning_rates_golden():
    golden = np.load(Path(__file__).parent / "golden" / "poly_lr.npz")
    lr, scratch, bias = (golden[name].item() for name in ("base_lr", "alpha_scratch", "alpha_bias"))
    optimizer = build_optimizer(Network(), Optimization("sgd", lr, 0, lr_alpha_scratch=scratch, lr_alpha_bias=bias))
    schedule = poly_schedule(optimizer, golden["max_step"].item(), golden["power"].item())
    assert [group["name"] for group in optimizer.param_groups] == golden["groups"].tolist()
    for expected in golden["lr_used_at_each_step"]:
        np.testing.assert_allclose([group["lr"] for group in optimizer.param_groups], expected, atol=1e-7)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_optimizer_moves_only_what_is_trainable(name, bias):
    model = Network(bias)
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = build_optimizer(model, Optimization(name, 0.1, 0.01))
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key]) == key.startswith("stem"), key


def test_a_schedule_restored_from_its_state_goes_on_as_if_never_stopped():
    def start():
        optimizer = build_optimizer(Network(), Optimization("sgd", 0.1, 0))
        return optimizer, poly_schedule(optimizer, max_step=10)

    def advance(optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.step()
            schedule.step()

    (optimizer, schedule), (other, restored) = start(), start()
    advance(optimizer, schedule, 4)
    other.load_state_dict(optimizer.state_dict())
    restored.load_state_dict(schedule.state_dict())
    advance(optimizer, schedule, 3)
    advance(other, restored, 3)
    assert restored.get_last_lr() == schedule.get_last_lr()
    assert other.param_groups[0]["lr"] == pytest.approx(0.1 * 0.3**0.9)


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_weights_whose_first_gradient_comes_late_have_velocity_like_all(name):
    """v <- .9 v + g; the step is lr (g + .9 v) with Nesterov momentum, else lr v."""
    model = Network()
    optimizer = build_optimizer(model, Optimization(name, 0.1, 0, lr_alpha_scratch=1))
    late, early = model.head.weight, model.stage[0].weight
    start, velocity = late.detach().clone(), torch.zeros_like(late)
    for step in range(4):
        early.grad = torch.ones_like(early)
        late.grad = torch.full_like(late, step) if step >= 2 else None
        optimizer.step()
        if step >= 2:
            velocity = 0.9 * velocity + step
            start -= 0.1 * (step + 0.9 * velocity if name == "sgd" else velocity)
        torch.testing.assert_close(late.detach(), start)


@pytest.mark.parametrize("name, second", [("adamw", 0.08 / 0.19 / (0.001009 / 0.001999) ** 0.5), ("lion", -1)])
def test_each_optimizer_is_that_of_its_name(name, second):
    """Their first steps are alike. Of the gradients 1 and -.1 AdamW divides the means; Lion takes the sign of one."""
    model = Network()
    optimizer = build_optimizer(model, Optimization(name, 0.1, 0, lr_alpha_scratch=1))
    weight = model.head.weight
    start = weight.detach().clone()
    for gradient in (1.0, -0.1):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), start - 0.1 * (1 + second))


@pytest.mark.parametrize(
    "name, moved",
    [
        ("sgd", lambda w: w - 0.1 * 1.9 * (1 + 0.5 * w)),
        ("momentum", lambda w: w - 0.1 * (1 + 0.5 * w)),
        ("adamw", lambda w: w - 0.1 * (1 + 0.5 * w)),
        ("lion", lambda w: w - 0.1 * (1 + 0.5 * w)),
    ],
)
def test_weights_decay_as_each_optimizer_says(name, moved):
    """By a gradient of 1 and half the weight. AdamW and Lion bring only the gradient to length 1."""
    model = Network()
    optimizer = build_optimizer(model, Optimization(name, 0.1, 0.5, lr_alpha_scratch=1))
    weight = model.head.weight
    expected, weight.grad = moved(weight.detach()), torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("batches", [1, 3, 4])
def test_an_update_follows_the_mean_over_the_batches_that_were_there(batches):
    """Four are asked for; at the end of an epoch there may be fewer."""
    torch.manual_seed(0)
    model, images = Network().eval(), torch.randn(batches, 2, 3, 5, 5)
    options = Optimization("sgd", 0.1, 0.0, momentum=0.0, nesterov=False, lr_alpha_scratch=1.0, grad_max_norm=0.0)
    options = dataclasses.replace(options, lr_poly_power=0.0, accumulate_steps=4)
    update = Update(model, options, updates=9, dtype=None)
    for _ in range(2):
        mean = sum(model(each).square().mean() for each in images) / batches
        (expected,) = torch.autograd.grad(mean, model.head.weight)
        before = model.head.weight.detach().clone()
        for each in images:
            update.backward(model(each).square().mean())
        update.step()
        torch.testing.assert_close(before - model.head.weight, 0.1 * expected)


def test_weights_without_a_gradient_neither_decay_nor_go_on_moving():
    """As CSRM's representation branch once self-training has stopped."""
    model = Network()
    update = Update(model, Optimization("sgd", 0.1, 0.5), updates=9, dtype=None)
    update.backward(model(torch.randn(2, 3, 4, 4)).square().sum())
    update.step()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    update.backward(model.head.weight.sum())
    update.step()
    assert [name for name, value in model.named_parameters() if not torch.equal(value, before[name])] == ["head.weight"]


def test_the_factor_of_the_losses_does_not_grow():
    """It would overflow in a long training, and updates would be left out. PyTorch's grows every 2,000 steps."""
    layer = nn.Linear(1, 1)
    layer.pretrained = set()
    update = Update(layer, Optimization("sgd", 0.1, 0.0), updates=9, dtype=torch.bfloat16)
    for _ in range(2001):
        update.backward(layer.bias.sum())
        update.step()
    assert update.scaler.get_scale() == 1


def test_nesterov_without_momentum_is_a_clear_error():
    with pytest.raises(UserError, match="--momentum above 0"):
        build_optimizer(Network(), Optimization("sgd", 0.1, 0, momentum=0.0))
