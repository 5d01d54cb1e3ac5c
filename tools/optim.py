"""From gradients to weights: an optimiser with the four parameter groups of this method, and its schedule.

    update = Update(model, options, updates=epochs * updates_per_epoch, dtype=torch.bfloat16)
    update.backward(loss)    # of one batch
    update.step()            # once per `options.accumulate_steps` batches

A model's set `pretrained` has the names of its parts that are not new.
"""

from typing import Any

import torch
from timm.optim import Lion
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.profiler import record_function

from tools import distributed
from tools.errors import UserError
from tools.options import OPTIMIZERS, Optimization


def parameter_groups(model: nn.Module, options: Optimization) -> list[dict]:
    """Trainable parameters as pretrained weights, pretrained biases, new weights, new biases, in this order.

    The learning rates are lr times 1, `lr_alpha_bias`, `lr_alpha_scratch`, and both; biases have no weight decay. The
    scale of a normalisation layer counts as a weight. A group may be empty, so that the order never changes.
    """
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (name.partition(".")[0] not in model.pretrained, name.rpartition(".")[2] == "bias")
            members.setdefault(kind, []).append(parameter)
    return [
        {
            "name": f"{'scratch' if is_scratch else 'pretrained'} {'bias' if is_bias else 'weight'}",
            "params": members.get((is_scratch, is_bias), []),
            "lr": options.lr * options.lr_alpha_scratch**is_scratch * options.lr_alpha_bias**is_bias,
            "weight_decay": 0.0 if is_bias else options.wd,
        }
        for is_scratch in (False, True)
        for is_bias in (False, True)
    ]


def build_optimizer(model: nn.Module, options: Optimization) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups`, fused where PyTorch can (not "lion").

    "momentum" is "sgd" with classical momentum, also if `nesterov` is on. "adamw" and "lion" use neither.

    Raises:
        UserError: Nesterov momentum without momentum.
    """
    assert options.optimizer in OPTIMIZERS, f"unknown optimiser {options.optimizer!r}, expected one of {OPTIMIZERS}"
    name, momentum, nesterov = options.optimizer, options.momentum, options.nesterov
    if name == "sgd" and nesterov and momentum <= 0:
        raise UserError(f"--nesterov: needs --momentum above 0, not {momentum:g}. Set it, or pass --nesterov false.")
    groups = parameter_groups(model, options)
    if name in ("sgd", "momentum"):
        return _fused_sgd(groups, momentum, nesterov and name == "sgd")
    return torch.optim.AdamW(groups, fused=True) if name == "adamw" else Lion(groups)


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


class Update:
    """Turns the gradients of a model into a change of its weights, in place.

    Args:
        updates: how often `step` will be called; the learning rate falls to 0 over them.
        dtype: of mixed precision; float16 needs its losses scaled.
    """

    def __init__(self, model: nn.Module, options: Optimization, *, updates: int, dtype: torch.dtype | None) -> None:
        self.options = options
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(model, options)
        self.schedule = poly_schedule(self.optimizer, updates, options.lr_poly_power)
        # Used in every precision: it also skips updates with gradients that are not finite, and where the optimiser is
        # fused it does not wait for the GPU.
        scale = {} if dtype == torch.float16 else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, **scale)
        self.batches = 0  # whose gradients have been added since the last step

    @record_function("backward")
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one batch's loss, a scalar."""
        self.scaler.scale(loss / self.options.accumulate_steps).backward()
        self.batches += 1

    @record_function("optimiser")
    def step(self) -> None:
        """Average the gradients over the processes, clip them, change the weights, lower the learning rate."""
        distributed.average_gradients(self.parameters)
        if self.batches < self.options.accumulate_steps:  # at the end of an epoch: the mean is over fewer batches
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, self.options.accumulate_steps / self.batches)
        self.batches = 0
        if self.options.grad_max_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.options.grad_max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()

    def state_dict(self) -> dict[str, dict]:
        """What a resumed run needs."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on from a `state_dict`, or from a dict that holds one."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
