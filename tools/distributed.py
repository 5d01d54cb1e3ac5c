"""Several processes, one per GPU, that train one network together: each step, everyone has a share of the batch.

    torchrun --standalone --nproc_per_node 4 train_csrm.py --tag csrm ...

    device = select_device(args.device)     # the GPU of this process
    distributed.start(device)                   # joins the others
    losses = Replica(model)(step, batch)        # gradients are averaged over the processes during backward()

DistributedDataParallel averages gradients, so one rule holds for the losses of the processes: *their mean is the loss
of the whole batch*. A mean over equal shares is right as it is; a sum divided by a number of pixels becomes
`sum * world_size() / all_reduce_sum(number)`; a percentile is taken of `gather_batch(values)`. Then any number of
processes gives the losses, and the weights, of one.

In a single process, whatever started it, every function here returns its argument, or at once. Random numbers: see
`tools.training.seed_everything`.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tools.parallel import world_size

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others before it ends with an error. A process that died is noticed at once where
torchrun or gloo see it; this is for one that hangs. The longest honest wait is for the first process to save a
checkpoint."""


def start(device: torch.device) -> None:
    """Join the other processes that torchrun started: over NCCL on GPUs, gloo on CPUs."""
    if world_size() == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=own)


def stop() -> None:
    """Leave together, when the first has saved the result. Not after an error: the others do not know of it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether this is how PyTorch says that another process is gone or does not answer."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes, the same in all; without gradient. The shapes must agree."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather_batch(tensor: Tensor) -> Tensor:
    """The whole batch, [n * world_size, ...], of every process's share [n, ...]; without gradient.

    In the order in which a single process would have it, as processes load every `world_size`-th image
    (`datasets.loaders`). That holds for a batch of two halves, too.
    """
    if world_size() == 1:
        return tensor
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts, dim=1).flatten(0, 1)


class Replica:
    """Runs the training steps of a model of which every process has a copy, and keeps the copies equal.

    What DistributedDataParallel watches is a whole step, from images to losses, rather than a forward pass: then a step
    may call the model twice (Puzzle-CAM) or leave some of its outputs aside (CSRM during warm-up).

    Args:
        model: trained in place; equal in all processes. On GPUs its batch norm becomes one over the whole batch. On
            CPUs PyTorch has none: it is over a process's share, and the running statistics are the first process's.
        partial: whether a step may leave some weights without gradient.
    """

    def __init__(self, model: nn.Module, *, partial: bool = False) -> None:
        self.ddp = None
        if world_size() == 1:
            return
        if next(model.parameters()).is_cuda:
            convert_sync_batchnorm(model)
        self.ddp = DistributedDataParallel(_Step(model, partial), find_unused_parameters=partial)

    def __call__(self, step: Callable[..., Any], *args: Any, average: bool = True) -> Any:
        """What `step(*args)` returns: losses of this process's share of the batch.

        Args:
            average: whether backward() averages gradients; False while they are accumulated.
        """
        if self.ddp is None:
            return step(*args)
        with contextlib.nullcontext() if average else self.ddp.no_sync():
            return self.ddp(step, *args)


class _Step(nn.Module):
    """A model as a module whose forward pass is any function that uses it."""

    def __init__(self, model: nn.Module, partial: bool) -> None:
        super().__init__()
        self.model = model
        # Looking for weights without gradient, DistributedDataParallel warns where there are none: here is one.
        self.idle = nn.Parameter(next(model.parameters()).new_zeros(())) if partial else None

    def forward(self, step: Callable[..., Any], *args: Any) -> Any:
        return step(*args)
