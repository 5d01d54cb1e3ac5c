"""The mean teacher (Tarvainen & Valpola, NeurIPS 2017): a copy of the student that moves slowly after it.

    teacher = Teacher(student)
    outputs = teacher(images)                   # evaluation mode, no gradient
    teacher.update(student, ema_decay(step))    # after every optimiser step; decay 0 copies the student

Averaged weights are steadier than the latest ones, which is what makes the teacher's labels better than the student's.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.profiler import record_function


def ema_decay(step: int, maximum: float = 0.99) -> float:
    """min(1 - 1 / (1 + step), maximum): 0 at step 0 (a copy), so that the first students weigh little later on."""
    return min(1 - 1 / (1 + step), maximum)


class Teacher(nn.Module):
    """A frozen copy of `student`, always in evaluation mode; its state dict is that of a model under `module.`."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: dropout in the teacher would put noise into its labels, entropies and keys."""
        return super().train(False)

    @record_function("teacher")
    @torch.no_grad()
    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @record_function("EMA")
    @torch.no_grad()
    def update(self, student: nn.Module, decay: float) -> None:
        """Parameters become decay * teacher + (1 - decay) * student; buffers (running statistics) are copied."""
        torch._foreach_lerp_(list(self.module.parameters()), list(student.parameters()), 1 - decay)
        for mine, theirs in zip(self.module.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)
        self.module.train().eval()  # some of timm's networks keep what they have computed from weights until they train
