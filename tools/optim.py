"""Optimisers with the four parameter groups of this method, and the polynomial learning rate schedule.

    optimizer = build_optimizer(model, "sgd", lr=0.007, weight_decay=1e-4, alpha_scratch=10.0)
    schedule = poly_schedule(optimizer, max_step=epochs * steps_per_epoch)
    ...
    optimizer.step()
    schedule.step()    # once per optimiser step, not per epoch

A model says which of its modules are new (not pretrained) with `scratch_modules() -> list[nn.Module]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.optim import Lion
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tools.errors import UserError
from tools.options import OPTIMIZERS


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, alpha_scratch: float = 10.0, alpha_bias: float = 1.0
) -> list[dict]:
    """Trainable parameters as pretrained weights, pretrained biases, new weights, new biases, in this order.

    The learning rates are lr times 1, alpha_bias, alpha_scratch and alpha_scratch * alpha_bias; biases have no weight
    decay. The scale of a normalisation layer counts as a weight. A group may be empty, so that the order never changes.
    """
    scratch = {id(p) for module in model.scratch_modules() for p in module.parameters()}
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (id(parameter) in scratch, name.rpartition(".")[2] == "bias")
            members.setdefault(kind, []).append(parameter)
    return [
        {
            "name": f"{'scratch' if is_scratch else 'pretrained'} {'bias' if is_bias else 'weight'}",
            "params": members.get((is_scratch, is_bias), []),
            "lr": lr * (alpha_scratch if is_scratch else 1) * (alpha_bias if is_bias else 1),
            "weight_decay": 0.0 if is_bias else weight_decay,
        }
        for is_scratch in (False, True)
        for is_bias in (False, True)
    ]


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    nesterov: bool = True,
    alpha_scratch: float = 10.0,
    alpha_bias: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimiser `name` (`tools.options.OPTIMIZERS`) over `parameter_groups`, fused where PyTorch can (not "lion").

    "momentum" is "sgd" with classical momentum whatever `nesterov` says. "adamw" and "lion" use neither of the two.

    Raises:
        UserError: Nesterov momentum without momentum.
    """
    if name == "sgd" and nesterov and momentum <= 0:
        raise UserError(f"--nesterov: needs --momentum above 0, not {momentum:g}. Set it, or pass --nesterov false.")
    groups = parameter_groups(
        model, lr=lr, weight_decay=weight_decay, alpha_scratch=alpha_scratch, alpha_bias=alpha_bias
    )
    builders: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: _fused_sgd(groups, momentum, nesterov),
        "momentum": lambda: _fused_sgd(groups, momentum, nesterov=False),
        "adamw": lambda: torch.optim.AdamW(groups, fused=True),
        "lion": lambda: Lion(groups),
    }
    assert name in builders, f"unknown optimiser {name!r}, expected one of {OPTIMIZERS}"
    return builders[name]()


def _fused_sgd(groups: list[dict], momentum: float, nesterov: bool) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum:
        # PyTorch's fused step fails on weights whose first gradient comes later than others', as CSRM's representation
        # branch after warm-up. A velocity of zero is what each begins with anyway.
        for group in groups:
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"]})
    return optimizer


def poly_schedule(optimizer: torch.optim.Optimizer, max_step: int, power: float = 0.9) -> LambdaLR:
    """lr * (1 - step / max_step) ** power, counted in optimiser steps; constant from the last step on, never 0."""
    return LambdaLR(optimizer, lambda step: (1 - min(step, max_step - 1) / max_step) ** power)
